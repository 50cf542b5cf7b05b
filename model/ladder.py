"""Batches of any size on programs that were made for a few sizes."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Columns = TypeVar("Columns", bound=tuple[Tensor, ...])
Program = Callable[[Tensor], tuple[Tensor, ...]]  # up to its size of images to answers [n, ...] of their own


def rung(images: int) -> int:
    """The size that a batch is padded to: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., less than half as much again."""
    power = 1 << (images - 1).bit_length()
    return power // 4 * 3 if power >= 4 and images <= power // 4 * 3 else power


class Ladder:
    """Makes a program for every size up to the largest that was wanted so far, so that later batches that are no larger
    find theirs ready. Where memory ends, the ladder ends, and larger batches run in parts.

    Args:
        make: makes the program for a size.
    """

    def __init__(self, make: Callable[[int], Program]) -> None:
        self._make = make
        self._programs: dict[int, Program] = {}  # a gap remains where there was no memory
        self._most: int | None = None  # images of the largest program that there is memory for; None: not known

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """The answers for pixels [B, ...], B at least 1.

        Raises:
            MemoryError: there is not even memory for one image.
        """
        wanted = rung(len(pixels))
        if wanted not in self._programs and (self._most is None or wanted < self._most):
            self._build(wanted)
        parts = [self._programs[rung(len(part))](part) for part in pixels.split(min(wanted, self._most or wanted))]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _build(self, largest: int) -> None:
        """Make what is missing up to `largest`, largest first: the others fit into the memory that it has used."""
        sizes = sorted({rung(images) for images in range(1, largest + 1)} - self._programs.keys(), reverse=True)
        for size in sizes:
            try:
                self._programs[size] = self._make(size)
            except MemoryError:
                if size == 1:
                    raise
                self._most = max((each for each in {*sizes, *self._programs} if each < size), default=1)
