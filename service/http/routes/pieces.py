"""Builds and sends large responses in pieces, so that they do not block the event loop or exceed the memory budget."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fastapi import Response
from starlette.types import Receive, Scope, Send

from rednet.service.parsing.memory_budget import MemoryBudget

PIECE_BYTES = 65_536  # sent at once; responses up to this size are sent whole


def comma_separated(items: Iterable[bytes]) -> Iterator[bytes]:
    """The items with commas in between: the contents of a JSON list."""
    for index, item in enumerate(items):
        yield b"," + item if index else item


class PiecesResponse(Response):
    """A response that sends a large body as fast as the client reads it, and counts it in the memory budget meanwhile.

    Args:
        pieces: of the body.
        media_type: of the body.
        headers: additional headers.
        budget: for the memory of a large body. If it is used up, sending the response raises `Overloaded`.
    """

    def __init__(
        self, pieces: Sequence[bytes], media_type: str, headers: Mapping[str, str], budget: MemoryBudget
    ) -> None:
        self._size = sum(map(len, pieces))
        self._budget = budget
        self._pieces = pieces if self._size > PIECE_BYTES else ()
        content = b"" if self._pieces else b"".join(pieces)
        super().__init__(content, 200, {**headers, "Content-Length": str(self._size)}, media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._pieces:
            await super().__call__(scope, receive, send)
            return
        with self._budget.lease() as lease:
            lease.take(self._size)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for piece in _equal_pieces(self._pieces):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b""})


def _equal_pieces(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of `PIECE_BYTES` or slightly more."""
    buffer = bytearray()
    for piece in pieces:
        for start in range(0, len(piece), PIECE_BYTES):
            buffer += memoryview(piece)[start : start + PIECE_BYTES]
            if len(buffer) >= PIECE_BYTES:
                yield bytes(buffer)
                buffer.clear()
    yield bytes(buffer)
