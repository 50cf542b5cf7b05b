"""Measured batch times. Batch size, backlog and `Retry-After` follow from them."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

log = logging.getLogger(__name__)

# A larger batch is worthwhile if it takes less than this share of the time per image. Batches grow only while images
# wait, and then a higher rate shortens the wait. A smaller gain is noise.
WORTHWHILE = 0.95

# Predictions are unbiased, so half of them are too low. This factor makes nearly all of them high enough.
SAFETY_FACTOR = 2.0


@dataclass(frozen=True)
class CostTable:
    """The measured time of batches.

    Attributes:
        seconds: by batch size, ascending from 1; empty before warm-up.
        max_batch_size: the size that batches should not exceed.
    """

    seconds: Mapping[int, float] = field(default_factory=dict)
    max_batch_size: int = 1

    def batch_s(self, images: int) -> float:
        """The time of a batch: interpolated between measured sizes, beyond them proportional to the largest."""
        if images in self.seconds:
            return self.seconds[images]
        if not self.seconds or images <= 0:
            return 0.0
        sizes = list(self.seconds)
        if images >= sizes[-1]:
            return self.seconds[sizes[-1]] * images / sizes[-1]
        low, high = next((low, high) for low, high in pairwise(sizes) if images < high)
        share = (images - low) / (high - low)
        return self.seconds[low] * (1 - share) + self.seconds[high] * share

    def queue_s(self, images: int) -> float:
        """The time of a number of images in full batches."""
        full, rest = divmod(images, self.max_batch_size)
        return full * self.batch_s(self.max_batch_size) + self.batch_s(rest)


class Device(Protocol):
    """What runs images."""

    def backlog_s(self, images: int) -> float:
        """Predicted time to run `images` images."""


def together_s(images: int, devices: Sequence[Device]) -> float:
    """The time that devices together take for a number of images; a faster device takes more of them."""
    if len(devices) == 1:
        return devices[0].backlog_s(images)
    alone_s = [device.backlog_s(images) for device in devices]
    if min(alone_s) <= 0:  # nothing to do, or nothing known yet
        return 0.0
    # An image is not split: the last one takes at least as long as on the fastest device.
    share = math.ceil(images / len(devices))
    return max(1 / sum(1 / each_s for each_s in alone_s), min(device.backlog_s(share) for device in devices))


def measure(batch_s: Callable[[int], float], max_size: int, auto: bool, min_size: int = 1) -> CostTable:
    """Measure batches of 1, 2, 4, ... images.

    Args:
        batch_s: runs a batch of a size, and returns its time.
        max_size: the last size.
        auto: choose the smallest size above which no size is worthwhile, and stop as soon as that is clear or memory
            runs out. Otherwise batches may have up to `max_size` images.
        min_size: the smallest size that `auto` chooses, even if it seems to gain little.
    """
    seconds: dict[int, float] = {}
    best = 1
    for size in _sizes(max_size):
        try:
            seconds[size] = batch_s(size)
        except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError when a device runs out of memory
            if not auto or size == 1:
                raise
            log.warning("batches of %d failed during warm-up, and stay smaller: %s", size, error)
            break
        if seconds[size] / size < WORTHWHILE * seconds[best] / best:
            best = size
        if auto and size > 2 * max(best, min_size):
            break
    return CostTable(seconds, max(best, min(min_size, max(seconds))) if auto else max_size)


def _sizes(max_size: int) -> Iterator[int]:
    size = 1
    while size < max_size:
        yield size
        size *= 2
    yield max_size
