"""Receives messages within limits on time and memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from rednet.service.errors import DeadlineExceeded, Draining, MalformedRequest, Overloaded
from rednet.service.grpc.calls import Call
from rednet.service.grpc.messages import decode
from rednet.service.parsing.memory_budget import RETRY_S, MemoryBudget

MAX_SMALL_BYTES = 65_536  # of a message without tensors


class MessageReader:
    """Receives messages, and accounts for their memory. Used from one event loop.

    Args:
        budget: for messages that have arrived, and for responses until they are sent.
        max_arriving: the most messages that may be on their way at once. One more makes the slowest give way, or is
            refused. gRPC shows neither the size of such a message nor how much of it has arrived, so that their memory
            can only be bounded by their number.
    """

    def __init__(self, budget: MemoryBudget, max_arriving: int) -> None:
        self._budget = budget
        self._slots = MemoryBudget(max_arriving)
        self._timers: set[asyncio.Timeout] = set()  # of messages that are arriving
        self._closed = False

    @asynccontextmanager
    async def read(self, call: Call) -> AsyncIterator[memoryview]:
        """Receive the message of a call, whose memory is held until the context ends.

        Raises:
            DeadlineExceeded: it did not arrive in time.
            Draining: the server stopped while it was arriving.
            MalformedRequest: there is none.
            Overloaded: other messages needed its memory.
        """
        message = await self._receive(call)
        with self._budget.lease() as lease:
            lease.take(len(message))
            yield memoryview(message)

    async def read_small(self, call: Call, kind: Any) -> Any:
        """Receive and parse a message that holds no tensors; raises what `read` raises.

        Args:
            call: whose message it is.
            kind: the class of the message.
        """
        async with self.read(call) as message:
            if len(message) > MAX_SMALL_BYTES:
                raise MalformedRequest(f"the message is larger than {MAX_SMALL_BYTES} bytes")
            return decode(kind, bytes(message))

    def hold_response(self, call: Call, size: int) -> None:
        """Account for the memory of a response until it is sent; raises `Overloaded` if there is none left."""
        with ExitStack() as stack:
            stack.enter_context(self._budget.lease()).take(size)
            call.on_done(stack.pop_all().close)

    def close(self) -> None:
        """Give up on messages that are still arriving."""
        self._closed = True
        for timer in self._timers:
            timer.reschedule(0)

    async def _receive(self, call: Call) -> bytes:
        loop = asyncio.get_running_loop()
        with self._slots.lease() as slot:
            try:
                async with asyncio.timeout(call.timeout_s) as timer:
                    slot.on_revoke = lambda: timer.reschedule(loop.time())
                    slot.take(1)
                    self._timers.add(timer)
                    try:
                        return await call.read()
                    finally:
                        self._timers.discard(timer)
            except TimeoutError:
                if self._closed:
                    raise Draining from None
                if slot.revoked:
                    message = "other requests needed the memory of this slow upload; try again later"
                    raise Overloaded(message, RETRY_S) from None
                raise DeadlineExceeded("no answer before the deadline") from None
