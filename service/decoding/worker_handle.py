"""The server's handle on one worker process: starts it, sends it images, and detects when it hangs or exits."""

import asyncio
import contextvars
import fcntl
import itertools
import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from typing import BinaryIO, Protocol

import numpy as np

from rednet.service.decoding.jobs import DecodeJob
from rednet.service.decoding.limits import Cost
from rednet.service.decoding.stall_detector import StallDetector
from rednet.service.decoding.worker import ANSWER, COST, FAILED, REQUEST, SLOTS, TOO_COSTLY
from rednet.service.errors import MalformedRequest, PayloadTooLarge, UnreadableImage, UnsupportedMediaType
from rednet.service.system.child_process import Child

MAX_WRITE_BYTES = 262_144  # per iteration of the event loop; a fast process would accept any size at once
EXIT_TIMEOUT_S = 5.0  # of a killed process
ERRORS = {error.code: error for error in (MalformedRequest, PayloadTooLarge, UnreadableImage, UnsupportedMediaType)}


class WorkerCallbacks(Protocol):
    """What a worker handle reports to."""

    def on_ready(self, worker: "WorkerHandle") -> None:
        """The worker has started or finished a job, and can take another."""

    def on_decoded(self, job: DecodeJob, took_s: float) -> None:
        """The worker has finished a job, with or without success."""

    def on_too_costly(self, job: DecodeJob, cost: Cost) -> None:
        """The worker has refused a job whose image costs too much for it."""

    def on_stall(self, worker: "WorkerHandle") -> None:
        """The process hangs, over its first job or at its start."""

    def on_closing(self, worker: "WorkerHandle") -> None:
        """The worker takes no more jobs, and its process is about to exit."""

    def on_exit(self, worker: "WorkerHandle", status: int | OSError) -> None:
        """The process has exited, or could not be started. Its unfinished jobs are still in `worker.jobs`."""


