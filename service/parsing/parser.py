"""The server's end of the parser process: starts it, gives it large bodies, turns its replies into values."""

import asyncio
import heapq
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import orjson

from rednet.service.errors import Draining, Internal, MalformedRequest, NotReady, PayloadTooLarge, UnsupportedMediaType
from rednet.service.parsing.bodies import BodyFormat, BodyLimits, InferOptions, ParsedBody
from rednet.service.parsing.body_file import BodyFile
from rednet.service.parsing.body_parser import is_image, is_quick, may_be_image, parse_body
from rednet.service.parsing.content_sniffing import HEAD
from rednet.service.parsing.worker import MAX_REPLY_BYTES, REQUEST
from rednet.service.types import Upload

logger = logging.getLogger(__name__)

SMALL_IMAGE = 1_000_000  # bytes of a body that is one image, and needs no parsing
SMALL_BODY = 200_000  # bytes of others
AT_ONCE = 2  # bodies: while a hostile one takes its seconds, others are parsed
TRIES = 2
RETRY_S = 1.0
MAX_REPLY_S = 120.0  # the system ends what takes too much CPU time long before; this is for a process that is stopped
END_S = 2.0
ERRORS = {error.code: error for error in (MalformedRequest, PayloadTooLarge, UnsupportedMediaType)}
# By which a process ends because of its body: too much time; or too much memory, over which orjson crashes.
ITS_OWN = {-signal.SIGXCPU, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}


class Parser:
    """Parses large bodies in processes of their own, a few at once, small ones first. Used from one event loop.

    Args:
        limits: on what bodies may hold.
    """

    def __init__(self, limits: BodyLimits) -> None:
        self._command = [sys.executable, "-P", "-m", "rednet.service.parsing.worker", json.dumps(asdict(limits))]
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._free = AT_ONCE
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap, by size
        self._order = itertools.count()
        self._closed = False

    def parse_quickly(self, body_format: BodyFormat, body: bytes | BodyFile) -> ParsedBody | None:
        """What a body holds if it can be parsed here, without holding the event loop; None: `parse` it."""
        if isinstance(body, BodyFile):
            return ParsedBody([body.view(0, body.size)]) if is_image(body_format, body.head(HEAD)) else None
        return parse_body(body_format, body, self._limits) if is_quick(body_format, body) else None

    async def parse(self, body_format: BodyFormat, body: bytes | BodyFile) -> ParsedBody:
        """What a body holds, parsed in a process; images may be views of the file. Cancelled, it stops at once.

        Raises:
            MalformedRequest, PayloadTooLarge: what `parse_body` raises, or the body takes too much time or memory.
            NotReady: the process was ended from outside, and again when it was tried again.
        """
        if isinstance(body, bytes):
            with _in_file(body) as file:
                parsed = await self.parse(body_format, file)
                return replace(parsed, images=[_copied(image) for image in parsed.images])
        size = body.size
        body.append(header := orjson.dumps(asdict(body_format)))
        async with self._turn(size):
            for _ in range(TRIES):
                reply = await self._reply(body, REQUEST.pack(size, len(header)))
                if (died := reply.get("died")) in ITS_OWN:
                    logger.warning("a body of %d bytes ended its parser with status %d", size, died)
                    if died == -signal.SIGXCPU:
                        raise PayloadTooLarge("the body takes too long to parse")
                    raise PayloadTooLarge("the body takes too much memory to parse, or breaks the parser")
                if died is None:
                    return _parsed(body, reply)
                logger.error("a parser was ended from outside, with status %d", died)
        raise NotReady("the body's parser was ended; try again", RETRY_S)

    def close(self) -> None:
        """End the process."""
        self._closed = True
        self._end()

    async def _reply(self, body: BodyFile, request: bytes) -> dict[str, Any]:
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            with theirs:
                self._send(request, body.fileno(), theirs.fileno())
            try:
                async with asyncio.timeout(MAX_REPLY_S):
                    line = await _line(ours)
            except TimeoutError:
                logger.error("the parser process does not answer; it is ended")
                if self._process:
                    self._process.kill()
                self._end()
                return {"died": -signal.SIGKILL}
        reply: dict[str, Any] = orjson.loads(line) if line else {"died": 0}
        return reply

    def _send(self, request: bytes, *fds: int) -> None:
        """Send a request to the process that runs, or to a new one."""
        if self._closed:
            raise Draining
        try:
            if not self._control:
                self._start()
            assert self._control
            try:
                socket.send_fds(self._control, [request], fds)
            except ConnectionError:
                logger.error("the parser process has ended; another one is started")
                self._end()
                self._start()
                socket.send_fds(self._control, [request], fds)
        except OSError as error:
            logger.error("the parser process cannot be started: %s", error)
            raise NotReady("large bodies cannot be parsed now; try again later", RETRY_S) from error

    def _start(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # where this process has found what it runs
            "OPENBLAS_NUM_THREADS": "1",  # a process with threads cannot be forked safely
        }
        self._control, theirs = socket.socketpair()
        self._control.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                self._command, stdin=theirs.fileno(), env=environment, start_new_session=True
            )

    def _end(self) -> None:
        if self._control:
            self._control.close()
            self._control = None
        if self._process:
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    @asynccontextmanager
    async def _turn(self, size: int) -> AsyncIterator[None]:
        if self._free:
            self._free -= 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (size, next(self._order), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._next()
                raise
        try:
            yield
        finally:
            self._next()

    def _next(self) -> None:
        while self._waiting:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


def in_heap(body_format: BodyFormat) -> int:
    """The size in bytes up to which a body need not be in a file: so much is copied or parsed sooner than shared."""
    return SMALL_IMAGE if may_be_image(body_format) else SMALL_BODY


@contextmanager
def _in_file(body: bytes) -> Iterator[BodyFile]:
    file = BodyFile()
    try:
        file.append(body)
        yield file
    finally:
        file.close()


def _copied(image: Upload) -> Upload:
    if isinstance(image, np.ndarray):
        return image.copy()
    return bytes(image) if isinstance(image, memoryview) else image


async def _line(connection: socket.socket) -> bytes:
    """A line from a connection; empty if it ends before, or the line is too long."""
    received = bytearray()
    while not received.endswith(b"\n"):
        chunk = await asyncio.get_running_loop().sock_recv(connection, 262_144)
        if not chunk or len(received) > MAX_REPLY_BYTES:
            return b""
        received += chunk
    return bytes(received)


def _parsed(body: BodyFile, reply: dict[str, Any]) -> ParsedBody:
    if trace := reply.get("defect"):
        logger.error("a defect in the parser process:\n%s", trace)
        raise Internal
    if error := reply.get("error"):
        code, message = error
        raise ERRORS[code](message)
    infer = reply["infer"] and InferOptions(**reply["infer"])
    return ParsedBody(**reply | {"images": [_upload(body, image) for image in reply["images"]], "infer": infer})


def _upload(body: BodyFile, image: str | tuple[int, int, list[int] | None]) -> Upload:
    if isinstance(image, str):
        return MalformedRequest(image)
    start, length, shape = image
    view = body.view(start, start + length)
    return view if shape is None else np.frombuffer(view, np.float32).reshape(shape)
