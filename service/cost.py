"""What a batch costs, measured: batch size, backlog and `Retry-After` follow from it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

LARGEST_BATCH = 64  # that is ever chosen; measuring stops long before where larger batches gain nothing
WORTHWHILE = 0.95  # a larger batch is worth its latency if it takes less than this share of the time per image


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
        if not self.seconds:
            return 0.0
        sizes = list(self.seconds)
        if images >= sizes[-1]:
            return self.seconds[sizes[-1]] * images / sizes[-1]
        for low, high in pairwise(sizes):
            if low <= images <= high:
                share = (images - low) / (high - low)
                return self.seconds[low] * (1 - share) + self.seconds[high] * share
        return 0.0

    def queue_s(self, images: int) -> float:
        """The time of so many images, in batches as large as they may be."""
        full, rest = divmod(images, self.max_batch_size)
        return full * self.batch_s(self.max_batch_size) + self.batch_s(rest)


def measure(batch_s: Callable[[int], float], largest: int | None) -> CostTable:
    """Measure batches of 1, 2, 4, ... images.

    Args:
        batch_s: runs a batch of that size and says how long it took.
        largest: the last size, and the size of batches; None: the smallest than which no larger one is worthwhile.
    """
    seconds: dict[int, float] = {}
    best = 1
    for size in _ladder(largest or LARGEST_BATCH):
        seconds[size] = batch_s(size)
        if seconds[size] / size < WORTHWHILE * seconds[best] / best:
            best = size
        if largest is None and size > 2 * best:
            break
    return CostTable(seconds, largest or best)


def _ladder(largest: int) -> Iterator[int]:
    size = 1
    while size < largest:
        yield size
        size *= 2
    yield largest
