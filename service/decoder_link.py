"""The server's end of one of the decoder's processes: starts it, hands it photos, notices when it hangs or ends."""

import asyncio
import contextvars
import fcntl
import itertools
import json
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np

from service.decoder_process import ANSWER, PLACES, REQUEST
from service.errors import PayloadTooLarge, ServiceError, UnreadableImage, UnsupportedMediaType
from service.types import Floats, Pixels

log = logging.getLogger(__name__)

LONGEST_S = 10.0  # for one photo; what takes longer is made to
PIECE = (
    262_144  # bytes sent in one iteration of the event loop: a process that reads fast enough takes any size at once
)
ERRORS = {error.code: error for error in (PayloadTooLarge, UnreadableImage, UnsupportedMediaType)}


@dataclass(slots=True, eq=False)
class Photo:
    """One that is being decoded, or drawn on, or waits for it."""

    data: bytes | memoryview
    grid: Floats | None  # [h, w], to be drawn over it; None: it is to be decoded
    done: asyncio.Future[tuple[Pixels | bytes, float]]  # pixels or PNG, and seconds
    tries: int = 0  # processes that have ended over it, by themselves


class Owner(Protocol):
    """What a link reports to."""

    def fill(self, link: "Link") -> None:
        """It has room for a photo."""

    def again(self, photo: Photo) -> None:
        """It will not finish this photo, and that may have been no fault of the photo's."""

    def lost(self, link: "Link") -> None:
        """Its process has ended."""


class Link(asyncio.Protocol):
    """One process, as the connection to it shows it.

    It works on one photo, and has room for the next, so that it need not wait for the event loop in between.

    Args:
        owner: told what happens.
        command: starts `service.decoder_process`; the descriptor of the shared memory is appended.
        side: of the pixels that it makes, [3, side, side].
    """

    connecting: "asyncio.Task[object]"  # kept, because the event loop would not

    def __init__(self, owner: Owner, command: Sequence[str], side: int) -> None:
        loop = asyncio.get_running_loop()
        self._owner = owner
        self._photos: deque[Photo] = deque()  # the first one is being decoded
        self.next: Photo | None = None  # the one behind it, as long as nobody else has taken it
        self.since = 0.0  # when it came to its photo
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._unsent: deque[memoryview] = deque()
        self._paused = False
        self._ended = False
        self.was_up = False
        self.known: asyncio.Future[None] = loop.create_future()  # whether it is up
        self._places_in, self._places_out = itertools.cycle(range(PLACES)), itertools.cycle(range(PLACES))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # where this process has found what it runs
            "OPENBLAS_NUM_THREADS": "1",  # of which it would keep one ready for each core
            "MALLOC_TOP_PAD_": "4000000",  # bytes that it keeps from photo to photo; asking again takes a tenth as long
        }
        ours, theirs = socket.socketpair()
        try:
            with (
                theirs,
                _shared_memory(PLACES * 3 * side**2) as file,
                _for_us_alone(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
            ):
                self._process = subprocess.Popen(  # noqa: S603
                    [*command, str(file.fileno())],
                    stdin=theirs.fileno(),
                    env=environment,
                    pass_fds=[file.fileno()],
                )
                self._pixels = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8).reshape(PLACES, 3, side, side)
        except OSError:
            ours.close()
            raise
        connecting = loop.create_unix_connection(lambda: self, sock=ours)
        # In a context of its own: what the process's log lines say is nothing of the request that happened to start it.
        self.connecting = loop.create_task(connecting, context=contextvars.Context())

    @property
    def photos(self) -> int:
        """How many it has."""
        return len(self._photos)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def begin(self, photo: Photo) -> None:
        """Give it a photo; it has room for `PLACES`."""
        assert self._transport is not None, "this is a bug: it has not shown any sign of life"
        height, width = (0, 0) if photo.grid is None else photo.grid.shape
        grid = b"" if photo.grid is None else photo.grid.astype(np.float32).tobytes()
        request = REQUEST.pack(next(self._places_in), len(photo.data), height, width)
        sending = bool(self._unsent)
        self._unsent.extend(map(memoryview, (request, photo.data, grid)))
        if not sending:
            self._send()
        self._photos.append(photo)
        if len(self._photos) == 1:
            self._watch()
        else:
            self.next = photo

    def _send(self) -> None:
        """Send a piece, and the next one in the loop's next iteration, or as soon as the process has read enough."""
        if not self._transport or self._transport.is_closing() or self._paused:
            return
        pieces, room = [], PIECE
        while self._unsent and room:
            part = self._unsent.popleft()
            if len(part) > room:
                self._unsent.appendleft(part[room:])
            pieces.append(part[:room])
            room -= len(pieces[-1])
        self._transport.writelines(pieces)
        if self._unsent:
            asyncio.get_running_loop().call_soon(self._send, context=contextvars.Context())

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._unsent:
            self._send()

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= ANSWER.size:
            failed, took_s, length = ANSWER.unpack_from(self._received)
            if len(self._received) < ANSWER.size + length:
                return
            content = bytes(self._received[ANSWER.size : ANSWER.size + length])
            del self._received[: ANSWER.size + length]
            if self.was_up:
                self._settle(self._photos.popleft(), failed, took_s, content)
            else:  # the first answer is to nobody, but a sign of life
                self.was_up = True
                self.known.set_result(None)
            self._watch()
            self._owner.fill(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._ended:
            self._process.kill()
            status = self._process.wait()
            log.error("a decoder has ended by itself, with status %d", status)
            error: ServiceError | None = UnreadableImage("the image is damaged: it broke the decoder")
            if self._photos and not self._photos[0].tries:
                self._photos[0].tries += 1
                error = None
            self.end(error)

    def end(self, error: ServiceError | None) -> None:
        """End the process, and tell whoever waits for its photo why; None: try that again, as what is behind it."""
        self._ended = True
        if not self.known.done():
            self.known.set_result(None)
        self._process.kill()
        self._process.wait()
        photos, self._photos = self._photos, deque()
        self._watch()
        if photos and error:
            fail(photos.popleft(), error)
        for photo in reversed(photos):
            self._owner.again(photo)
        self._owner.lost(self)
        self._unsent.clear()
        if self._transport:
            self._transport.abort()

    def _settle(self, photo: Photo, failed: bool, took_s: float, content: bytes) -> None:
        place = next(self._places_out)
        if photo.done.done():  # the caller has left, or another process was sooner
            return
        if failed:
            error = json.loads(content)
            photo.done.set_exception(ERRORS[error["code"]](error["message"]))
        else:
            photo.done.set_result((self._pixels[place].copy() if photo.grid is None else content, took_s))

    def _watch(self) -> None:
        """See to it that what it comes to now does not take too long."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self.next = None
        if self._photos:
            loop = asyncio.get_running_loop()
            self.since = loop.time()
            self._timer = loop.call_later(LONGEST_S, self._too_slow, context=contextvars.Context())

    def _too_slow(self) -> None:
        log.error("a decoder was ended: one image took longer than %.0f s", LONGEST_S)
        self.end(UnreadableImage("decoding the image takes too long"))


def fail(photo: Photo, error: ServiceError) -> None:
    if not photo.done.done():
        photo.done.set_exception(error)


def _shared_memory(size: int) -> BinaryIO:
    """Memory as a file, for a process to write into: a socket would take photos' pixels in many small pieces."""
    if sys.platform != "linux":
        file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
        file.truncate(size)
        return file
    file = open(os.memfd_create("pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")  # noqa: SIM115  (likewise)
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
