"""Pads batches to a fixed set of sizes, with one program (a captured CUDA graph) per size."""

from collections.abc import Callable

import torch
from torch import Tensor

Program = Callable[[Tensor], tuple[Tensor, ...]]  # from at most `size` images to outputs [n, ...] that it owns


def bucket_size(images: int) -> int:
    """Return the size that a batch is padded to: 1, 2, 3, 4, 6, 8, 12, 16, 24, ...; padding stays below one half."""
    power = 1 << (images - 1).bit_length()
    return power // 4 * 3 if power >= 4 and images <= power // 4 * 3 else power


class BatchBuckets:
    """Makes a program for every bucket up to the largest batch so far, so that smaller batches need no capture.

    When memory is exhausted, no larger program is made, and larger batches run in parts.

    Args:
        make: makes the program for a size; raises MemoryError if there is not enough memory.
    """

    def __init__(self, make: Callable[[int], Program]) -> None:
        self._make = make
        self._programs: dict[int, Program] = {}  # without the sizes that did not fit into memory
        self._max_size: int | None = None  # the largest size that fits into memory; None: no limit met yet

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for pixels [B, ...], B >= 1.

        Raises:
            MemoryError: there is no memory for a single image.
        """
        wanted = bucket_size(len(pixels))
        if wanted not in self._programs and (self._max_size is None or wanted < self._max_size):
            self._build(wanted)
        parts = pixels.split(min(wanted, self._max_size or wanted))
        outputs = [self._programs[bucket_size(len(part))](part) for part in parts]
        return outputs[0] if len(outputs) == 1 else tuple(torch.cat(column) for column in zip(*outputs, strict=True))

    def _build(self, largest: int) -> None:
        """Make the missing programs, largest first: the smaller ones reuse its memory."""
        sizes = sorted({bucket_size(images) for images in range(1, largest + 1)} - self._programs.keys(), reverse=True)
        for size in sizes:
            try:
                self._programs[size] = self._make(size)
            except MemoryError:
                if size == 1:
                    raise
                self._max_size = max((each for each in {*sizes, *self._programs} if each < size), default=1)
