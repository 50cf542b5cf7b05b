"""Remembers which convolutions cuDNN cannot compute in one pass."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MAX_KEYS = 1024  # a network has about 30 shapes per batch size; the bound matters if image sizes vary


class ConvFallback:
    """Tries cuDNN's fused convolution once per key, and separate operations from then on where it is not supported.

    cuDNN has no query for what it supports, so the only way to know is to try. A CUDA graph must not capture a failed
    attempt: run every shape once before capturing.
    """

    def __init__(self) -> None:
        self._unsupported: OrderedDict[Hashable, None] = OrderedDict()

    def run(self, key: Hashable, fused: Callable[[], Tensor], separate: Callable[[], Tensor]) -> Tensor:
        """Return the result of `fused`, or of `separate` where cuDNN does not support the fused form.

        Args:
            key: everything that cuDNN's support depends on: shapes, strides, padding, dtype, device.
            fused: the convolution in one pass.
            separate: the same in several passes.

        Raises:
            OutOfMemoryError: there is no memory now. Nothing is remembered: there may be later.
            AcceleratorError: the device is lost.
        """
        if key not in self._unsupported:
            try:
                return fused()
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except RuntimeError as error:
                log.log(logging.DEBUG if self._unsupported else logging.WARNING, "no fused %s: %s", key, error)
                self._unsupported[key] = None
                if len(self._unsupported) > MAX_KEYS:
                    self._unsupported.popitem(last=False)
        return separate()
