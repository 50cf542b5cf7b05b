"""What a batch costs, measured: batch size, backlog and `Retry-After` follow from it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

# A larger batch is worth taking if it needs less than this share of the time per image. Batches grow only while images
# are waiting, and then whatever raises the rate shortens the wait; less than this is noise.
WORTHWHILE = 0.95


@dataclass(frozen=True)
class CostTable:
    """Measured batches.

    Attributes:
        seconds: of a batch, by its size; sizes ascend from 1. Empty: nothing has been measured yet.
        max_batch_size: the size that batches should not exceed.
    """

    seconds: Mapping[int, float] = field(default_factory=dict)
    max_batch_size: int = 1

    def batch_s(self, images: int) -> float:
        """The time of a batch: between measured sizes in proportion, beyond them as the largest per image."""
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
        """The time of so many images, in batches as large as they may be."""
        full, rest = divmod(images, self.max_batch_size)
        return full * self.batch_s(self.max_batch_size) + self.batch_s(rest)


def measure(batch_s: Callable[[int], float], largest: int, auto: bool, least: int = 1) -> CostTable:
    """Measure batches of 1, 2, 4, ... images.

    Args:
        batch_s: runs a batch of that size and says how long it took.
        largest: the last size.
        auto: take the smallest size than which no larger one is worthwhile, and stop when that is clear or memory ends;
            otherwise batches may be as large as `largest`.
        least: what auto does not go below, however little it seems to gain.
    """
    seconds: dict[int, float] = {}
    best = 1
    for size in _ladder(largest):
        try:
            seconds[size] = batch_s(size)
        except (MemoryError, RuntimeError):  # torch says RuntimeError when a device has no memory left
            if not auto or size == 1:
                raise
            break
        if seconds[size] / size < WORTHWHILE * seconds[best] / best:
            best = size
        if auto and size > 2 * max(best, least):
            break
    return CostTable(seconds, max(best, min(least, max(seconds))) if auto else largest)


def _ladder(largest: int) -> Iterator[int]:
    size = 1
    while size < largest:
        yield size
        size *= 2
    yield largest
