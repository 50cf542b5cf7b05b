"""Three times more requests than the server can answer: latency of accepted requests, and success of retries.

python -m benchmarks.overload PHOTOS [--checkpoint F] [--frontends N]

First for half a minute. Then, after a pause, for ten seconds, in which each rejected request is retried once after its
`Retry-After`. The first retries compete with the overload.

"Offered" is the predicted device time of all requests, refused ones included: the signal to scale by.
"""

import argparse
import statistics
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from benchmarks.load import Answer, Load, closed_loop, open_loop
from benchmarks.measure import report
from benchmarks.server import post_when_ready, serving
from rednet.service.system.cores import usable_cores

CONNECTIONS, SECONDS, BURST_S = 16, 30.0, 10.0
TIMES_CAPACITY = 3
DEADLINE_MS = 1000
OFFERED, BUSY = "rednet_offered_seconds_total", "rednet_device_busy_seconds_total"


def metrics(url: str, *wanted: str) -> dict[str, float]:
    """The values of metrics by name, each summed over its labels."""
    found = dict.fromkeys(wanted, 0.0)
    for line in urllib.request.urlopen(f"{url}/metrics").read().decode().splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in found:
            found[name] += float(line.rpartition(" ")[2])
    return found


class DeviceTime:
    """The device time that is asked for and used per second, since the object was made."""

    def __init__(self, url: str) -> None:
        self._url, self._begins, self._before = url, time.monotonic(), metrics(url, OFFERED, BUSY)

    def rates(self) -> tuple[float, float]:
        """Seconds of device time per second: offered, and busy."""
        now, elapsed = metrics(self._url, OFFERED, BUSY), time.monotonic() - self._begins
        offered, busy = ((now[name] - self._before[name]) / elapsed for name in (OFFERED, BUSY))
        return offered, busy


def row(what: str, answers: Sequence[Answer], seconds: float, device: tuple[float, float]) -> dict[str, object]:
    accepted = sorted(answer.took_s for answer in answers if answer.status == 200)
    refused = [answer for answer in answers if answer.status == 429]
    return {
        "what": what,
        "sent/s": len(answers) / seconds,
        "answered/s": len(accepted) / seconds,
        "p50 ms": 1000 * statistics.median(accepted),
        "p99 ms": 1000 * accepted[int(0.99 * len(accepted))],
        "429": len(refused),
        "of them without Retry-After": sum(answer.retry_after_s is None for answer in refused),
        "other": len(answers) - len(accepted) - len(refused),
        "offered device s/s": device[0],
        "busy device s/s": device[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="a folder of JPEG files")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--frontends", default="auto", help="HTTP processes of the server (default: auto)")
    options = parser.parse_args()
    photos = [path.read_bytes() for path in sorted(options.photos.glob("*.JP*G"))]
    chosen = ["--frontends", options.frontends, *(["--checkpoint", options.checkpoint] if options.checkpoint else [])]
    with serving(*chosen) as base:
        url = f"{base}/v1/predict"
        post_when_ready(url, photos[0])
        closed_loop(Load(url, photos), CONNECTIONS, 3)
        device = DeviceTime(base)
        calm = closed_loop(Load(url, photos), CONNECTIONS, SECONDS / 2)
        calm_device = device.rates()
        capacity = len(calm) / (SECONDS / 2)
        offered = TIMES_CAPACITY * capacity
        device = DeviceTime(base)
        flood = open_loop(Load(url, photos, DEADLINE_MS), offered, SECONDS)
        flood_device = device.rates()
        time.sleep(30)
        device = DeviceTime(base)
        burst = open_loop(Load(url, photos, DEADLINE_MS, retry=True), offered, BURST_S)
        burst_device = device.rates()
        time.sleep(0.5)
        rows = [
            row("closed loop", calm, SECONDS / 2, calm_device),
            row(f"open loop, {TIMES_CAPACITY} times that", flood, SECONDS, flood_device),
            row("the same, with retries", burst, BURST_S, burst_device),
        ]
        after = metrics(base, "rednet_queue_depth", "rednet_backlog_seconds")  # zero on an idle server
    good = sum(answer.status == 200 for answer in flood) / SECONDS / capacity
    retried = sum(answer.status == 200 for answer in burst.retries) / len(burst.retries)
    # The sender takes CPU time from the server, and more of it during the overload. That is not the server's loss.
    cores = usable_cores() - calm.sender_s / (SECONDS / 2), usable_cores() - flood.sender_s / SECONDS
    fair = good * cores[0] / cores[1]
    heading = f"overload, deadline {DEADLINE_MS} ms, {len(photos)} JPEG photos, load from the same cores"
    report("overload", heading, rows, goodput=good, goodput_on_equal_cores=fair, retried=retried, gauges=after)
    print(f"goodput / capacity: {good:.2f}, on equal shares of the cores {fair:.2f}")
    print(f"retries that succeeded: {retried:.2f} of {len(burst.retries)}; afterwards {after}")


if __name__ == "__main__":
    main()
