"""Good requests, bad ones, and callers who leave, all at once, while decoders are killed at random; then the server
must be as if nothing had happened.

python -m tests.chaos [--requests N] [--seed S] [--frontends N]

On the embedded checkpoint; `make chaos` runs 10,000.
"""

import argparse
import asyncio
import base64
import gzip
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from rednet.service.http.connections import HEAD_TIMEOUT_S
from tests.conftest import EVERY_FORMAT, encoded, photo
from tests.http_helpers import PREDICT, predict, sample
from tests.processes import killing_decoders
from tests.servers import PATIENCE_S, ServerProcess, wait_until
from tests.test_damaged_photos import mutants

T = TypeVar("T")

OPTIONS = ("--max-queue", 32, "--max-body-mb", 2, "--max-pixels", 2_000_000)
AT_ONCE = 64
LEAVING, BAD = 0.2, 0.3  # shares of all requests
PROMISED = {200, 400, 404, 405, 408, 413, 415, 422, 429, 503, 504}
GOOD_AFTERWARDS = 100
KILL_EVERY_S = 1.5


class Request(NamedTuple):
    """The bytes of a request, and where its body begins."""

    head: bytes
    body: bytes


@dataclass
class Report:
    """What came of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    left: int = 0  # callers who did not wait
    unanswered: list[str] = field(default_factory=list)  # why, and the heads of these requests
    late: int = 0  # sent nothing for so long after connecting that they were disconnected: this process was starved
    without_retry_after: int = 0
    slowest_s: float = 0.0
    decoders_killed: int = 0


def post(body: bytes, content_type: str = "image/jpeg", path: str = PREDICT, **headers: object) -> Request:
    lines = [f"POST {path} HTTP/1.1", "Host: chaos", f"Content-Type: {content_type}"]
    fields = {"Content-Length": len(body)} | {name.replace("_", "-"): value for name, value in headers.items()}
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return Request("\r\n".join([*lines, "\r\n"]).encode(), body)


def form(files: Sequence[bytes]) -> Request:
    parts = (
        b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n' + each + b"\r\n" for each in files
    )
    return post(b"".join(parts) + b"--x--\r\n", "multipart/form-data; boundary=x")


def as_json(files: Sequence[bytes]) -> Request:
    content = {"images": [base64.b64encode(each).decode() for each in files]}
    return post(json.dumps(content).encode(), "application/json")


class Mischief:
    """Makes requests, the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._photos = [
            encoded(photo(index, 40 * index + 60, 300), file_format)
            for index, file_format in enumerate(EVERY_FORMAT * 2)
        ]
        self._mutants = [each for file_format in EVERY_FORMAT for each in mutants(file_format, 40, self._random)]
        self._bad: Sequence[Callable[[], Request]] = (
            lambda: post(self._one(self._mutants)),
            lambda: post(self._one(self._photos)[: self._random.randrange(1, 400)]),
            lambda: post(self._random.randbytes(self._random.randrange(5000))),
            lambda: post(b""),
            lambda: post(b'{"images": ["%%%"', "application/json"),
            lambda: post(b'{"images": [' + b"[" * 10_000, "application/json"),
            lambda: as_json([b"no photo", self._one(self._mutants)]),
            lambda: form([self._one(self._mutants) for _ in range(3)]),
            lambda: post(self._random.randbytes(300), "multipart/form-data; boundary=x"),
            lambda: post(b"", Content_Length=50_000_000),
            lambda: post(encoded(photo(1, 2000, 1500), "PNG")),  # more pixels than allowed
            lambda: post(gzip.compress(self._one(self._photos)), Content_Encoding="gzip"),
            lambda: post(self._one(self._photos), X_Request_Timeout_Ms="soon"),
            lambda: post(self._one(self._photos), path="/v1/predict?top_k=none"),
            lambda: post(b"{}", "application/json", path="/v2/models/unknown/infer"),
            lambda: Request(b"GET /nowhere HTTP/1.1\r\nHost: chaos\r\n\r\n", b""),
            lambda: Request(b"BREW /coffee HTCPCP/1.0\r\n\r\n", b""),
        )

    def good(self) -> Request:
        files = [self._one(self._photos) for _ in range(self._random.choice((1, 1, 1, 2, 5)))]
        match self._random.randrange(7):
            case 0:
                return form(files)
            case 1:
                return as_json(files)
            case 2:
                return post(files[0], X_Request_Timeout_Ms=self._random.choice((1, 20, 200, 5000)))
            case 3:
                return post(files[0], path=self._one(("/v1/features", "/v1/explain", "/v1/explain?layer=stage3")))
            case _:
                return post(files[0])

    def bad(self) -> Request:
        return self._one(self._bad)()

    def any(self) -> Request:
        return self.bad() if self._random.random() < BAD else self.good()

    def leaves(self) -> bool:
        return self._random.random() < LEAVING

    def moment(self) -> float:
        """A time to leave after, in seconds: at once, or while the server decodes, or while the device works."""
        return self._random.choice((0.0, 0.0, 0.002, 0.02, 0.2))

    def part(self, whole: bytes) -> bytes:
        return whole[: self._random.randrange(len(whole) + 1)] if self._random.random() < 0.5 else whole

    def _one(self, choices: Sequence[T]) -> T:
        return self._random.choice(choices)


