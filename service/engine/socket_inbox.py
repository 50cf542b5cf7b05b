"""An `Inbox` for images from front ends in other processes. The engine's thread reads them from the sockets itself:
handing them over from another thread would cost more than everything else that is done for an image."""

import select
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

from rednet.service.engine.inbox import Message
from rednet.service.engine.messages import CANCEL, REPLY, Request, take_requests
from rednet.service.engine.slots import Slots
from rednet.service.errors import ServiceError
from rednet.service.types import Inference, Job

READ_BYTES = 65_536
ID_BITS = 32  # of an image's id within its front end; the bits above are the front end's number


class Slowed(Protocol):
    """What a front end learns from the engine with every reply."""

    @property
    def slowdown(self) -> float:
        """The factor by which batches take longer than measured at present."""


class FrontEndLink:
    """The connection to one front end. Used on the engine's thread.

    Args:
        connection: to the front end.
        slots: of the front end.
        number: unique among the front ends of this engine.
        engine: that runs its images.
    """

    def __init__(self, connection: socket.socket, slots: Slots, number: int, engine: Slowed) -> None:
        self.connection = connection
        self._slots, self._number, self._engine = slots, number, engine
        self._running: set[int] = set()  # ids of images without a reply
        self._received, self._unsent = bytearray(), bytearray()

    def receive(self) -> Iterator[Message]:
        """Read what has arrived.

        Raises:
            EOFError: the front end has closed the connection, or died.
        """
        try:
            data = self.connection.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            raise EOFError
        self._received += data
        now = time.monotonic()
        for request in take_requests(self._received):
            job_id = self._number << ID_BITS | request.id
            if request.kind == CANCEL:
                yield job_id
            else:
                self._running.add(request.id)
                pixels = self._slots.pixels[request.kind][request.slot]
                yield Job(job_id, pixels, now, request.deadline, partial(self._reply, request), request.explain)

    def cancel_all(self) -> Sequence[Message]:
        """Messages that cancel every image without a reply."""
        return [self._number << ID_BITS | each for each in self._running]

    def send(self) -> None:
        """Send the replies so far, as far as the socket takes them. It always has room for a reply to every slot,
        unless the front end has stopped reading."""
        if not self._unsent:
            return
        try:
            del self._unsent[: self.connection.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:  # the front end is gone, as the next read will show
            self._unsent.clear()

    def _reply(self, request: Request, outcome: Inference | ServiceError) -> None:
        slot = request.slot
        self._running.discard(request.id)
        if isinstance(outcome, ServiceError):
            self._slots.write_error(slot, f"{outcome.code} {outcome.message}")
            self._unsent += REPLY.pack(request.id, True, 0, 0, 0, 0.0, 0.0, self._engine.slowdown)
            return
        self._slots.logits[slot] = outcome.logits
        self._slots.features[slot] = outcome.features
        height, width = (0, 0) if outcome.grid is None else outcome.grid.shape
        if outcome.grid is not None:
            self._slots.grid(slot, height, width)[:] = outcome.grid
        self._unsent += REPLY.pack(
            request.id,
            False,
            outcome.batch_size,
            height,
            width,
            outcome.queue_s,
            outcome.inference_s,
            self._engine.slowdown,
        )


class SocketInbox:
    """An `Inbox` for images from front ends.

    Replies are sent when the engine next asks for messages, those of a batch together.
    """

    def __init__(self) -> None:
        self._links: dict[socket.socket, FrontEndLink] = {}
        self._from_threads: deque[Message | FrontEndLink] = deque()
        self._waker, self._wakes = socket.socketpair()
        self._waker.setblocking(False)
        self._wakes.setblocking(False)

    def put(self, message: Message | FrontEndLink) -> None:
        """Send a message, or add a front end, from any thread."""
        self._from_threads.append(message)
        self._waker.send(b"\0")

    def get(self, timeout_s: float | None) -> Sequence[Message]:
        self._send_replies()
        messages: list[Message] = []
        # Not epoll, which waits for whole milliseconds: a GPU is to have its next batch in time.
        ready, _, _ = select.select([self._wakes, *self._links], (), (), timeout_s)
        for each in ready:
            if each is self._wakes:
                self._wakes.recv(READ_BYTES)
                while self._from_threads:
                    message = self._from_threads.popleft()
                    if isinstance(message, FrontEndLink):
                        self._links[message.connection] = message
                    else:
                        messages.append(message)
            else:
                self._read(self._links[each], messages)
        return messages

    def close(self) -> None:
        self._send_replies()
        for each in (self._waker, self._wakes, *self._links):
            each.close()

    def _read(self, link: FrontEndLink, messages: list[Message]) -> None:
        try:
            messages.extend(link.receive())
        except EOFError:
            messages.extend(link.cancel_all())
            del self._links[link.connection]
            link.connection.close()

    def _send_replies(self) -> None:
        for link in self._links.values():
            link.send()
