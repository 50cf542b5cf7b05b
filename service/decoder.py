"""Photos to pixels in processes of their own: on all cores at once, and out of harm's way."""

import asyncio
import contextvars
import fcntl
import json
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import BinaryIO, NamedTuple

import numpy as np

from model.preprocess import Preprocess
from service.decode import check_pixels
from service.decoder_process import ANSWER, REQUEST
from service.errors import Draining, Internal, PayloadTooLarge, ServiceError, UnreadableImage, UnsupportedMediaType
from service.threads import Threads
from service.types import Floats, Pixels

log = logging.getLogger(__name__)

LONGEST_S = 10.0  # for one photo; what takes longer is made to
START_S = 10.0  # for the processes to start
ERRORS = {error.code: error for error in (PayloadTooLarge, UnreadableImage, UnsupportedMediaType)}


class Decoded(NamedTuple):
    pixels: Pixels
    decode_s: float


class Drawn(NamedTuple):
    png: bytes
    draw_s: float


@dataclass(slots=True)
class _Photo:
    """One that is being decoded, or drawn on, or waits for it."""

    data: bytes
    grid: Floats | None  # [h, w], to be drawn over it; None: it is to be decoded
    done: asyncio.Future[tuple[Pixels | bytearray, float]]  # pixels or PNG, and seconds
    tries: int = 0  # processes that have ended over it, by themselves


class Decoder:
    """Decodes as many photos at once as it has processes; more wait.

    Processes are started when they are first needed, or all of them by `start`. A photo over which one ends is tried
    again by another: the photo may not have been the reason. Over which the second ends, too, is broken. Used from one
    event loop.

    Args:
        preprocess: what the network expects.
        max_pixels: width times height, at most.
        count: processes, and threads for other work on a request's bytes.
    """

    def __init__(self, preprocess: Preprocess, max_pixels: int, count: int) -> None:
        self._preprocess = preprocess
        options = json.dumps({"preprocess": asdict(preprocess), "max_pixels": max_pixels})
        self._command = [sys.executable, "-P", "-m", "service.decoder_process", options]
        self._side = preprocess.crop
        self._count = count
        self._processes: set[_Process] = set()
        self._idle: list[_Process] = []
        self._waiting: deque[_Photo] = deque()
        self._closed = False
        self.threads = Threads(count, "bytes")

    async def start(self) -> None:
        """Start all processes, so that the first photos do not wait for it, and nothing that is timed is disturbed."""
        while len(self._processes) < self._count:
            self._start()
        await asyncio.wait([process.known for process in self._processes], timeout=START_S)

    async def decode(self, data: bytes | Floats) -> Decoded:
        """Decode a photo, or check normalised pixels; raises what `decode_image` and `check_pixels` do.

        Cancelled before a process took it up, it is not decoded.
        """
        if not isinstance(data, bytes):
            started = time.monotonic()
            return Decoded(await self.threads.run(check_pixels, data, self._preprocess), time.monotonic() - started)
        content, decode_s = await self._process_photo(data, None)
        assert isinstance(content, np.ndarray)
        return Decoded(content, decode_s)

    async def draw(self, data: bytes, grid: Floats) -> Drawn:
        """Draw a map [h, w] over a photo; raises what `draw_image` does."""
        content, draw_s = await self._process_photo(data, grid)
        return Drawn(bytes(content), draw_s)

    async def _process_photo(self, data: bytes, grid: Floats | None) -> tuple[Pixels | bytearray, float]:
        if self._closed:
            raise Draining
        photo = _Photo(data, grid, asyncio.get_running_loop().create_future())
        if self._idle:
            self._idle.pop().begin(photo)
        else:
            self._waiting.append(photo)
            if len(self._processes) < self._count:
                self._start()
        try:
            return await photo.done
        finally:
            photo.data = b""  # where its caller has left it may wait on; its bytes do not count any more

    def close(self) -> None:
        """End the processes; whoever waits for a photo is told that the server is stopping."""
        self._closed = True
        self.threads.close()
        self._fail_waiting(Draining())
        for process in [*self._processes]:
            process.end(Draining())

    def next_photo(self, process: "_Process") -> _Photo | None:
        """What a process is to decode next; None: it will be given something."""
        while self._waiting:
            photo = self._waiting.popleft()
            if not photo.done.done():
                return photo
        self._idle.append(process)
        return None

    def again(self, photo: _Photo) -> None:
        """Decode a photo before all others."""
        if self._idle:
            self._idle.pop().begin(photo)
        else:
            self._waiting.appendleft(photo)

    def lost(self, process: "_Process") -> None:
        """A process has ended."""
        self._processes.discard(process)
        if process in self._idle:
            self._idle.remove(process)
        if self._waiting and process.was_up:
            self._start()
        elif not self._processes:  # it would not go better for the next one
            self._fail_waiting(Internal())

    def _fail_waiting(self, error: ServiceError) -> None:
        while self._waiting:
            _fail(self._waiting.popleft(), error)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # where this process has found what it runs
            "OPENBLAS_NUM_THREADS": "1",  # of which it would keep one ready for each core
            "MALLOC_TOP_PAD_": "4000000",  # bytes that it keeps from photo to photo; asking again takes a tenth as long
        }
        with theirs, _shared_memory(3 * self._side**2) as file, _for_us_alone(signal.SIGINT, signal.SIGTERM):
            command = [*self._command, str(file.fileno())]
            running = subprocess.Popen(command, stdin=theirs, env=environment, pass_fds=[file.fileno()])  # noqa: S603
            pixels = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        process = _Process(self, running, pixels.reshape(3, self._side, self._side))
        self._processes.add(process)
        loop = asyncio.get_running_loop()
        connecting = loop.create_unix_connection(lambda: process, sock=ours)
        # In a context of its own: what the process's log lines say is nothing of the request that happened to start it.
        process.connecting = loop.create_task(connecting, context=contextvars.Context())


