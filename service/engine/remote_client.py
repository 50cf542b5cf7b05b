"""The engine in another process, behind the interface of `LocalClient`. Imports no torch."""

import asyncio
import itertools
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from rednet.service.cost_table import CostTable, together_s
from rednet.service.engine.admission import Admission, AdmittingClient
from rednet.service.engine.messages import (
    CANCEL,
    FLOAT32,
    UINT8,
    Hello,
    Ready,
    Reply,
    Request,
    take_frame,
    take_replies,
)
from rednet.service.engine.slots import SlotLayout, Slots
from rednet.service.errors import (
    Cancelled,
    DeadlineExceeded,
    DeviceFailed,
    Draining,
    Internal,
    NotReady,
    NumericalOverflow,
    Overloaded,
    ServiceError,
)
from rednet.service.types import ExplainSpec, Inference, Permit, Pixels, QueueCounts, State

logger = logging.getLogger(__name__)

RECONNECT_S = 0.05
LAST_MOMENT_S = 0.15  # before a deadline, to be answered in time
FIRST_START_S = 2.0  # Retry-After before any process was ready
MAX_IDS = 1 << 32  # after so many images, ids begin again
MAX_TRIES = 2  # of an image: one that ends two processes is not tried again
SPARE_SLOTS = 64  # beside those for `max_queue`: cancelled images hold theirs until the engine gives it back
ERRORS: Mapping[str, ServiceError] = {
    error.code: error
    for error in (Cancelled(), DeadlineExceeded(""), DeviceFailed(), Draining(), Internal(), NumericalOverflow())
}


@dataclass(slots=True)
class _Pending:
    """An image without a reply."""

    request: Request
    future: "asyncio.Future[Inference]"
    tries: int = 0


class RemoteClient(AdmittingClient):
    """An `EngineClient` for an engine in another process. Used from one event loop.

    While that process is replaced, new requests are refused. Images that it had are given to the next one, if their
    deadline allows.

    Args:
        path: of the unix socket on which the engine's process listens.
        hello: what it serves.
        on_other_model: called when the process has been replaced by one that serves another model, to which nothing
            is sent.
        max_queue: the most images that may be accepted and unanswered, by all front ends.
        counts: of all front ends.
    """

    def __init__(
        self, path: str, hello: Hello, max_queue: int, counts: QueueCounts, on_other_model: Callable[[], None]
    ) -> None:
        self.path, self.hello, self.on_other_model = path, hello, on_other_model
        layout = SlotLayout.of(hello.model)
        self.slots_fd = Slots.allocate(layout, max_queue + SPARE_SLOTS)
        self.slots = Slots(layout, self.slots_fd)
        self.free = deque(range(self.slots.count))  # the last one is used first: its memory exists already
        self._admission = Admission(max_queue, self._work_s, counts=counts)
        self._ids = itertools.count()
        self._links = [_EngineLink(self, device) for device in range(hello.devices)]
        self._tasks: Sequence[asyncio.Task[None]] = ()
        self._draining = self._closed = False

    def start(self) -> None:
        self._tasks = [asyncio.ensure_future(link.stay_connected()) for link in self._links]

    @property
    def state(self) -> State:
        if self._draining:
            return State.DRAINING
        return State.READY if all(link.is_ready for link in self._links) else State.STARTING

    @property
    def slots_in_use(self) -> int:
        """Images that the engine's process has, including cancelled ones."""
        return 0 if self._closed else self.slots.count - len(self.free)

    @property
    def costs(self) -> CostTable:
        return self._links[0].costs

    def admit(self, deadline: float) -> Permit:
        match self.state:
            case State.STARTING:
                raise self._not_ready()
            case State.DRAINING:
                raise Draining
        return self._admission.admit(deadline)

    async def infer(self, pixels: Pixels, deadline: float, explain: ExplainSpec | None = None) -> Inference:
        if self._closed:
            raise Draining
        if not self.free:
            raise Overloaded("too many cancelled images are still running; try again later", 1.0)
        # Images of other front ends are not known here, but each spreads its own.
        link = min(self._links, key=lambda link: link.backlog_s(len(link.pending) + 1))
        slot = self.free.pop()
        kind = FLOAT32 if pixels.dtype == np.float32 else UINT8
        self.slots.pixels[kind][slot] = pixels
        request = Request(next(self._ids) % MAX_IDS, slot, kind, deadline, explain)
        future: asyncio.Future[Inference] = asyncio.get_running_loop().create_future()
        link.submit(_Pending(request, future))
        try:
            return await future
        except asyncio.CancelledError:
            link.cancel(request)
            raise

    def begin_drain(self) -> None:
        self._draining = True

    async def close(self) -> None:
        self.begin_drain()
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self._links:
            link.close()
        os.close(self.slots_fd)

    def _not_ready(self) -> NotReady:
        return NotReady("the model is being loaded", max(link.start_s for link in self._links))

    def _work_s(self, images: int) -> float:
        return together_s(images, self._links)


