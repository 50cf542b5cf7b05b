"""This server compared with LitServe, mosec and plain FastAPI: the same photos, decoder, network and cores.

python -m benchmarks.serving PHOTOS [--model null] [--rounds N] [--seconds S]
python -m benchmarks.serving PHOTOS --model null --ours --front-ends 1,2,4,8 --connections 256 --senders 8

The servers run in turn, in several rounds, and medians are compared. The null model shows the cost of the servers
themselves. The network is also measured without a server, on the cores that the sender leaves. In the open loop,
latency counts from when a request was due.

The second table has the CPU time per photo of each role, and how many photos a second one process of that role could
carry if others did not limit it. That tells what bounds a server on a machine with more cores than this one. A process
with two roles has one row.
"""

import argparse
import asyncio
import base64
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.baselines.shared import MAX_BATCH, decoded, network
from benchmarks.load import Answers, Load, closed_loop, open_loop
from benchmarks.measure import RESULTS, report
from benchmarks.roles import cpu_s, descendants
from rednet.service.system.cores import usable_cores

CONNECTIONS = 32
PORT = 9310
SHARES = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0)  # of this server's capacity, in the open loop
MAX_MEDIAN_S = 2.0  # a server with a larger median latency is not loaded more
END_S = 5.0  # how long a server may take to end
MIN_CPU_MS = 0.001  # per photo; processes that take less only wait


class Baseline(NamedTuple):
    """A server, and the format of its requests."""

    name: str
    module: str
    path: str
    json: bool = False  # photos are sent as base64
    workers: int | None = None
    front_ends: int | None = None
    role: str = "others"  # of the process that starts the other ones

    def load(self, photos: Sequence[bytes]) -> Load:
        bodies = [self._body(photo) for photo in photos] if self.json else photos
        kind = "application/json" if self.json else "image/jpeg"
        return Load(f"http://127.0.0.1:{PORT}{self.path}", bodies, content_type=kind)

    def _body(self, photo: bytes) -> bytes:
        text = base64.b64encode(photo).decode()
        return json.dumps({"images": [text]} if self.module == "ours" else {"image": text}).encode()


def ours(front_ends: int) -> Baseline:
    """This project's server."""
    if front_ends == 1:
        return Baseline("RedNet Serve", "ours", "/v1/predict", role="front end and engine")
    return Baseline(f"RedNet Serve, {front_ends} front ends", "ours", "/v1/predict", front_ends=front_ends)


BASELINES = (
    Baseline("RedNet Serve, base64 in JSON", "ours", "/v1/predict", json=True, role="front end and engine"),
    Baseline("FastAPI, no batches", "with_fastapi", "/predict", role="all in one"),
    Baseline("LitServe, 1 worker, base64 in JSON", "with_litserve", "/predict", json=True, workers=1),
    Baseline("LitServe, 2 workers, base64 in JSON", "with_litserve", "/predict", json=True, workers=2),
    Baseline("mosec, 1 decoder", "with_mosec", "/inference", workers=1),
    Baseline("mosec, 2 decoders", "with_mosec", "/inference", workers=2),
)


class Started(NamedTuple):
    """A server that was started and warmed up."""

    baseline: Baseline
    load: Load
    pid: int

    def cpu_s(self) -> Mapping[str, Sequence[float]]:
        return cpu_s(self.pid, self.baseline.role)


