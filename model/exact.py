"""Float32 that is float32."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.RLock()


@contextmanager
def exact_float32() -> Iterator[None]:
    """While it lasts, cuDNN multiplies float32 as float32; by default it cuts it to ten bits of mantissa (TF32).

    The setting is the process's, so that only one thread can be inside.
    """
    with _lock, torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False):
        yield