def _shared_memory(size: int) -> BinaryIO:
    """Memory as a file, for a process to write into: a socket would take photos' pixels in many small pieces."""
    if sys.platform != "linux":
        file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
        file.truncate(size)
        return file
    file = open(os.memfd_create("pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")
    file.truncate(size)
    # If the process could make it smaller, reading what is gone would end the server.
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return file


@contextmanager
def _for_us_alone(*signals: signal.Signals) -> Iterator[None]:
    """Processes that are started meanwhile never get these signals, not even in their first moments. A supervisor or a
    terminal sends them to all processes, but a server that drains still wants photos decoded."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Process(asyncio.Protocol):
    """One process, as the connection to it shows it."""

    connecting: "asyncio.Task[object]"  # kept, because the event loop would not

    def __init__(self, decoder: Decoder, process: "subprocess.Popen[bytes]", pixels: Pixels) -> None:
        self._decoder = decoder
        self._process = process
        self._pixels = pixels  # of the photo that it has decoded last
        self._photo: _Photo | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._ended = False
        self.was_up = False
        self.known: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # whether it is up

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def begin(self, photo: _Photo) -> None:
        assert self._transport is not None, "this is a bug: it has not shown any sign of life"
        self._photo = photo
        height, width = (0, 0) if photo.grid is None else photo.grid.shape
        grid = b"" if photo.grid is None else photo.grid.astype(np.float32).tobytes()
        self._transport.writelines((REQUEST.pack(len(photo.data), height, width), photo.data, grid))
        self._timer = asyncio.get_running_loop().call_later(LONGEST_S, self._too_slow, context=contextvars.Context())

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) < ANSWER.size:
            return
        failed, took_s, length = ANSWER.unpack_from(self._received)
        if len(self._received) < ANSWER.size + length:
            return
        content = self._received[ANSWER.size :]
        self._received.clear()
        if self._photo:
            self._settle(self._photo, failed, took_s, content)
        if not self.was_up:  # the first answer is to nobody, but a sign of life
            self.was_up = True
            self.known.set_result(None)
        if photo := self._decoder.next_photo(self):
            self.begin(photo)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._ended:
            self._process.kill()
            status = self._process.wait()
            log.error("a decoder has ended by itself, with status %d", status)
            if self._photo and not self._photo.tries:
                self._photo.tries += 1
                self._decoder.again(self._photo)
                self._photo = None
            self.end(UnreadableImage("the image is damaged: it broke the decoder"))

    def end(self, error: ServiceError) -> None:
        """End the process, and tell whoever waits for it why."""
        self._ended = True
        if not self.known.done():
            self.known.set_result(None)
        self._process.kill()
        self._process.wait()
        if self._photo:
            _fail(self._photo, error)
        self._done()
        self._decoder.lost(self)
        if self._transport:
            self._transport.abort()

    def _settle(self, photo: _Photo, failed: bool, took_s: float, content: bytearray) -> None:
        self._done()
        if photo.done.done():  # the caller has left
            return
        if failed:
            error = json.loads(content)
            photo.done.set_exception(ERRORS[error["code"]](error["message"]))
        else:
            photo.done.set_result((self._pixels.copy() if photo.grid is None else content, took_s))

    def _too_slow(self) -> None:
        log.error("a decoder was ended: one image took longer than %.0f s", LONGEST_S)
        self.end(UnreadableImage("decoding the image takes too long"))

    def _done(self) -> None:
        self._photo = None
        if self._timer:
            self._timer.cancel()
            self._timer = None


def _fail(photo: _Photo, error: ServiceError) -> None:
    if not photo.done.done():
        photo.done.set_exception(error)
