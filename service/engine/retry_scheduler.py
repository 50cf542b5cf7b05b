"""Schedules `Retry-After` for rejected requests. Pure state; used from one thread."""

import math

MIN_RETRY_AFTER_S = 1  # in whole seconds, as HTTP has it
MAX_RETRY_AFTER_S = 120  # by then most things have changed
SLACK = 1.2  # slots are given away that much more slowly than images are answered, as predictions are not exact
PHASES = 4  # that many parts of a second have a schedule each
# How busy the server must be for the longest times, and below what share of the time nobody is delayed for the sake of
# slots that were given away: those who had them did not come.
BUSY, IDLE = 0.9, 0.6


class RetryScheduler:
    """Gives every rejected request another time: those that were rejected in the same moment come back one after the
    other, as fast as they can be answered.

    A caller that waits for whole seconds comes back in the same quarter of a second in which it was rejected. So each
    quarter of all seconds to come has a schedule of its own; with one schedule callers would come in heaps.
    """

    def __init__(self) -> None:
        self._taken_until = [0.0] * PHASES
        self._beyond = 0  # requests for which there was no slot

    def schedule(self, now: float, wait_s: float, work_s: float, load: float) -> int:
        """Take the next free slot; seconds until then.

        Args:
            now: the time.
            wait_s: how long there is no room for the request in any case.
            work_s: what it is going to take.
            load: share of the last seconds in which the server had work. Many callers never come back; where it has
                little to do, their slots are free.
        """
        phase = int(now * PHASES) % PHASES
        free = max(self._taken_until[phase], now + max(MIN_RETRY_AFTER_S, wait_s) - 1)  # which rounding up adds
        slot_s = math.ceil(max(MIN_RETRY_AFTER_S, wait_s, free - now))
        longest_s = int(MAX_RETRY_AFTER_S * min(1.0, max(0.0, (load - IDLE) / (BUSY - IDLE))))
        if slot_s <= MAX_RETRY_AFTER_S:
            self._taken_until[phase] = free + SLACK * work_s * PHASES
        if slot_s <= max(MIN_RETRY_AFTER_S, longest_s):
            return slot_s
        self._beyond += 1  # the later half of all slots is given away once more, evenly
        again_s = longest_s - self._beyond % max(1, longest_s // 2)
        return min(MAX_RETRY_AFTER_S, math.ceil(max(MIN_RETRY_AFTER_S, wait_s, again_s)))
