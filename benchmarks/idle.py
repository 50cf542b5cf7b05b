"""Latency of other clients with five hundred idle connections and one new slow upload per second.

python -m benchmarks.idle PHOTOS [--checkpoint F]
"""

import argparse
import asyncio
import multiprocessing
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.load import Answers, Load, open_loop
from benchmarks.measure import report
from benchmarks.server import post_when_ready, serving

IDLE = 500
UPLOAD_S, UPLOAD_BYTES = 10.0, 10  # duration and size of a slow upload
RATE = 10.0  # requests per second of the other clients
ROUNDS, SECONDS = 5, 10.0


async def hold(url: str, opened: "multiprocessing.synchronize.Event") -> None:
    """Open the connections with one request on each, then start slow uploads until the process is killed."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80

    async def idle() -> asyncio.StreamWriter:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: idle\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        return writer

    async def upload() -> None:
        _, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST /v1/predict HTTP/1.1\r\nHost: slow\r\nContent-Length: %d\r\n\r\n" % UPLOAD_BYTES)
        for _ in range(UPLOAD_BYTES):
            await asyncio.sleep(UPLOAD_S / UPLOAD_BYTES)
            writer.write(b"x")
        writer.close()

    connections = [await idle() for _ in range(IDLE)]
    opened.set()
    async with asyncio.TaskGroup() as group:
        while connections:
            group.create_task(upload())
            await asyncio.sleep(1)


def run_hold(url: str, opened: "multiprocessing.synchronize.Event") -> None:
    asyncio.run(hold(url, opened))


@contextmanager
def held(url: str) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    opened = context.Event()
    process = context.Process(target=run_hold, args=(url, opened))
    process.start()
    opened.wait()
    try:
        yield
    finally:
        process.kill()
        process.join()


def row(what: str, runs: list[Answers]) -> dict[str, object]:
    return {
        "what": what,
        "p50 ms": 1000 * statistics.median(statistics.median(each.ok()) for each in runs),
        "p95 ms": 1000 * statistics.median(each.ok()[int(0.95 * len(each.ok()))] for each in runs),
        "failed": sum(len(each) - len(each.ok()) for each in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="a folder of JPEG files")
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    photos = [path.read_bytes() for path in sorted(options.photos.glob("*.JP*G"))]
    alone: list[Answers] = []
    beside: list[Answers] = []
    with serving(*(["--checkpoint", options.checkpoint] if options.checkpoint else [])) as base:
        url = f"{base}/v1/predict"
        post_when_ready(url, photos[0])
        open_loop(Load(url, photos), RATE, 3.0)
        for _ in range(ROUNDS):
            alone.append(open_loop(Load(url, photos), RATE, SECONDS))
            with held(base):
                beside.append(open_loop(Load(url, photos), RATE, SECONDS))
    rows = [row("alone", alone), row(f"beside {IDLE} idle connections and slow uploads", beside)]
    ratio = statistics.median(
        statistics.median(b.ok()) / statistics.median(a.ok()) for a, b in zip(alone, beside, strict=True)
    )
    heading = f"{RATE:.0f} requests a second, {len(photos)} JPEG photos, senders on the same cores"
    report("idle", heading, rows, ratio=ratio)
    print(f"median latency beside / alone, median of {ROUNDS} pairs: {ratio:.3f}")


if __name__ == "__main__":
    main()