class WorkerHandle(asyncio.Protocol):
    """One worker process, and the connection to it.

    A worker decodes one image and already holds the next, so that it need not wait for the event loop in between.

    Args:
        callbacks: what it reports to.
        command: starts `rednet.service.decoding.worker`; the descriptor of the shared memory is appended.
        side: of the decoded pixels, [3, side, side].
    """

    def __init__(self, callbacks: WorkerCallbacks, command: Sequence[str], side: int) -> None:
        self._callbacks, self._command, self._side = callbacks, command, side
        self.jobs: deque[DecodeJob] = deque()  # the worker is on the first one
        self.prefetched: DecodeJob | None = None  # the second one, unless another worker has stolen it
        self.job_since = 0.0  # start of the first job, by the event loop's clock
        self.reserved_bytes = 0  # memory of the first job
        self.is_ready = self.was_ready = False
        self.has_answered = False  # at least one job
        self._closing, self._paused, self._disconnected = False, False, True
        self._connecting: asyncio.Task[object] | None = None
        self._socket: socket.socket | None = None
        self._transport: asyncio.Transport | None = None
        self._status: int | OSError | None = None
        self._received = bytearray()
        self._unsent: deque[memoryview] = deque()
        self._slots_in, self._slots_out = itertools.cycle(range(SLOTS)), itertools.cycle(range(SLOTS))
        self._child = Child(self._launch, self._on_start, self._on_child_exit)
        self._stall_detector = StallDetector(self._task, lambda: self._child.pid, lambda: callbacks.on_stall(self))
        self._stall_detector.start()

    def submit(self, job: DecodeJob) -> None:
        """Send a job to the worker, which can hold `SLOTS` of them."""
        assert self._transport is not None, "this is a bug: the worker is not ready"
        height, width = (0, 0) if job.grid is None else job.grid.shape
        grid = b"" if job.grid is None else job.grid.astype(np.float32).tobytes()
        request = REQUEST.pack(next(self._slots_in), len(job.data), height, width)
        sending = bool(self._unsent)
        self._unsent.extend(map(memoryview, (request, job.data, grid)))
        if not sending:
            self._send()
        self.jobs.append(job)
        self._stall_detector.start()
        if len(self.jobs) == 1:
            self.job_since = asyncio.get_running_loop().time()
        else:
            self.prefetched = job

    def kill(self) -> list[DecodeJob]:
        """Kill the process; returns its unfinished jobs."""
        jobs = [*self.jobs]
        self.jobs.clear()
        self.prefetched = None
        self._close()
        return jobs

    async def wait_for_exit(self) -> None:
        """Wait until the process, which was killed, has exited."""
        await asyncio.to_thread(self._child.join, EXIT_TIMEOUT_S)
        if self._socket and not self._connecting:
            self._socket.close()

    def _task(self) -> object | None:
        """What the process works on: a job, or its own start."""
        if self.jobs:
            return self.jobs[0]
        return None if self._closing or self.is_ready else self._child

    def _launch(self) -> subprocess.Popen[bytes]:
        """Start the process, on the thread of `Child`."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # the worker imports the same modules
            "OPENBLAS_NUM_THREADS": "1",  # the default is a pool with a thread for each core
            "MALLOC_TOP_PAD_": "4000000",  # bytes kept between images; allocating them again makes it ten times slower
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

    def _on_start(self) -> None:
        loop = asyncio.get_running_loop()
        self._disconnected = False
        # In an empty context: log lines about the process do not belong to the request that happened to start it.
        connecting = loop.create_unix_connection(lambda: self, sock=self._socket)
        self._connecting = loop.create_task(connecting, context=contextvars.Context())

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        if self._closing:
            transport.abort()

    def _send(self) -> None:
        """Send up to `MAX_WRITE_BYTES`; the rest follows in later iterations of the event loop."""
        if not self._transport or self._transport.is_closing() or self._paused:
            return
        pieces, room = [], MAX_WRITE_BYTES
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
            if self._closing:  # other workers have its jobs now
                return
            if self.is_ready:
                self._complete(kind, took_s, content)
            else:  # the first answer belongs to no job: it says that the worker has started
                self.is_ready = self.was_ready = True
            self._callbacks.on_ready(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disconnected = True
        self._close()
        self._report_exit()

    def _on_child_exit(self, status: int | OSError) -> None:
        self._status = status
        if self._disconnected:  # otherwise the rest of its answers is read first
            self._close()
        self._report_exit()

    def _close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._stall_detector.stop()
        self._unsent.clear()
        self._child.kill()
        if self._transport:
            self._transport.abort()
        self.is_ready = False
        self._callbacks.on_closing(self)

    def _report_exit(self) -> None:
        if self._disconnected and self._status is not None:
            self._callbacks.on_exit(self, self._status)

    def _complete(self, kind: int, took_s: float, content: bytes) -> None:
        job, slot = self.jobs.popleft(), next(self._slots_out)
        self.job_since = asyncio.get_running_loop().time()
        self.prefetched = None
        self.has_answered = True
        self._callbacks.on_decoded(job, took_s)
        if job.result.done():  # cancelled, or another worker was faster
            return
        if kind == TOO_COSTLY:
            self._callbacks.on_too_costly(job, Cost(*COST.unpack(content)))
        elif kind == FAILED:
            error = json.loads(content)
            job.fail(ERRORS[error["code"]](error["message"]))
        else:
            job.result.set_result((self._pixels[slot].copy() if job.grid is None else content, took_s))


def _shared_memory(size: int) -> BinaryIO:
    """A file in memory for decoded pixels. Through a socket they would arrive in many small pieces."""
    if sys.platform != "linux":
        file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
        file.truncate(size)
        return file
    file = open(os.memfd_create("pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")  # noqa: SIM115  (as above)
    file.truncate(size)
    # If the worker could shrink the file, the server would crash when it reads beyond the end.
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return file
