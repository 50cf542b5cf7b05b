"""When those who were refused shall come back, and whose place is kept until then. Pure state; used from one thread."""

import heapq
import math

SHORTEST_S = 1  # times are told in whole seconds, as HTTP does
LONGEST_S = 30  # by then most things have changed
LONGEST_KEPT_S = 120  # unless a place is kept
MOST_KEPT = 10_000  # places
LATE_S = 5.0  # how much later than they were told they may come
SLACK = 1.2  # places are given away that much more slowly than images are answered, as predictions are not exact
PHASES = 4  # that many parts of a second are given away on their own


class Promises:
    """Tells everyone another time: not all who were refused at the same moment come back together, but one after the
    other, as fast as they can be answered. For who has a name a place is kept at that time.

    Who is told whole seconds comes back in the same quarter of a second as they were refused in. Each quarter of all
    seconds to come is therefore given away by itself; given away together they would come in heaps.
    """

    def __init__(self) -> None:
        self._given_until = [0.0] * PHASES
        self._kept: dict[bytes, float] = {}  # from when, by name
        self._in_order: list[tuple[float, bytes]] = []  # a heap of the same, and of what is not kept any more

    def give(self, name: bytes | None, now: float, wait_s: float, work_s: float) -> int:
        """Seconds after which they shall come back.

        Args:
            name: theirs; None: no place is kept.
            now: the time.
            wait_s: how long there is no room for them in any case.
            work_s: what they are going to take.
        """
        phase = int(now * PHASES) % PHASES
        free = max(self._given_until[phase], now + max(SHORTEST_S, wait_s) - 1)  # of the second that rounding up adds
        comes_s = max(SHORTEST_S, math.ceil(max(wait_s, free - now)))
        if comes_s > (LONGEST_S if name is None else LONGEST_KEPT_S) or len(self._in_order) >= MOST_KEPT:
            return LONGEST_S
        self._given_until[phase] = free + SLACK * work_s * PHASES
        if name is not None:
            self._kept[name] = now + comes_s
            heapq.heappush(self._in_order, (now + comes_s, name))
        return comes_s

    def take(self, name: bytes | None, now: float) -> bool:
        """Whether a place is kept for that name now; then it is taken."""
        if name is None or not self.kept(now) or self._kept.get(name, now + 1) > now:
            return False
        del self._kept[name]
        return True

    def kept(self, now: float) -> int:
        """How many may still come for their place."""
        while self._in_order and self._in_order[0][0] + LATE_S < now:
            comes, name = heapq.heappop(self._in_order)
            if self._kept.get(name) == comes:
                del self._kept[name]
        return len(self._kept)
