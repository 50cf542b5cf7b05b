"""One memory budget for request bodies and for answers that are being sent. Pure state; used from one event loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rednet.service.errors import Overloaded

SMALL_BYTES = 1_000_000  # claims up to here have a share of the budget that larger ones cannot take
SMALL_SHARE = 8  # it is one part in so many
UPLOAD_GRACE_S = 5.0  # an upload that takes no longer never loses its claim: 32 MB at 50 Mbit/s
RETRY_S = 1.0


class Claim:
    """What one request holds of the budget.

    Args:
        budget: of which it is a part.
        since: when it began, by the budget's clock.
    """

    def __init__(self, budget: "MemoryBudget", since: float) -> None:
        self._budget = budget
        self._since = since
        self.bytes = 0
        self.on_loss: Callable[[], None] | None = None  # while it may be lost: gives the memory back at once
        self.lost = False

    def take(self, size: int) -> None:
        """Claim so many bytes more.

        Raises:
            Overloaded: there is no room, or the claim was lost.
        """
        if not self.lost:
            self._budget.take(self, size)
        if self.lost:
            raise Overloaded("too many large bodies at once; try again later", RETRY_S)

    def cost(self, now: float) -> float:
        """How much memory for how long, in byte seconds; 0: it is too young to lose it."""
        age_s = now - self._since
        return self.bytes * age_s if self.on_loss and age_s > UPLOAD_GRACE_S else 0.0


class MemoryBudget:
    """Bounds the memory of all requests together.

    When it is used up, uploads that are still arriving make room: first the one that has held the most memory for the
    longest time. Uploads that have stalled thus give way to others, while slow ones go on where there is room, and
    small ones nearly always.

    Args:
        max_bytes: in total.
        clock: returns the time, in seconds.
    """

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._claims: set[Claim] = set()
        self.used = 0

    @contextmanager
    def claim(self) -> Iterator[Claim]:
        """A claim, given back at the end."""
        claim = Claim(self, self._clock())
        self._claims.add(claim)
        try:
            yield claim
        finally:
            self._give_back(claim)

    def take(self, claim: Claim, size: int) -> None:
        """Add to a claim; if there is no room, some claim is lost, and that may be this one."""
        share = self._max_bytes // SMALL_SHARE if claim.bytes + size > SMALL_BYTES else 0
        while self.used + size > self._max_bytes - share:
            now = self._clock()
            loser = max(self._claims, key=lambda each: each.cost(now))
            self._lose(loser if loser.cost(now) > 0 else claim)
            if claim.lost:
                return
        claim.bytes += size
        self.used += size

    def _lose(self, claim: Claim) -> None:
        claim.lost = True
        self._give_back(claim)
        if claim.on_loss:
            claim.on_loss()

    def _give_back(self, claim: Claim) -> None:
        self._claims.discard(claim)
        self.used -= claim.bytes
        claim.bytes = 0
