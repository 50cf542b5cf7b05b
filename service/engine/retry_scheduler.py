"""Schedules `Retry-After` for rejected requests. Pure state; used from one thread."""

import math

MIN_RETRY_AFTER_S = 1  # HTTP allows whole seconds only
MAX_RETRY_AFTER_S = 120  # predictions are worth little beyond this
SPACING_FACTOR = 1.2  # slots are that much longer than predicted, as predictions are not exact
PHASES = 4  # number of schedules, one for each quarter of a second
# Shares of the time in which the server has work. From BUSY_LOAD on, Retry-After may be as long as MAX_RETRY_AFTER_S.
# Below IDLE_LOAD, reserved slots are ignored: their clients have not come back.
BUSY_LOAD, IDLE_LOAD = 0.9, 0.6


class RetryScheduler:
    """Reserves a time slot for every rejected request, so that clients that were rejected together come back one after
    the other, as fast as they can be answered.

    As `Retry-After` is in whole seconds, a client comes back in the same quarter of a second in which it was rejected.
    So each quarter has its own schedule; with a single one, clients would come back in bursts.
    """

    def __init__(self) -> None:
        self._taken_until = [0.0] * PHASES
        self._without_slot = 0  # rejected requests for which no slot was left

    def schedule(self, now: float, wait_s: float, work_s: float, load: float) -> int:
        """Reserve the next free slot; returns the seconds until it begins.

        Args:
            now: the time.
            wait_s: time until the queue has room for the request in any case.
            work_s: predicted time to answer the request.
            load: share of the last seconds in which the server had work. Many clients never come back; at low load,
                their slots count as free.
        """
        phase = int(now * PHASES) % PHASES
        free = max(self._taken_until[phase], now + max(MIN_RETRY_AFTER_S, wait_s) - 1)  # rounding up adds a second
        slot_s = math.ceil(max(MIN_RETRY_AFTER_S, wait_s, free - now))
        longest_s = int(MAX_RETRY_AFTER_S * min(1.0, max(0.0, (load - IDLE_LOAD) / (BUSY_LOAD - IDLE_LOAD))))
        if slot_s <= MAX_RETRY_AFTER_S:
            self._taken_until[phase] = free + SPACING_FACTOR * work_s * PHASES
        if slot_s <= max(MIN_RETRY_AFTER_S, longest_s):
            return slot_s
        self._without_slot += 1  # spread such requests evenly over the second half of the schedule
        spread_s = longest_s - self._without_slot % max(1, longest_s // 2)
        return min(MAX_RETRY_AFTER_S, math.ceil(max(MIN_RETRY_AFTER_S, wait_s, spread_s)))
