"""Request bodies, as they arrive."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from rednet.service.errors import Overloaded, PayloadTooLarge, RequestTimeout, UnsupportedMediaType
from rednet.service.parsing.body_file import BodyFile
from rednet.service.parsing.memory_budget import RETRY_S, Claim, MemoryBudget


class Intake:
    """Takes in bodies: none larger than allowed, and not more together than there is room for.

    Args:
        max_bytes: of one body.
        budget: for all bodies together.
    """

    def __init__(self, max_bytes: int, budget: MemoryBudget) -> None:
        self._max_bytes = max_bytes
        self._budget = budget

    @asynccontextmanager
    async def body(
        self, chunks: AsyncIterator[bytes], headers: Mapping[bytes, bytes], in_heap: int, timeout_s: float
    ) -> AsyncIterator[bytes | BodyFile]:
        """The whole body, or an error as soon as it is known to be too large, whatever its Content-Length claims.

        Args:
            chunks: of the body.
            headers: of the request.
            in_heap: larger bodies are put into a file in shared memory, where nothing of their size is ever copied.
            timeout_s: for the body to arrive.

        Raises:
            PayloadTooLarge: it has, or claims, more than max_bytes.
            UnsupportedMediaType: it is compressed, beyond what image formats do themselves.
            Overloaded: there is no room for it, or not any more.
            RequestTimeout: it did not arrive in time.
        """
        if headers.get(b"content-encoding", b"").strip().lower() not in (b"", b"identity"):
            raise UnsupportedMediaType("a Content-Encoding is not read; send the body as it is")
        claimed = headers.get(b"content-length", b"")
        if claimed.isdigit() and int(claimed) > self._max_bytes:
            raise self._too_large()
        with self._budget.claim() as claim:
            received = _Received(in_heap)
            try:
                await self._receive(chunks, claim, received, timeout_s)
                yield received.file or b"".join(received.parts)
            finally:
                if received.file:
                    received.file.close()

    async def _receive(
        self, chunks: AsyncIterator[bytes], claim: Claim, received: "_Received", timeout_s: float
    ) -> None:
        try:
            async with asyncio.timeout(timeout_s) as timer:
                loop = asyncio.get_running_loop()
                claim.on_loss = lambda: timer.reschedule(loop.time())
                async for chunk in chunks:
                    if received.size + len(chunk) > self._max_bytes:
                        raise self._too_large()
                    claim.take(len(chunk))
                    received.add(chunk)
        except TimeoutError:
            if claim.lost:
                raise Overloaded("others needed the room of this slow upload; try again later", RETRY_S) from None
            raise RequestTimeout("the body did not arrive in time") from None
        finally:
            claim.on_loss = None

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body is larger than {self._max_bytes} bytes")


class _Received:
    """The part of a body that has arrived: a list of pieces while it is small, then a file."""

    def __init__(self, in_heap: int) -> None:
        self._in_heap = in_heap
        self.size = 0
        self.parts: list[bytes] = []
        self.file: BodyFile | None = None

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.file:
            self.file.append(chunk)
            return
        self.parts.append(chunk)
        if self.size > self._in_heap:
            self.file = BodyFile()
            for part in self.parts:
                self.file.append(part)
            self.parts.clear()