@contextmanager
def warm_server(baseline: Baseline, model: str, photos: Sequence[bytes]) -> Iterator[Started]:
    """A server that was just started and warmed up. No other server runs meanwhile, because some are busy even when
    idle."""
    load = baseline.load(photos)
    command = [sys.executable, "-m", f"benchmarks.baselines.{baseline.module}", "--model", model, "--port", str(PORT)]
    if baseline.workers:
        command += ["--workers", str(baseline.workers)]
    if baseline.front_ends:
        command += ["--frontends", str(baseline.front_ends)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not _answers(baseline.load(photos[:1])):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
            time.sleep(0.5)
        closed_loop(load, CONNECTIONS, 2.0)
        yield Started(baseline, load, process.pid)
    finally:
        _end(process)


def _answers(load: Load) -> bool:
    """Whether a server answers a photo."""
    asyncio.run(load.ask(0, time.monotonic()))
    return load.answers[0].status == 200


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a server with all processes that it has started."""
    pids = descendants(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    for pid in (process.pid, *pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
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


class Run(NamedTuple):
    """A server's answers in a closed loop, and what they cost.

    Attributes:
        answers: all of them.
        cpu_ms: of each process, per photo, by role.
    """

    answers: Answers
    cpu_ms: Mapping[str, Sequence[float]]


def run(server: Started, connections: int, seconds: float, senders: int) -> Run:
    before = server.cpu_s()
    answers = closed_loop(server.load, connections, seconds, senders)
    after = server.cpu_s()
    spent = {role: zip(before[role], after[role], strict=True) for role in before}
    photos = len(answers.ok())
    return Run(
        answers, {role: [1000 * (end - begin) / photos for begin, end in times] for role, times in spent.items()}
    )


def rates(
    baselines: Sequence[Baseline], photos: Sequence[bytes], model: str, options: argparse.Namespace
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """A row for each server, and one for each of its roles: medians over all rounds, in the closed loop."""
    runs: dict[str, list[Run]] = {baseline.name: [] for baseline in baselines}
    alone: list[float] = []
    seconds = options.seconds
    for _ in range(options.rounds):
        for baseline in baselines:
            with warm_server(baseline, model, photos) as server:
                runs[baseline.name].append(run(server, options.connections, seconds, options.senders))
        alone.append(offline_rate(photos, model, seconds))
    offline = statistics.median(alone)
    medians = {name: statistics.median(len(each.answers.ok()) / seconds for each in own) for name, own in runs.items()}
    first = next(iter(medians.values()))
    rows: list[dict[str, object]] = []
    for name, rate in medians.items():
        answers = [each.answers for each in runs[name]]
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
    rows.append({"server": "offline, no server", "photos/s": offline})
    return rows, [row for name, own in runs.items() for row in roles(name, own)]


def roles(name: str, runs: Sequence[Run]) -> Iterator[dict[str, object]]:
    """A row for each role of a server."""
    for role in sorted(runs[0].cpu_ms):
        each_ms = [each.cpu_ms[role] for each in runs]
        cpu_ms = statistics.median(map(sum, each_ms))
        if cpu_ms >= MIN_CPU_MS:
            yield {
                "server": name,
                "role": role,
                "processes": len(each_ms[0]),
                "CPU ms a photo": cpu_ms,
                "one carries photos/s": 1000 / cpu_ms,
            }


def curves(photos: Sequence[bytes], capacity: float, seconds: float) -> list[dict[str, object]]:
    """A row for each server and rate, in the open loop."""
    rows: list[dict[str, object]] = []
    for baseline in (ours(1), *BASELINES):
        if baseline.workers == 1:
            continue
        with warm_server(baseline, "rednet", photos) as server:
            for share in SHARES:
                answers = open_loop(server.load, share * capacity, seconds)
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
    parser.add_argument(
        "--front-ends", default="1,2", help="how many this project's server has, in turn (default: 1,2)"
    )
    parser.add_argument("--ours", action="store_true", help="only this project's server")
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--senders", type=int, default=1, help="processes that send; one is enough for 3,000 photos/s")
    options = parser.parse_args()
    baselines = [ours(int(count)) for count in options.front_ends.split(",")]
    if not options.ours:
        baselines += BASELINES
    photos = [path.read_bytes() for path in sorted(options.photos.glob("*.JP*G"))][:64]
    for model in [options.model] if options.model else ("null", "rednet"):
        rows, by_role = rates(baselines, photos, model, options)
        heading = (
            f"{model} model, {len(photos)} JPEG photos, {options.connections} connections, on the cores of the sender"
        )
        report(f"serving-{model}", heading, rows)
        report(f"serving-{model}-roles", "the same, CPU time by role", by_role)
        if model == "rednet" and not options.ours:
            capacity = rows[0]["photos/s"]
            assert isinstance(capacity, float)
            points = curves(photos, capacity, options.seconds)
            report("serving-open", "the same, requests at given rates", points)
            picture(points)


if __name__ == "__main__":
    main()
