"""The server's end of one decoder process: starts it, hands it photos, notices when it hangs or ends."""

import asyncio
import contextvars
import fcntl
import itertools
import json
import logging
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from rednet.service.decoding.failures import History
from rednet.service.decoding.fair_queue import Flow
from rednet.service.decoding.limits import Cost
from rednet.service.decoding.worker import ANSWER, COST, FAILED, REQUEST, SLOTS, TOO_COSTLY
from rednet.service.errors import PayloadTooLarge, ServiceError, UnreadableImage, UnsupportedMediaType
from rednet.service.system.child_process import Child
from rednet.service.types import Floats, Pixels

log = logging.getLogger(__name__)

PIECE_BYTES = 262_144  # sent in one iteration of the event loop; a fast process would take any size at once
TYPICAL_S = 0.002  # for one photo, as long as nothing is known of it
STALLED_CHECKS = 4  # in a row, without a hundredth of a second of processor time, before a process counts as hung
MAX_CHECKS = 600  # for one photo, whatever it uses
END_S = 5.0  # for a killed process to end
ERRORS = {error.code: error for error in (PayloadTooLarge, UnreadableImage, UnsupportedMediaType)}


@dataclass(slots=True, eq=False)
class Photo:
    """A photo that is decoded, or drawn on, or waits for it."""

    data: bytes | memoryview
    grid: Floats | None  # [h, w], to be drawn over it; None: it is to be decoded
    done: asyncio.Future[tuple[Pixels | bytes, float]]  # pixels or PNG, and seconds
    flow: Flow
    cost_s: float = TYPICAL_S  # expected
    memory_bytes: int = 0  # expected, where it matters
    ticket: int = 0
    aside: bool = False  # it waits for slow decoding
    pool: "Owner | None" = None  # where it is
    history: History = field(default_factory=History)


class Owner(Protocol):
    """What a link reports to."""

    def fill(self, link: "Link") -> None:
        """It has room for a photo."""

    def decoded(self, photo: Photo, took_s: float) -> None:
        """It has finished a photo, with or without success."""

    def too_costly(self, photo: Photo, cost: Cost) -> None:
        """It does not decode this photo, which is for another kind of process."""

    def leave(self, photo: Photo, kill_over: float) -> None:
        """A photo is not wanted any more. A process that was to work on it for longer than that is ended."""

    def unusable(self, link: "Link") -> None:
        """It takes no more photos; its process will end."""

    def ended(self, link: "Link", status: int | OSError) -> None:
        """Its process has ended, or could not be started. The photos that it had are still in it."""


