"""One memory budget for request bodies and for responses that are being sent. Pure state; used from one event loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rednet.service.errors import Overloaded

SMALL_BYTES = 1_000_000  # leases up to this size can use the whole budget
SMALL_SHARE = 8  # one part in 8 of the budget is out of bounds for larger ones
UPLOAD_GRACE_S = 5.0  # an upload that takes no longer never loses its lease: 32 MB at 50 Mbit/s
RETRY_S = 1.0


class MemoryLease:
    """The memory that one request holds.

    Args:
        budget: it is taken from.
        since: when the lease began, by the budget's clock.
    """

    def __init__(self, budget: "MemoryBudget", since: float) -> None:
        self._budget = budget
        self._since = since
        self.bytes = 0
        self.on_revoke: Callable[[], None] | None = None  # while the lease may be revoked: frees the memory at once
        self.revoked = False

    def take(self, size: int) -> None:
        """Reserve `size` more bytes.

        Raises:
            Overloaded: the budget is used up, or the lease was revoked.
        """
        if not self.revoked:
            self._budget.reserve(self, size)
        if self.revoked:
            raise Overloaded("too many large bodies at once; try again later", RETRY_S)

    def byte_seconds(self, now: float) -> float:
        """The memory held, times how long the lease has lasted; 0: it cannot be revoked yet."""
        age_s = now - self._since
        return self.bytes * age_s if self.on_revoke and age_s > UPLOAD_GRACE_S else 0.0


class MemoryBudget:
    """Bounds the memory of all requests together.

    When the budget is used up, uploads in progress lose their leases, starting with the one that has held the most
    memory for the longest time. So stalled uploads give way to others, while slow ones continue as long as memory is
    available, and small ones nearly always.

    Args:
        max_bytes: in total.
        clock: returns the time, in seconds.
    """

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._leases: set[MemoryLease] = set()
        self.used = 0

    @contextmanager
    def lease(self) -> Iterator[MemoryLease]:
        """A lease that is released when the context ends."""
        lease = MemoryLease(self, self._clock())
        self._leases.add(lease)
        try:
            yield lease
        finally:
            self._release(lease)

    def reserve(self, lease: MemoryLease, size: int) -> None:
        """Add to a lease. If the budget is used up, leases are revoked, possibly this one."""
        share = self._max_bytes // SMALL_SHARE if lease.bytes + size > SMALL_BYTES else 0
        while self.used + size > self._max_bytes - share:
            now = self._clock()
            largest = max(self._leases, key=lambda each: each.byte_seconds(now))
            self._revoke(largest if largest.byte_seconds(now) > 0 else lease)
            if lease.revoked:
                return
        lease.bytes += size
        self.used += size

    def _revoke(self, lease: MemoryLease) -> None:
        lease.revoked = True
        self._release(lease)
        if lease.on_revoke:
            lease.on_revoke()

    def _release(self, lease: MemoryLease) -> None:
        self._leases.discard(lease)
        self.used -= lease.bytes
        lease.bytes = 0
