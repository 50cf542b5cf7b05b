"""Reads request bodies within limits on size, memory and time."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from rednet.service.errors import Overloaded, PayloadTooLarge, RequestTimeout, UnsupportedMediaType
from rednet.service.parsing.body_file import BodyFile
from rednet.service.parsing.memory_budget import RETRY_S, MemoryBudget, MemoryLease


class BodyReader:
    """Reads request bodies.

    Args:
        max_bytes: of one body.
        budget: for all bodies together.
    """

    def __init__(self, max_bytes: int, budget: MemoryBudget) -> None:
        self._max_bytes = max_bytes
        self._budget = budget

    @asynccontextmanager
    async def read(
        self, chunks: AsyncIterator[bytes], headers: Mapping[bytes, bytes], max_heap_bytes: int, timeout_s: float
    ) -> AsyncIterator[bytes | BodyFile]:
        """Read a body, whose memory is held until the context ends.

        Args:
            chunks: of the body.
            headers: of the request.
            max_heap_bytes: larger bodies are written to a file in shared memory, so that they are never copied.
            timeout_s: for the whole body to arrive.

        Raises:
            PayloadTooLarge: the body is, or claims to be, larger than max_bytes. Raised as early as possible.
            UnsupportedMediaType: the body has a Content-Encoding.
            Overloaded: the memory budget is used up, or other requests needed the memory of this slow upload.
            RequestTimeout: the body did not arrive in time.
        """
        encoding = headers.get(b"content-encoding", b"").strip().lower()
        if encoding not in (b"", b"identity"):
            shown = repr(encoding[:20].decode("latin-1"))
            raise UnsupportedMediaType(f"Content-Encoding {shown} is not supported; send the body uncompressed")
        claimed = headers.get(b"content-length", b"")
        if claimed.isdigit() and int(claimed) > self._max_bytes:
            raise self._too_large()
        with self._budget.lease() as lease:
            received = _Received(max_heap_bytes)
            try:
                await self._receive(chunks, lease, received, timeout_s)
                yield received.file or b"".join(received.parts)
            finally:
                if received.file:
                    received.file.close()

    async def _receive(
        self, chunks: AsyncIterator[bytes], lease: MemoryLease, received: "_Received", timeout_s: float
    ) -> None:
        try:
            async with asyncio.timeout(timeout_s) as timer:
                loop = asyncio.get_running_loop()
                lease.on_revoke = lambda: timer.reschedule(loop.time())
                async for chunk in chunks:
                    if received.size + len(chunk) > self._max_bytes:
                        raise self._too_large()
                    lease.take(len(chunk))
                    received.add(chunk)
        except TimeoutError:
            if lease.revoked:
                message = "other requests needed the memory of this slow upload; try again later"
                raise Overloaded(message, RETRY_S) from None
            raise RequestTimeout("the body did not arrive in time") from None
        finally:
            lease.on_revoke = None

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body is larger than {self._max_bytes} bytes")


class _Received:
    """The part of a body that has arrived: a list of chunks while it is small, then a file."""

    def __init__(self, max_heap_bytes: int) -> None:
        self._max_heap_bytes = max_heap_bytes
        self.size = 0
        self.parts: list[bytes] = []
        self.file: BodyFile | None = None

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.file:
            self.file.append(chunk)
            return
        self.parts.append(chunk)
        if self.size > self._max_heap_bytes:
            self.file = BodyFile()
            for part in self.parts:
                self.file.append(part)
            self.parts.clear()
