"""Float32 that is float32."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.RLock()


@contextmanager
def exact_float32() -> Iterator[None]:
    """While it lasts, cuDNN multiplies float32 as float32; by default it cuts it to ten bits of mantissa (TF32).

    The setting is the process's, so that only one thread can be inside.
    """
    cudnn: Any = torch.backends.cudnn  # torch's types lack what follows
    settings = (cudnn.conv, cudnn.rnn)  # torch asks for them together, and wants them alike
    with _lock:
        before = [each.fp32_precision for each in settings]
        for each in settings:
            each.fp32_precision = "ieee"
        try:
            yield
        finally:
            for each, precision in zip(settings, before, strict=True):
                each.fp32_precision = precision
