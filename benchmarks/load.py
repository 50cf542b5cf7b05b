"""Load generator in a separate process.

In the closed loop, each connection sends a request as soon as it has the previous response, which measures capacity. In
the open loop, requests are sent at a given rate, whatever becomes of earlier ones, and latency counts from when a
request was due, so that a slow response does not hide the requests behind it (coordinated omission).
"""

import asyncio
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple
from urllib.parse import urlsplit

import uvloop

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Answer(NamedTuple):
    """The result of one request. Status 0: the connection broke."""

    status: int
    due: float  # by time.monotonic(), which all processes of a machine share
    took_s: float
    retry_after_s: float | None


class Load:
    """A generator of requests with photos.

    Args:
        url: of the endpoint.
        bodies: sent in turn.
        timeout_ms: deadline of each request; None: the server's.
        content_type: of the bodies.
        retry: after a 429, wait for `Retry-After` and send the request once more.
    """

    def __init__(
        self,
        url: str,
        bodies: Sequence[bytes],
        timeout_ms: int | None = None,
        content_type: str = "image/jpeg",
        retry: bool = False,
    ) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        deadline = f"X-Request-Timeout-Ms: {timeout_ms}\r\n" if timeout_ms else ""
        self._head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{deadline}Content-Type: {content_type}\r\n"
        self._requests = [f"Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
        self._idle: deque[Streams] = deque()
        self._retry = retry
        self.answers: list[Answer] = []
        self.retries: list[Answer] = []

    async def closed(self, connections: int, seconds: float) -> None:
        """Keep one request in flight on each connection."""
        ends = time.monotonic() + seconds

        async def loop(first: int) -> None:
            turn = first
            while time.monotonic() < ends:
                await self.ask(turn, time.monotonic())
                turn += connections

        await asyncio.gather(*(loop(index) for index in range(connections)))

    async def open(self, rate: float, seconds: float) -> None:
        """Send requests evenly, at `rate` per second."""
        begins = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for turn in range(int(rate * seconds)):
                due = begins + turn / rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.create_task(self.ask(turn, due))

    async def ask(self, turn: int, due: float) -> None:
        """Send one request, and perhaps retry it once."""
        answer = await self._answer(turn, due)
        self.answers.append(answer)
        if self._retry and answer.retry_after_s:
            await asyncio.sleep(answer.retry_after_s)
            self.retries.append(await self._answer(turn, time.monotonic()))

    async def _answer(self, turn: int, due: float) -> Answer:
        """The response over an idle connection, or a new one."""
        try:
            streams = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
            streams[1].write(self._head.encode() + self._requests[turn % len(self._requests)])
            status, headers = await _read_answer(streams[0])
        except (OSError, EOFError):
            return Answer(0, due, time.monotonic() - due, None)
        retry = headers.get("retry-after")
        answer = Answer(status, due, time.monotonic() - due, float(retry) if retry else None)
        if headers.get("connection") == "close":
            streams[1].close()
        else:
            self._idle.append(streams)
        return answer


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    await reader.readexactly(int(headers.get("content-length", 0)))
    return int(head[0].split()[1]), headers


class Answers(list[Answer]):
    """The results of many requests, and the sender's cost.

    Attributes:
        sender_s: CPU time of the sender, which the server lacks if both share the cores.
        retries: results of the retried requests.
    """

    sender_s: float = 0.0
    retries: Sequence[Answer] = ()

    def ok(self) -> list[float]:
        """Latencies of successful requests, ascending."""
        return sorted(answer.took_s for answer in self if answer.status == 200)


def closed_loop(load: Load, connections: int, seconds: float, senders: int = 1) -> Answers:
    """The results of a closed loop, run in separate processes that share the connections evenly."""
    return _in_processes(senders, load, Load.closed, connections // senders, seconds)


def open_loop(load: Load, rate: float, seconds: float) -> Answers:
    """The results of an open loop at `rate` requests per second, run in a separate process."""
    return _in_processes(1, load, Load.open, rate, seconds)


def _in_processes(count: int, load: Load, loop: Callable[..., Coroutine[None, None, None]], *how: float) -> Answers:
    found = Answers()
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        for running in [pool.submit(_run, load, loop, *how) for _ in range(count)]:
            answers, retries, sender_s = running.result()
            found += answers
            found.retries = [*found.retries, *retries]
            found.sender_s += sender_s
    return found


def _run(
    load: Load, loop: Callable[..., Coroutine[None, None, None]], *how: float
) -> tuple[list[Answer], list[Answer], float]:
    before = time.process_time()
    uvloop.run(loop(load, *how))
    return load.answers, load.retries, time.process_time() - before
