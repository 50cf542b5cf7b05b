"""Detects a device that hangs."""

import logging
import sys
import threading
import time
import traceback

log = logging.getLogger(__name__)

HUNG_FACTOR = 20  # work that takes this many times as long as expected will never end
MAX_GAP_S = 1.0  # between two checks, counted at most; a running server checks ten times a second


class Watchdog:
    """Monitors the work of a thread. The thread calls `begin` and `end`; another thread calls `check` regularly.

    While the process does not run (it is suspended, its container is frozen, the machine sleeps, or others use all
    cores), there are no checks, and the monitored thread makes no progress. Such time does not count.

    Args:
        thread: to be monitored.
        hung_s: minimum time after which work counts as hung.
    """

    def __init__(self, thread: threading.Thread, hung_s: float) -> None:
        self._thread, self._hung_s = thread, hung_s
        self._work: tuple[float, float] | None = None  # start time and maximum duration of the current work
        self._checked: tuple[float, float] | None = None  # the work at the last check
        self._worked_s = 0.0  # time that counts
        self._checked_at = 0.0
        self.hung = False

    def begin(self, expected_s: float, factor: float = 1.0) -> None:
        """Work begins that should take `expected_s`; `factor` multiplies the minimum time until it counts as hung."""
        self._work = (time.monotonic(), max(factor * self._hung_s, HUNG_FACTOR * expected_s))

    def end(self) -> None:
        self._work = None

    def check(self) -> bool:
        """Whether the work hangs, or has hung before. Logs the first hang with the stack of the thread."""
        work, now = self._work, time.monotonic()
        if work is not None and work is self._checked:
            self._worked_s += min(MAX_GAP_S, now - self._checked_at)
            if self._worked_s > work[1] and not self.hung:
                self.hung = True
                log.error("the device hangs: busy for %.0f s; its thread is at\n%s", self._worked_s, self._stack())
        else:
            self._checked, self._worked_s = work, 0.0
        self._checked_at = now
        return self.hung

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)).rstrip()
