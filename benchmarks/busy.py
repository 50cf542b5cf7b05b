"""Latency of one photo while other processes keep every core busy: threads that share an image must not spin."""

import multiprocessing
import os
import statistics
import time

import torch

from benchmarks.measure import report
from benchmarks.network import network
from rednet import Prepared, prepare

CALLS = 60


def spin() -> None:
    """Keep a core busy until the process is killed."""
    while True:
        pass


def latencies_ms(run: Prepared, pixels: torch.Tensor) -> list[float]:
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        run(pixels)
        times.append(1000 * (time.perf_counter() - started))
    return sorted(times)


def main() -> None:
    run = prepare(network("rednet50"), device="cpu")
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    rows = []
    quiet = latencies_ms(run, pixels)
    others = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in os.sched_getaffinity(0)]
    for other in others:
        other.start()
    time.sleep(3)  # until they run
    busy = latencies_ms(run, pixels)
    for other in others:
        other.kill()
    for name, times in (("quiet", quiet), ("busy", busy)):
        rows.append(
            {"cores": name, "p50 ms": statistics.median(times), "p95 ms": times[int(0.95 * CALLS)], "max ms": times[-1]}
        )
    ratio = statistics.median(busy) / statistics.median(quiet)
    report("busy", f"rednet50, batch 1, {len(others)} other processes that never pause", rows, ratio=ratio)
    print(f"busy / quiet: {ratio:.2f}")


if __name__ == "__main__":
    main()
