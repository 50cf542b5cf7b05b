"""Large answers, made and sent piece by piece: none of them holds the event loop, or memory beyond the budget."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from rednet.service.parsing.memory_budget import MemoryBudget

Item = TypeVar("Item")

SLICE_S = 0.001  # of work, before others have their turn
PIECE_BYTES = 65_536  # sent at once; smaller answers are sent whole


async def in_turns(items: Iterable[Item]) -> AsyncIterator[Item]:
    """The same items; every millisecond of work on them the event loop sees to others."""
    since = time.monotonic()
    for item in items:
        yield item
        if time.monotonic() - since > SLICE_S:
            await asyncio.sleep(0)
            since = time.monotonic()


def comma_separated(items: Iterable[bytes]) -> Iterator[bytes]:
    """The inside of a JSON list."""
    for index, item in enumerate(items):
        yield b"," + item if index else item


class PiecesResponse(Response):
    """A response whose body, if it is large, goes out as fast as its caller reads, and counts in the memory budget.

    Args:
        pieces: of the body.
        media_type: of the body.
        headers: more of them.
        budget: of which a large body is a part until it is sent; `Overloaded` where there is no room for it.
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
        with self._budget.claim() as claim:
            claim.take(self._size)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for piece in _cut(self._pieces):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b""})


def _cut(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of one size."""
    buffer = bytearray()
    for piece in pieces:
        for start in range(0, len(piece), PIECE_BYTES):
            buffer += memoryview(piece)[start : start + PIECE_BYTES]
            if len(buffer) >= PIECE_BYTES:
                yield bytes(buffer)
                buffer.clear()
    yield bytes(buffer)
