"""Mixed load for a long time: does the server's memory grow?

python -m tests.soak [--minutes N] [--frontends N]    # on the embedded checkpoint; `make soak` runs an hour
"""

import argparse
import asyncio
import time
from collections import Counter

import numpy as np

from tests.chaos import OPTIONS, Mischief, assert_as_promised, assert_unharmed, right_answers, wreak
from tests.processes import memory_mb
from tests.servers import ServerProcess

EVERY_S = 10.0
REQUESTS, AT_ONCE = 100, 6  # in that time
SETTLED = 1 / 6  # of the time, after which memory has no reason to grow any more
MIN_SAMPLES = 4  # after that: a slow machine takes longer, because a line through fewer would say nothing
MOST_MB = 1.05  # in ten minutes: 1 MiB


def soak(server: ServerProcess, seconds: float, every_s: float = EVERY_S, seed: int = 0) -> float:
    """How much memory grew, in MB for ten minutes, by a line through all samples after the first sixth of the time."""
    expected = right_answers(server)
    mischief, statuses = Mischief(seed), Counter[int]()
    samples: list[tuple[float, float]] = []
    settled: list[tuple[float, float]] = []
    begins = time.monotonic()
    while (at := time.monotonic() - begins) < seconds or len(settled) < MIN_SAMPLES:
        report = asyncio.run(wreak(server.url, mischief, REQUESTS, AT_ONCE))
        assert_as_promised(report)
        statuses += report.statuses
        samples.append((at, memory_mb(server.process.pid)))
        settled = [sample for sample in samples if sample[0] >= SETTLED * seconds]
        if len(samples) % 30 == 1:
            print(f"{at / 60:5.1f} min  {samples[-1][1]:7.1f} MB  {dict(sorted(statuses.items()))}", flush=True)
        time.sleep(max(0.0, begins + at + every_s - time.monotonic()))
    assert_unharmed(server, expected)
    times, sizes = np.array(settled).T
    slope: float = np.polyfit(times, sizes, 1)[0]
    return 600 * slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--frontends", default="auto")
    options = parser.parse_args()
    with ServerProcess(*OPTIONS, "--frontends", options.frontends) as server:
        growth = soak(server, 60 * options.minutes)
    print(f"memory grew by {growth:.2f} MB in ten minutes; {MOST_MB} are allowed")
    raise SystemExit(int(growth > MOST_MB))


if __name__ == "__main__":
    main()
