"""Pads batches to a fixed set of sizes, with one program (a captured CUDA graph) per size."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Program = Callable[[Tensor], tuple[Tensor, ...]]  # from at most `size` images to outputs [n, ...] that it owns


def bucket_size(images: int) -> int:
    """Return the size that a batch is padded to: 1, 2, 3, 4, 6, 8, 12, 16, 24, ...; padding stays below one half."""
    power = 1 << (images - 1).bit_length()
    return power // 4 * 3 if power >= 4 and images <= power // 4 * 3 else power


class BatchBuckets:
    """Makes a program for every bucket up to the largest batch so far, so that smaller batches need no capture.

    When memory is exhausted, no larger program is made, and larger batches run in parts. Where a program cannot be made
    for another reason, its batches run in the next larger one, or in parts.

    Args:
        make: makes the program for a size. It raises MemoryError if there is not enough memory, and RuntimeError if the
            device cannot run it or its output is wrong.
    """

    def __init__(self, make: Callable[[int], Program]) -> None:
        self._make = make
        self._programs: dict[int, Program] = {}
        self._failed: set[int] = set()  # sizes whose programs failed for another reason than memory
        self._limit: int | None = None  # the smallest size that did not fit into memory; None: no limit met yet

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for pixels [B, ...], B >= 1.

        Raises:
            MemoryError: there is no memory for a single image.
            RuntimeError: no program can be made.
        """
        wanted = bucket_size(len(pixels))
        if wanted not in self._programs and wanted not in self._failed and not self._is_too_large(wanted):
            self._build(wanted)
        outputs = [self._program(len(part))(part) for part in pixels.split(max(self._programs))]
        return outputs[0] if len(outputs) == 1 else tuple(torch.cat(column) for column in zip(*outputs, strict=True))

    def _program(self, images: int) -> Program:
        """Return the smallest program for so many images, which is that of their bucket unless it failed."""
        return self._programs[min(size for size in self._programs if size >= images)]

    def _is_too_large(self, size: int) -> bool:
        return self._limit is not None and size >= self._limit

    def _build(self, largest: int) -> None:
        """Make the missing programs, largest first: the smaller ones reuse its memory."""
        known = self._programs.keys() | self._failed
        for size in sorted({bucket_size(images) for images in range(1, largest + 1)} - known, reverse=True):
            if self._is_too_large(size):
                continue
            try:
                self._programs[size] = self._make(size)
            except MemoryError:
                if size == 1 and not self._programs:
                    raise
                self._limit = size
            except torch.AcceleratorError:  # the device is lost
                raise
            except RuntimeError as error:
                if not self._programs:
                    raise
                log.error("no CUDA graph for batches of %d: %s", size, error)
                self._failed.add(size)
