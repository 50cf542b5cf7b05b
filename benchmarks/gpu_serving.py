"""Throughput of a server with a GPU, compared with the decode rate of the CPU."""

import http.client
import io
import multiprocessing
import os
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from benchmarks.measure import report
from benchmarks.server import post_when_ready, serving
from rednet import Checkpoint, Preprocess, RedNet, save_checkpoint
from rednet.model.io.labels import numbered_labels
from rednet.service.decoding.decode import decode_image

T = TypeVar("T")
DURATION_S = 15.0
CONNECTIONS = (1, 32, 128)
PROCESSES = 4  # client processes: one interpreter cannot send requests as fast as the server answers


def random_photos(count: int = 64) -> list[bytes]:
    """Smooth pictures of an everyday size, with files about as large as those of photos."""
    files = []
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(content, "JPEG", quality=95)
        files.append(content.getvalue())
    return files


def decoded(photos: list[bytes]) -> int:
    """Decode for some seconds, and return the number of photos."""
    ends, count = time.monotonic() + DURATION_S / 3, 0
    while time.monotonic() < ends:
        decode_image(photos[count % len(photos)], Preprocess(), 50_000_000)
        count += 1
    return count


@contextmanager
def started_together(processes: int, work: Callable[..., T], *arguments: object) -> Iterator[list[Future[T]]]:
    """Run the same work in several processes, which start when the last one has finished its imports."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(processes + 1)
    with ProcessPoolExecutor(processes, context, ready.wait) as pool:
        futures = [pool.submit(work, *arguments) for _ in range(processes)]
        ready.wait()
        yield futures


def decode_rate(photos: list[bytes]) -> float:
    """Photos per second that all cores decode together, without other work."""
    with started_together(len(os.sched_getaffinity(0)), decoded, photos) as counts:
        return sum(count.result() for count in counts) / (DURATION_S / 3)


def ask(address: str, photos: list[bytes], connections: int) -> list[float]:
    """The latency of every request on several connections, one request after another on each."""
    times: list[float] = []
    ends = time.monotonic() + DURATION_S

    def loop(start: int) -> None:
        connection = http.client.HTTPConnection(address)
        for turn in range(start, 10**9):
            began = time.monotonic()
            if began > ends:
                return
            connection.request("POST", "/v1/predict", photos[turn % len(photos)])
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
            times.append(time.monotonic() - began)

    threads = [threading.Thread(target=loop, args=(index,)) for index in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def counters(url: str) -> dict[str, float]:
    """Total busy and starved seconds of all devices."""
    lines = urllib.request.urlopen(f"{url}/metrics").read().decode().splitlines()
    return {
        name: sum(float(line.split()[-1]) for line in lines if line.startswith(f"rednet_device_{name}_seconds_total{{"))
        for name in ("busy", "starved")
    }


def measure_serving(net: RedNet, folder: Path | None, name: str) -> None:
    photos = [path.read_bytes() for path in sorted(folder.glob("*.JP*G"))] if folder else random_photos()
    decoding = decode_rate(photos)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "rednet50.safetensors"
        save_checkpoint(path, Checkpoint(net=net, labels=numbered_labels(net.config.num_classes), name="rednet50"))
        with serving("--checkpoint", path, "--max-queue", 1024) as url:
            post_when_ready(f"{url}/v1/predict", photos[0])
            rows = [measured(url, photos, connections) | {"host decodes/s": decoding} for connections in CONNECTIONS]
    report(name, f"rednet50 over HTTP, {len(photos)} JPEG photos", rows)


def measured(url: str, photos: list[bytes], connections: int) -> dict[str, object]:
    processes = min(PROCESSES, connections)
    with started_together(processes, ask, urlsplit(url).netloc, photos, connections // processes) as runs:
        before, started = counters(url), time.monotonic()
        times = sorted(time_s for run in runs for time_s in run.result())
        after, took_s = counters(url), time.monotonic() - started
    return {
        "connections": connections,
        "answers/s": len(times) / DURATION_S,
        "p50 ms": 1000 * times[len(times) // 2],
        "p99 ms": 1000 * times[int(0.99 * len(times))],
        "device busy": (after["busy"] - before["busy"]) / took_s,
        "device starved": (after["starved"] - before["starved"]) / took_s,
    }
