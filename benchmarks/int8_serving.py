"""The server in int8 compared with float32: responses per second, and CPU time by thread.

python -m benchmarks.int8_serving PHOTOS
"""

import argparse
import os
import re
import statistics
import urllib.request
from pathlib import Path

from benchmarks.load import Load, closed_loop
from benchmarks.measure import report
from benchmarks.server import post_when_ready, serving

CONNECTIONS, SECONDS, ROUNDS = 16, 8.0, 3
TICKS = os.sysconf("SC_CLK_TCK")


def spent(url: str) -> dict[str, float]:
    """CPU time so far, in seconds: of the server's threads by purpose, and of its decoders."""
    metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
    busy = re.search(r'^rednet_device_busy_seconds_total{device="cpu"} (\S+)', metrics, re.MULTILINE)
    seconds = {"event loop": 0.0, "network": 0.0, "decoders": 0.0}
    for process in Path("/proc").glob("[0-9]*"):
        command = (process / "cmdline").read_bytes()
        if b"rednet.service.decoding.worker" in command:
            seconds["decoders"] += _processor_s(process)
        elif b"rednet\0serve" in command:
            for thread in (process / "task").iterdir():
                seconds["event loop" if thread.name == process.name else "network"] += _processor_s(thread)
    return seconds | {"busy": float(busy[1]) if busy else 0.0}


def _processor_s(task: Path) -> float:
    user, system = (task / "stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / TICKS


def measured(precision: str, photos: list[bytes]) -> dict[str, float]:
    with serving("--precision", precision) as base:
        load = Load(f"{base}/v1/predict", photos)
        post_when_ready(f"{base}/v1/predict", photos[0])
        closed_loop(load, CONNECTIONS, 2.0)
        before = spent(base)
        answers = closed_loop(load, CONNECTIONS, SECONDS)
        after = spent(base)
    count = len(answers.ok())
    each = {f"{name}, ms a photo": 1000 * (after[name] - before[name]) / count for name in before if name != "busy"}
    sender = {"sender, ms a photo": 1000 * answers.sender_s / count}
    rate = {"answers/s": count / SECONDS, "p50 ms": 1000 * statistics.median(answers.ok())}
    return rate | each | sender | {"network at work": (after["busy"] - before["busy"]) / SECONDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="a folder of JPEG files")
    photos = [path.read_bytes() for path in sorted(parser.parse_args().photos.glob("*.JP*G"))]
    runs: dict[str, list[dict[str, float]]] = {"fp32": [], "int8": []}
    for _ in range(ROUNDS):
        for precision, results in runs.items():
            results.append(measured(precision, photos))
    rows = [
        {"precision": precision} | {name: statistics.median(run[name] for run in results) for name in results[0]}
        for precision, results in runs.items()
    ]
    ratios = [ours["answers/s"] / exact["answers/s"] for exact, ours in zip(runs["fp32"], runs["int8"], strict=True)]
    heading = (
        f"embedded network over HTTP, {len(photos)} JPEG photos, {CONNECTIONS} connections, sender on the same cores"
    )
    report("int8-serving", heading, rows, ratio=statistics.median(ratios))
    print(f"int8 / float32, median of {ROUNDS} pairs: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
