"""A server in a process of its own that measures how long its event loop is held: python -m tests.watched_server

Writes its port; then, for every empty line that comes on standard input, the longest pause since the last one, in
seconds. After a line `hold` it holds the loop itself, for `HELD_S`.
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
from collections.abc import Mapping, Sequence

import numpy as np

from rednet.service.engine.transfer import Finished
from rednet.service.observability import log
from rednet.service.types import ExplainSpec, Pixels, RunnerOutput, Running
from tests.servers import FakeRunner, ServerThread

HELD_S = 0.02
CLASSES, FEATURES, GRID = 1000, 2048, 56  # of an ImageNet network: answers of 256 images have megabytes


class WideRunner(FakeRunner):
    """Its answers are as large as those of the largest networks."""

    def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
        random = np.random.default_rng(0)
        logits, features = (random.random((len(pixels), width), np.float32) for width in (CLASSES, FEATURES))
        return Finished(RunnerOutput(logits, features, dict.fromkeys(specs, random.random((GRID, GRID), np.float32))))


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


def hold() -> None:
    """Hold the event loop, to see that it is noticed."""
    until_s = time.thread_time() + HELD_S
    while time.thread_time() < until_s:
        pass


def main() -> None:
    log.configure("error", "text")
    watch = PauseWatch()
    classes = [str(index) for index in range(CLASSES)]
    with ServerThread(WideRunner(), classes=classes, request_timeout_s=60) as running:
        running.call_soon(watch.start)
        print(running.url.rpartition(":")[2], flush=True)
        for line in sys.stdin:
            if line == "hold\n":
                running.call_soon(hold)
            else:
                print(watch.reset(), flush=True)


if __name__ == "__main__":
    main()