class _EngineLink(asyncio.Protocol):
    """The connection to the engine of one device.

    Args:
        client: that it belongs to.
        device: its number.
    """

    def __init__(self, client: RemoteClient, device: int) -> None:
        self._client, self._device = client, device
        self.pending: dict[int, _Pending] = {}  # by the id of the image
        self.costs = CostTable()
        self.start_s = FIRST_START_S
        self._slowdown = 1.0
        self._received = bytearray()
        self._greeted = False
        self._connecting: asyncio.Transport | None = None
        self._transport: asyncio.Transport | None = None  # only while the device is ready
        self._lost: asyncio.Event = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        return self._transport is not None

    def backlog_s(self, images: int) -> float:
        """Predicted time to run `images` images."""
        return self.costs.queue_s(images) * self._slowdown

    def submit(self, pending: _Pending) -> None:
        if self._transport is None and not self._may_wait(pending):
            self._client.free.append(pending.request.slot)
            pending.future.set_exception(self._restarting())
            return
        self.pending[pending.request.id] = pending
        if self._transport:
            self._send(pending)

    def cancel(self, request: Request) -> None:
        if request.id not in self.pending:  # the reply has just arrived
            return
        if self._transport:  # whose reply gives the slot back
            self._transport.write(request._replace(kind=CANCEL).pack())
        else:
            self._release(request.id)

    async def stay_connected(self) -> None:
        """Connect, and connect again whenever the process has ended. Runs until it is cancelled."""
        while True:
            with suppress(OSError):
                await self._connect()
                while not self.is_ready and not self._lost.is_set():
                    self._refuse_late()
                    await asyncio.sleep(RECONNECT_S)
                await self._lost.wait()
            self._refuse_late()
            await asyncio.sleep(RECONNECT_S)

    def close(self) -> None:
        """Fail what is still waiting."""
        if self._connecting:
            self._transport = None
            self._connecting.abort()
        for pending in self.pending.values():
            if not pending.future.done():
                pending.future.set_exception(Draining())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)
            await loop.sock_connect(connection, self._client.path)
            socket.send_fds(connection, [bytes([self._device])], [self._client.slots_fd])
            self._lost.clear()
            await loop.create_unix_connection(lambda: self, sock=connection)
        except BaseException:
            connection.close()
            raise

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._received.clear()
        self._greeted = False
        self._connecting = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while self._transport is None:
            content = take_frame(self._received)
            if content is None:
                return
            if self._greeted:
                self._begin(Ready(**content))
            elif not Hello(**content).answers_like(self._client.hello):
                self._client.on_other_model()
                return
            self._greeted = True
        for reply in take_replies(self._received):
            self._settle(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        was_ready, self._transport = self.is_ready, None
        self._lost.set()
        if not was_ready:
            return
        logger.error("the engine's process has ended; %d images were waiting", len(self.pending))
        for pending in list(self.pending.values()):
            if pending.future.done():  # cancelled
                self._release(pending.request.id)
            elif pending.tries == MAX_TRIES:
                pending.future.set_exception(DeviceFailed())
                self._release(pending.request.id)
            elif not self._may_wait(pending):
                pending.future.set_exception(self._restarting())
                self._release(pending.request.id)

    def _begin(self, ready: Ready) -> None:
        self.costs = CostTable({int(size): s for size, s in ready.seconds.items()}, ready.max_batch_size)
        self.start_s = ready.start_s
        self._slowdown = 1.0
        self._transport = self._connecting
        for pending in self.pending.values():
            self._send(pending)

    def _send(self, pending: _Pending) -> None:
        assert self._transport is not None
        pending.tries += 1
        self._transport.write(pending.request.pack())

    def _settle(self, reply: Reply) -> None:
        pending = self.pending[reply.id]
        slot, slots = pending.request.slot, self._client.slots
        self._slowdown = reply.slowdown
        if not pending.future.done():
            if reply.failed:
                pending.future.set_exception(_error(slots.read_error(slot)))
            else:
                grid = slots.grid(slot, reply.height, reply.width).copy() if reply.height else None
                logits, features = slots.logits[slot].copy(), slots.features[slot].copy()
                times = (reply.queue_s, reply.inference_s)
                pending.future.set_result(Inference(logits, features, *times, reply.batch_size, grid))
        self._release(reply.id)

    def _release(self, id_: int) -> None:
        self._client.free.append(self.pending.pop(id_).request.slot)

    def _may_wait(self, pending: _Pending) -> bool:
        """Whether another process would be ready before the image's deadline."""
        return pending.request.deadline > time.monotonic() + self.start_s

    def _refuse_late(self) -> None:
        """Fail images whose deadline is about to pass without a process: 503 says more than 504 would."""
        soon = time.monotonic() + LAST_MOMENT_S
        for pending in [each for each in self.pending.values() if each.request.deadline < soon]:
            if not pending.future.done():
                pending.future.set_exception(self._restarting())
            self._release(pending.request.id)

    def _restarting(self) -> NotReady:
        return NotReady("the engine is being restarted", self.start_s)


def _error(text: str) -> ServiceError:
    code, message = text.split(" ", 1)
    return ERRORS[code].with_message(message)
