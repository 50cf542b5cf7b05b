"""A server in a process of its own that measures how long its event loop is held: python -m tests.watched_server

Writes its port; then, for every line that comes on standard input, the longest pause since the last line, in seconds.
A pause is the time from one iteration of the event loop to the next: meanwhile nobody else is served. The time that the
loop's thread was ready to run, but the machine ran others, is subtracted; waiting for another thread to release the
interpreter is not. CPU time of the whole process is a second bound, where the machine is so busy that this thread, too,
has to wait for a core.
"""

import asyncio
import os
import sys
import threading
import time

from service import log
from tests.servers import FakeRunner, ServerThread


class PauseWatch:
    """Looks at the clocks in every iteration of an event loop."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._schedule = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
        self._before = self._clocks()
        self._tick()

    def _clocks(self) -> tuple[float, float]:
        waited_ns = int(os.pread(self._schedule, 100, 0).split()[1])  # for a core
        return time.perf_counter() - waited_ns / 1e9, time.process_time()

    def _tick(self) -> None:
        now = self._clocks()
        self.longest_s = max(self.longest_s, min(now[0] - self._before[0], now[1] - self._before[1]))
        self._before = now
        self._loop.call_soon(self._tick)

    def reset(self) -> float:
        """The longest pause since the last reset."""
        longest_s, self.longest_s = self.longest_s, 0.0
        return longest_s


def main() -> None:
    log.configure("error", "text")
    watch = PauseWatch()
    with ServerThread(FakeRunner(), request_timeout_s=60, log_level="error") as running:
        running.call_soon(watch.start)
        print(running.url.rpartition(":")[2], flush=True)
        for _ in sys.stdin:
            print(watch.reset(), flush=True)


if __name__ == "__main__":
    main()
