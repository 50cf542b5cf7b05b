"""This server compared with LitServe, mosec and plain FastAPI: the same photos, decoder, network and cores.

python -m benchmarks.serving PHOTOS [--rounds N] [--seconds S]

The servers run in turn, in several rounds, and medians are compared. The null model shows the cost of the servers
themselves. The network is also measured without a server, on the cores that the sender leaves. In the open loop,
latency counts from when a request was due.
"""

import argparse
import base64
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.baselines.shared import MAX_BATCH, decoded, network
from benchmarks.load import Answers, Load, closed_loop, open_loop
from benchmarks.measure import RESULTS, report
from rednet.service.system.cores import usable_cores

CONNECTIONS = 32
PORT = 9310
SHARES = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0)  # of this server's capacity, in the open loop
MAX_MEDIAN_S = 2.0  # a server with a larger median latency is not loaded more


class Baseline(NamedTuple):
    """A server, and the format of its requests."""

    name: str
    module: str
    path: str
    json: bool = False  # photos are sent as base64
    workers: int | None = None

    def load(self, photos: Sequence[bytes]) -> Load:
        bodies = [self._body(photo) for photo in photos] if self.json else photos
        kind = "application/json" if self.json else "image/jpeg"
        return Load(f"http://127.0.0.1:{PORT}{self.path}", bodies, content_type=kind)

    def _body(self, photo: bytes) -> bytes:
        text = base64.b64encode(photo).decode()
        return json.dumps({"images": [text]} if self.module == "ours" else {"image": text}).encode()


BASELINES = (
    Baseline("RedNet Serve", "ours", "/v1/predict"),
    Baseline("RedNet Serve, base64 in JSON", "ours", "/v1/predict", json=True),
    Baseline("FastAPI, no batches", "with_fastapi", "/predict"),
    Baseline("LitServe, 1 worker, base64 in JSON", "with_litserve", "/predict", json=True, workers=1),
    Baseline("LitServe, 2 workers, base64 in JSON", "with_litserve", "/predict", json=True, workers=2),
    Baseline("mosec, 1 decoder", "with_mosec", "/inference", workers=1),
    Baseline("mosec, 2 decoders", "with_mosec", "/inference", workers=2),
)


@contextmanager
def warm_load(baseline: Baseline, model: str, photos: Sequence[bytes]) -> Iterator[Load]:
    """A load on a server that was just started and warmed up. No other server runs meanwhile, because some are busy
    even when idle."""
    load = baseline.load(photos)
    command = [sys.executable, "-m", f"benchmarks.baselines.{baseline.module}", "--model", model, "--port", str(PORT)]
    if baseline.workers:
        command += ["--workers", str(baseline.workers)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while not closed_loop(load, 1, 0.5).ok():
            time.sleep(0.5)
        closed_loop(load, CONNECTIONS, 2.0)
        yield load
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.wait()


def offline_rate(photos: Sequence[bytes], model: str, seconds: float) -> float:
    """Photos per second without a server: batches decoded by as many threads as there are cores, then predicted."""
    run = network(model)
    with ThreadPoolExecutor(usable_cores()) as pool:
        run(list(pool.map(decoded, photos[:MAX_BATCH])))
        begins, count = time.monotonic(), 0
        while time.monotonic() < begins + seconds:
            batch = [photos[(count + index) % len(photos)] for index in range(MAX_BATCH)]
            run(list(pool.map(decoded, batch)))
            count += MAX_BATCH
        return count / (time.monotonic() - begins)


def rates(photos: Sequence[bytes], model: str, rounds: int, seconds: float) -> list[dict[str, object]]:
    """A row for each server: its medians over all rounds, in the closed loop."""
    runs: dict[str, list[Answers]] = {baseline.name: [] for baseline in BASELINES}
    alone: list[float] = []
    for _ in range(rounds):
        for baseline in BASELINES:
            with warm_load(baseline, model, photos) as load:
                runs[baseline.name].append(closed_loop(load, CONNECTIONS, seconds))
        alone.append(offline_rate(photos, model, seconds))
    offline = statistics.median(alone)
    medians = {name: statistics.median(len(each.ok()) / seconds for each in answers) for name, answers in runs.items()}
    first = next(iter(medians.values()))
    rows: list[dict[str, object]] = []
    for name, answers in runs.items():
        rate = medians[name]
        sender = statistics.median(each.sender_s / seconds for each in answers)
        rows.append(
            {
                "server": name,
                "photos/s": rate,
                "p50 ms": 1000 * statistics.median(statistics.median(each.ok()) for each in answers),
                "p99 ms": 1000 * statistics.median(_p99(each) for each in answers),
                "failed": sum(len(each) - len(each.ok()) for each in answers),
                "sender's cores": sender,
                "of offline on the other cores": rate / (offline * (1 - sender / usable_cores())),
                "first / this": first / rate,
            }
        )
    return [*rows, {"server": "offline, no server", "photos/s": offline}]


def curves(photos: Sequence[bytes], capacity: float, seconds: float) -> list[dict[str, object]]:
    """A row for each server and rate, in the open loop."""
    rows: list[dict[str, object]] = []
    for baseline in BASELINES:
        if baseline.workers == 1:
            continue
        with warm_load(baseline, "rednet", photos) as load:
            for share in SHARES:
                answers = open_loop(load, share * capacity, seconds)
                times = answers.ok()
                row = {"server": baseline.name, "offered/s": share * capacity, "failed": len(answers) - len(times)}
                rows.append(row | {"p50 ms": 1000 * statistics.median(times), "p99 ms": 1000 * _p99(answers)})
                if statistics.median(times) > MAX_MEDIAN_S:
                    break
    return rows


def _p99(answers: Answers) -> float:
    times = answers.ok()
    return times[int(0.99 * len(times))]


def picture(rows: Sequence[dict[str, object]]) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for index, name in enumerate(dict.fromkeys(str(row["server"]) for row in rows)):
        own = [row for row in rows if row["server"] == name]
        offered = [row["offered/s"] for row in own]
        axes.plot(offered, [row["p50 ms"] for row in own], "o-", color=f"C{index}", label=name)
        axes.plot(offered, [row["p99 ms"] for row in own], ".:", color=f"C{index}")
    axes.set(yscale="log", xlabel="photos offered a second", ylabel="ms from when due; line: median, dots: p99")
    axes.set_title("RedNet-26 over HTTP on two cores, shared with the sender", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(RESULTS / "serving.png", dpi=120)
    print(f"{RESULTS / 'serving'}.png", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="a folder of JPEG files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--model", choices=("null", "rednet"), help="default: both")
    options = parser.parse_args()
    photos = [path.read_bytes() for path in sorted(options.photos.glob("*.JP*G"))][:64]
    for model in [options.model] if options.model else ("null", "rednet"):
        rows = rates(photos, model, options.rounds, options.seconds)
        heading = f"{model} model, {len(photos)} JPEG photos, {CONNECTIONS} connections, sender on the same cores"
        report(f"serving-{model}", heading, rows)
        if model == "rednet":
            capacity = rows[0]["photos/s"]
            assert isinstance(capacity, float)
            points = curves(photos, capacity, options.seconds)
            report("serving-open", "the same, requests at given rates", points)
            picture(points)


if __name__ == "__main__":
    main()
