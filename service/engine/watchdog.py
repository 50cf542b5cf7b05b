"""Whether the device hangs: works on one thing for so long that it will never end."""

import logging
import sys
import threading
import time
import traceback

log = logging.getLogger(__name__)

HUNG_FACTOR = 20  # what takes so many times as long as it should will not end: the process should be restarted
MAX_GAP_S = 1.0  # of the time between two looks that counts; a process that runs looks ten times a second


class HangWatch:
    """Watches the work of a thread. The thread says what it begins and ends; another one looks, again and again.

    While the process does not run (it is suspended, its container is frozen, the machine sleeps, or others take all
    cores) nobody looks, and the device's thread cannot go on. That time does not count.

    Args:
        thread: that works.
        hung_s: work is not taken for hanging sooner than this.
    """

    def __init__(self, thread: threading.Thread, hung_s: float) -> None:
        self._thread, self._hung_s = thread, hung_s
        self._work: tuple[float, float] | None = None  # since when, and the longest it may take
        self._looked_at: tuple[float, float] | None = None  # the same work, when it was looked at
        self._worked_s = 0.0  # time that counts
        self._seen = 0.0  # when it was looked at
        self.hung = False

    def begin(self, expected_s: float, patience: float = 1.0) -> None:
        """Something begins that should take so long; `patience` multiplies the shortest time after which it hangs."""
        self._work = (time.monotonic(), max(patience * self._hung_s, HUNG_FACTOR * expected_s))

    def end(self) -> None:
        self._work = None

    def look(self) -> bool:
        """Whether the work hangs, or has hung before. The log says so once, with the stack of the thread."""
        work, now = self._work, time.monotonic()
        if work is not None and work is self._looked_at:
            self._worked_s += min(MAX_GAP_S, now - self._seen)
            if self._worked_s > work[1] and not self.hung:
                self.hung = True
                log.error("the device hangs: no end after %.0f s; its thread is at\n%s", self._worked_s, self._stack())
        else:
            self._looked_at, self._worked_s = work, 0.0
        self._seen = now
        return self.hung

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)).rstrip()
