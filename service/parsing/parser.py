"""Parses large request bodies in a separate process: starts it, sends it bodies, and decodes its replies."""

import asyncio
import heapq
import itertools
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
from rednet.service.parsing.bodies import BodyFormat, BodyLimits, EmbeddingOptions, InferOptions, ParsedBody
from rednet.service.parsing.body_file import BodyFile
from rednet.service.parsing.body_parser import is_image, is_quick, may_be_image, parse_body
from rednet.service.parsing.content_sniffing import HEAD_BYTES
from rednet.service.parsing.worker import MAX_REPLY_BYTES, REQUEST
from rednet.service.types import Upload

logger = logging.getLogger(__name__)

MAX_HEAP_IMAGE_BYTES = 1_000_000  # a body that is a single image needs no parsing
MAX_HEAP_BODY_BYTES = 200_000  # other bodies
MAX_CONCURRENT = 2  # bodies, so that others are parsed while a hostile one uses up its CPU time
MAX_ATTEMPTS = 2
RETRY_S = 1.0
REPLY_TIMEOUT_S = 120.0  # the CPU limit takes effect long before; this is for a process that is stopped
EXIT_TIMEOUT_S = 2.0
ERRORS = {error.code: error for error in (MalformedRequest, PayloadTooLarge, UnsupportedMediaType)}
# Exit statuses that are blamed on the body: too much CPU time, or too much memory, over which orjson crashes.
CAUSED_BY_BODY = {-signal.SIGXCPU, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}


class Parser:
    """Parses large bodies in separate processes, a few at once, smaller ones first. Used from one event loop."""

    def __init__(self) -> None:
        self._command = [sys.executable, "-P", "-m", "rednet.service.parsing.worker"]
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._free = MAX_CONCURRENT
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap ordered by size
        self._order = itertools.count()
        self._closed = False

    def parse_quickly(self, body_format: BodyFormat, body: bytes | BodyFile, limits: BodyLimits) -> ParsedBody | None:
        """Parse a body here if that does not block the event loop for long; None: it needs `parse`."""
        if isinstance(body, BodyFile):
            return ParsedBody([body.view(0, body.size)]) if is_image(body_format, body.head(HEAD_BYTES)) else None
        return parse_body(body_format, body, limits) if is_quick(body_format, body) else None

    async def parse(self, body_format: BodyFormat, body: bytes | BodyFile, limits: BodyLimits) -> ParsedBody:
        """Parse a body in another process. Images may be views of the file. Cancelling kills the process.

        Raises:
            MalformedRequest, PayloadTooLarge, UnsupportedMediaType: raised by `parse_body`.
            PayloadTooLarge: parsing takes too much CPU time or memory.
            NotReady: the process was killed from outside, in both attempts.
        """
        if isinstance(body, bytes):
            with _in_file(body) as file:
                parsed = await self.parse(body_format, file, limits)
                return replace(parsed, images=[_copied(image) for image in parsed.images])
        size = body.size
        body.append(header := orjson.dumps({"body_format": asdict(body_format), "limits": asdict(limits)}))
        async with self._turn(size):
            for _ in range(MAX_ATTEMPTS):
                reply = await self._reply(body, REQUEST.pack(size, len(header)))
                if (status := reply.get("exit_status")) in CAUSED_BY_BODY:
                    logger.warning("parsing a body of %d bytes ended its process with status %d", size, status)
                    if status == -signal.SIGXCPU:
                        raise PayloadTooLarge("the body takes too long to parse")
                    raise PayloadTooLarge("the body takes too much memory to parse, or crashes the parser")
                if status is None:
                    return _parsed(body, reply)
                logger.error("a parser process was killed from outside, with status %d", status)
        raise NotReady("the process that parsed the body was killed; try again", RETRY_S)

    def close(self) -> None:
        """Stop the process."""
        self._closed = True
        self._end()

    async def _reply(self, body: BodyFile, request: bytes) -> dict[str, Any]:
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            with theirs:
                self._send(request, body.fileno(), theirs.fileno())
            try:
                async with asyncio.timeout(REPLY_TIMEOUT_S):
                    line = await _read_line(ours)
            except TimeoutError:
                logger.error("the parser process did not reply and was killed")
                if self._process:
                    self._process.kill()
                self._end()
                return {"exit_status": -signal.SIGKILL}
        reply: dict[str, Any] = orjson.loads(line) if line else {"exit_status": 0}
        return reply

    def _send(self, request: bytes, *fds: int) -> None:
        """Send a request to the running process, or to a new one."""
        if self._closed:
            raise Draining
        try:
            if not self._control:
                self._start()
            assert self._control
            try:
                socket.send_fds(self._control, [request], fds)
            except ConnectionError:
                logger.error("the parser process has exited; starting another one")
                self._end()
                self._start()
                socket.send_fds(self._control, [request], fds)
        except OSError as error:
            logger.error("the parser process could not be started: %s", error)
            raise NotReady("large bodies cannot be parsed now; try again later", RETRY_S) from error

    def _start(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # the process imports the same modules
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
                self._process.wait(EXIT_TIMEOUT_S)
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


def max_heap_bytes(body_format: BodyFormat) -> int:
    """The size up to which a body is kept on the heap: copying or parsing it is faster than sharing it."""
    return MAX_HEAP_IMAGE_BYTES if may_be_image(body_format) else MAX_HEAP_BODY_BYTES


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


async def _read_line(connection: socket.socket) -> bytes:
    """Read a line; returns nothing if the connection ends early or the line is too long."""
    received = bytearray()
    while not received.endswith(b"\n"):
        chunk = await asyncio.get_running_loop().sock_recv(connection, 262_144)
        if not chunk or len(received) > MAX_REPLY_BYTES:
            return b""
        received += chunk
    return bytes(received)


def _parsed(body: BodyFile, reply: dict[str, Any]) -> ParsedBody:
    if trace := reply.get("traceback"):
        logger.error("unhandled exception in the parser process:\n%s", trace)
        raise Internal
    if error := reply.get("error"):
        code, message = error
        raise ERRORS[code](message)
    return ParsedBody(
        images=[_upload(body, image) for image in reply["images"]],
        infer=reply["infer"] and InferOptions(**reply["infer"]),
        embeddings=reply["embeddings"] and EmbeddingOptions(**reply["embeddings"]),
        ignored=reply["ignored"],
    )


def _upload(body: BodyFile, image: str | tuple[int, int, list[int] | None]) -> Upload:
    if isinstance(image, str):
        return MalformedRequest(image)
    start, length, shape = image
    view = body.view(start, start + length)
    return view if shape is None else np.frombuffer(view, np.float32).reshape(shape)