class Link(asyncio.Protocol):
    """One process, as the connection to it shows it.

    It works on one photo, and has room for the next, so that it need not wait for the event loop in between.

    Args:
        owner: what it reports to.
        command: starts `rednet.service.decoding.worker`; the descriptor of the shared memory is appended.
        side: of the pixels that it makes, [3, side, side].
    """

    def __init__(self, owner: Owner, command: Sequence[str], side: int) -> None:
        self._owner, self._command, self._side = owner, command, side
        self.photos: deque[Photo] = deque()  # the first one is being decoded
        self.next: Photo | None = None  # the one behind it, as long as no other process has taken it
        self.since = 0.0  # when it came to its photo
        self.reserved_bytes = 0  # for its photo
        self.ready = self.was_ready = False
        self.useful = False  # it has answered a photo
        self._closing = False
        self._connecting: asyncio.Task[object] | None = None
        self._socket: socket.socket | None = None
        self._transport: asyncio.Transport | None = None
        self._disconnected = True
        self._status: int | OSError | None = None
        self._received = bytearray()
        self._unsent: deque[memoryview] = deque()
        self._paused = False
        self._slots_in, self._slots_out = itertools.cycle(range(SLOTS)), itertools.cycle(range(SLOTS))
        self._checked: Photo | None = None
        self._checks, self._stalled, self._cpu_s = 0, 0, 0.0
        self._child = Child(self._launch, self._started, self._exited)

    @property
    def pid(self) -> int | None:
        return self._child.pid

    def begin(self, photo: Photo) -> None:
        """Give it a photo; it has room for `SLOTS`."""
        assert self._transport is not None, "this is a bug: it has not shown any sign of life"
        height, width = (0, 0) if photo.grid is None else photo.grid.shape
        grid = b"" if photo.grid is None else photo.grid.astype(np.float32).tobytes()
        request = REQUEST.pack(next(self._slots_in), len(photo.data), height, width)
        sending = bool(self._unsent)
        self._unsent.extend(map(memoryview, (request, photo.data, grid)))
        if not sending:
            self._send()
        self.photos.append(photo)
        if len(self.photos) == 1:
            self.since = asyncio.get_running_loop().time()
        else:
            self.next = photo

    def kill(self) -> list[Photo]:
        """End the process; returns the photos that it had."""
        photos = [*self.photos]
        self.photos.clear()
        self.next = None
        self._close()
        return photos

    def join(self) -> None:
        """Wait until the process has ended, which blocks."""
        self._child.join(END_S)
        if self._socket and not self._connecting:
            self._socket.close()

    def is_stalled(self) -> bool:
        """Whether it hangs over its photo, or its start, asked once a second. If the server itself was stopped for a
        while, it was not asked meanwhile."""
        photo = self.photos[0] if self.photos else None
        if self._closing or (photo is None and self.ready):
            self._checks = 0
            return False
        cpu_s = _cpu_s(self.pid)
        if photo is not self._checked or not self._checks:
            self._checked, self._checks, self._stalled = photo, 1, 0
        else:
            self._checks += 1
            self._stalled = 0 if cpu_s is None or cpu_s > self._cpu_s else self._stalled + 1
        self._cpu_s = cpu_s or 0.0
        return self._stalled >= STALLED_CHECKS or self._checks > MAX_CHECKS

    def _launch(self) -> subprocess.Popen[bytes]:
        """On the child's thread."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # where this process has found what it runs
            "OPENBLAS_NUM_THREADS": "1",  # of which it would keep one ready for each core
            "MALLOC_TOP_PAD_": "4000000",  # bytes that it keeps from photo to photo; asking again takes a tenth as long
        }
        ours, theirs = socket.socketpair()
        try:
            with theirs, _shared_memory(SLOTS * 3 * self._side**2) as file:
                slots = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
                process = subprocess.Popen(  # noqa: S603
                    [*self._command, str(file.fileno())],
                    stdin=theirs.fileno(),
                    env=environment,
                    pass_fds=[file.fileno()],
                )
        except OSError:
            ours.close()
            raise
        self._socket, self._pixels = ours, slots.reshape(SLOTS, 3, self._side, self._side)
        return process

    def _started(self) -> None:
        loop = asyncio.get_running_loop()
        self._disconnected = False
        # In a context of its own: the process's log lines have nothing to do with the request that started it.
        connecting = loop.create_unix_connection(lambda: self, sock=self._socket)
        self._connecting = loop.create_task(connecting, context=contextvars.Context())

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        if self._closing:
            transport.abort()

    def _send(self) -> None:
        """Send a piece, and the next one in the loop's next iteration, or as soon as the process has read enough."""
        if not self._transport or self._transport.is_closing() or self._paused:
            return
        pieces, room = [], PIECE_BYTES
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
            kind, took_s, length = ANSWER.unpack_from(self._received)
            if len(self._received) < ANSWER.size + length:
                return
            content = bytes(self._received[ANSWER.size : ANSWER.size + length])
            del self._received[: ANSWER.size + length]
            if self._closing:  # what it had has been handed to others
                return
            if self.ready:
                self._settle(kind, took_s, content)
            else:  # the first answer belongs to no photo: it is a sign of life
                self.ready = self.was_ready = True
            self._owner.fill(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disconnected = True
        self._close()
        self._conclude()

    def _exited(self, status: int | OSError) -> None:
        self._status = status
        if self._disconnected:  # else what it has sent is read first
            self._close()
        self._conclude()

    def _close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._unsent.clear()
        self._child.kill()
        if self._transport:
            self._transport.abort()
        self._owner.unusable(self)

    def _conclude(self) -> None:
        if self._disconnected and self._status is not None:
            self._owner.ended(self, self._status)

    def _settle(self, kind: int, took_s: float, content: bytes) -> None:
        photo, slot = self.photos.popleft(), next(self._slots_out)
        self.since = asyncio.get_running_loop().time()
        self.next = None
        self.useful = True
        self._owner.decoded(photo, took_s)
        if photo.done.done():  # the caller has left, or another process was sooner
            return
        if kind == TOO_COSTLY:
            self._owner.too_costly(photo, Cost(*COST.unpack(content)))
        elif kind == FAILED:
            error = json.loads(content)
            photo.done.set_exception(ERRORS[error["code"]](error["message"]))
        else:
            photo.done.set_result((self._pixels[slot].copy() if photo.grid is None else content, took_s))


def fail(photo: Photo, error: ServiceError) -> None:
    if not photo.done.done():
        photo.done.set_exception(error)


def _cpu_s(pid: int | None) -> float | None:
    """Processor time that a process has used; None where that cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


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
