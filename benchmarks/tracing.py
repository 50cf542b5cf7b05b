"""What tracing costs: CPU time per request of a server with the null model, front end and engine in one process.

python -m benchmarks.tracing PHOTOS [--rounds N] [--seconds S] [--before CHECKOUT]

All servers run at once, and are loaded in turn. Each is compared with the first one in the same round, because the
speed of a shared machine drifts. The decoders are not counted. The receiver of the spans answers without looking at
them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from benchmarks.load import Load, closed_loop
from benchmarks.measure import report

PORT, RECEIVER = 9330, 9329
CONNECTIONS = 8
SAMPLING = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio"}
ON: dict[str, str] = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{RECEIVER}", **SAMPLING}
VARIANTS: Mapping[str, dict[str, str]] = {
    "off": {},
    "1% of requests traced": ON | {"OTEL_TRACES_SAMPLER_ARG": "0.01"},
    "all requests traced": ON | {"OTEL_TRACES_SAMPLER_ARG": "1"},
}


class Receiver(BaseHTTPRequestHandler):
    """Receives spans, and drops them."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def server(folder: Path, port: int, variables: dict[str, str]) -> Iterator[int]:
    """A server from a checkout; gives its process id."""
    command = [sys.executable, "-m", "benchmarks.baselines.ours", "--model", "null", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": f"{folder / 'src'}:{folder}"} | variables
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL)
    try:
        while not is_ready(port):
            if process.poll() is not None:
                raise RuntimeError(f"the server in {folder} ended with status {process.returncode}")
            time.sleep(0.2)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def cpu_s(pid: int) -> float:
    """CPU time so far of all threads of a process."""
    return sum(int(each.read_text().split()[0]) for each in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def cpu_ms_per_request(pid: int, port: int, photos: Sequence[bytes], seconds: float) -> float:
    before = cpu_s(pid)
    answers = closed_loop(Load(f"http://127.0.0.1:{port}/v1/predict", photos), CONNECTIONS, seconds)
    assert all(answer.status == 200 for answer in answers)
    return 1000 * (cpu_s(pid) - before) / len(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    options = parser.parse_args()
    photos = [path.read_bytes() for path in sorted(options.photos.glob("*.jpg"))]
    here = Path(__file__).resolve().parents[1]
    variants = {name: (here, variables) for name, variables in VARIANTS.items()}
    if options.before:
        variants = {"off, before": (options.before.resolve(), VARIANTS["off"]), **variants}
    receiver = ThreadingHTTPServer(("127.0.0.1", RECEIVER), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    with ExitStack() as stack:
        started = [
            (stack.enter_context(server(folder, PORT + index, variables)), PORT + index)
            for index, (folder, variables) in enumerate(variants.values())
        ]
        for pid, port in started:
            cpu_ms_per_request(pid, port, photos, 2.0)  # warm up
        rounds = []
        for number in range(options.rounds):
            order = started[number % len(started) :] + started[: number % len(started)]
            spent = {port: cpu_ms_per_request(pid, port, photos, options.seconds) for pid, port in order}
            rounds.append([spent[port] for _, port in started])
    rows = [
        {
            "tracing": name,
            "CPU time per request [ms]": statistics.median(spent[index] for spent in rounds),
            "to the first": statistics.median(spent[index] / spent[0] for spent in rounds),
        }
        for index, name in enumerate(variants)
    ]
    report("tracing", "CPU time of the server's process per request, null model", rows, rounds=options.rounds)


if __name__ == "__main__":
    main()