async def leave(address: tuple[str, int], mischief: Mischief, request: Request) -> None:
    """Send a request or a part of it and be gone, without a word: as a client does that is killed."""
    _, writer = await asyncio.open_connection(*address)
    writer.write(mischief.part(request.head + request.body))
    await asyncio.sleep(mischief.moment())
    if not writer.is_closing():  # the server has closed the connection
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def ask(address: tuple[str, int], request: Request, report: Report) -> None:
    """Send a request over a connection of its own and wait for the answer."""
    opening = time.monotonic()
    reader, writer = await asyncio.open_connection(*address)
    started = time.monotonic()
    try:
        writer.write(request.head + request.body)
        async with asyncio.timeout(PATIENCE_S):
            head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split()[1])
        report.statuses[status] += 1
        report.without_retry_after += status in (429, 503) and b"retry-after:" not in head.lower()
    except (OSError, EOFError, TimeoutError) as error:
        if started - opening > HEAD_TIMEOUT_S:
            report.late += 1
        else:
            report.unanswered.append(f"{error!r} after {time.monotonic() - started:.1f} s: {request.head!r}")
    finally:
        report.slowest_s = max(report.slowest_s, time.monotonic() - started)
        writer.close()


async def wreak(url: str, mischief: Mischief, requests: int, at_once: int = AT_ONCE) -> Report:
    """Send so many requests, so many at a time."""
    report = Report()
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or 80)
    left = requests

    async def one_after_the_other() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            if mischief.leaves():
                report.left += 1
                await leave(address, mischief, mischief.any())
            else:
                await ask(address, mischief.any(), report)

    await asyncio.gather(*(one_after_the_other() for _ in range(at_once)))
    return report


def assert_unharmed(server: ServerProcess, expected: Sequence[object]) -> None:
    """Nothing is left of what was asked, nothing went wrong inside, and good photos get the answers they always got."""

    def gauges() -> list[float]:
        names = ("rednet_queue_depth", "rednet_backlog_seconds", "rednet_inflight_requests")
        return [sample(server.client, name) for name in names]

    wait_until(lambda: gauges() == [0, 0, 1], "the gauges to be zero but for the scrape itself")
    assert "unhandled exception" not in server.log
    for turn in range(GOOD_AFTERWARDS):
        response = predict(server.client, encoded(photo(turn % len(expected), 300, 200)))
        assert response.json()["predictions"] == expected[turn % len(expected)]


def assert_as_promised(report: Report) -> None:
    assert report.statuses.keys() <= PROMISED, report
    assert not report.unanswered, report
    assert not report.without_retry_after, report


def right_answers(server: ServerProcess) -> list[object]:
    return [predict(server.client, encoded(photo(seed, 300, 200))).json()["predictions"] for seed in range(5)]


def run(server: ServerProcess, requests: int, seed: int) -> Report:
    """The whole of it on a server that was started with OPTIONS; fails where a promise is not kept."""
    expected = right_answers(server)
    with killing_decoders(server.process.pid, KILL_EVERY_S, random.Random(seed)) as killed:
        report = asyncio.run(wreak(server.url, Mischief(seed), requests))
    report.decoders_killed = len(killed)
    assert_as_promised(report)
    assert_unharmed(server, expected)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frontends", default="auto")
    options = parser.parse_args()
    started = time.monotonic()
    with ServerProcess(*OPTIONS, "--frontends", options.frontends) as server:
        report = run(server, options.requests, options.seed)
        print(report)
        print(f"{options.requests} requests in {time.monotonic() - started:.0f} s; all gauges zero, 100 of 100 right")
        print(f"exit status {server.terminate()}")


if __name__ == "__main__":
    main()
