"""Disables TF32 while float32 results are computed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0  # threads that are inside `ieee_float32`
_saved: list[str] = []  # the process's settings, which the last thread restores


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute float32 convolutions and matrix products on CUDA in IEEE float32.

    By default cuDNN rounds their inputs to TF32, whose mantissa has 10 bits.

    The setting belongs to the process, so it stays changed until the last thread has left the block. Threads do not
    wait for each other: two devices compute at the same time.
    """
    global _inside  # noqa: PLW0603  (counts across threads, like the setting that it guards)
    backends: Any = torch.backends  # the settings below are missing from torch's type stubs
    # torch reads both settings of cuDNN together, and warns if they differ
    settings = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    with _lock:
        if _inside == 0:
            _saved[:] = [each.fp32_precision for each in settings]
            for each in settings:
                each.fp32_precision = "ieee"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for each, precision in zip(settings, _saved, strict=True):
                    each.fp32_precision = precision
