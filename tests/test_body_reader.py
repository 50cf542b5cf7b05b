"""Reading request bodies: size, compression, memory budget and timeouts."""

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest

from rednet.service.errors import Overloaded, PayloadTooLarge, RequestTimeout, UnsupportedMediaType
from rednet.service.parsing.body_file import BodyFile
from rednet.service.parsing.body_reader import BodyReader
from rednet.service.parsing.memory_budget import MemoryBudget
from tests.servers import PATIENCE_S

IN_HEAP = 8


def body_reader(max_bytes: int = 10, budget: MemoryBudget | None = None) -> BodyReader:
    return BodyReader(max_bytes, budget or MemoryBudget(1000))


async def chunked(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def read(
    reader: BodyReader,
    chunks: AsyncIterator[bytes],
    headers: Mapping[bytes, bytes] | None = None,
    timeout_s: float = PATIENCE_S,
) -> bytes:
    async with reader.read(chunks, headers or {}, IN_HEAP, timeout_s) as body:
        return bytes(body.view(0, body.size)) if isinstance(body, BodyFile) else body


@pytest.mark.parametrize("chunks", [(b"01", b"", b"234567", b"89"), (b"0123456789",), (b"0", b"1234567")])
def test_body_is_complete_for_any_chunks(chunks: tuple[bytes, ...]) -> None:
    """In memory or in a file, up to exactly the maximum size."""
    assert asyncio.run(read(body_reader(), chunked(*chunks))) == b"".join(chunks)


@pytest.mark.parametrize(("size", "kind"), [(IN_HEAP, bytes), (IN_HEAP + 1, BodyFile)])
def test_large_body_is_written_to_a_file(size: int, kind: type) -> None:
    """Only bodies above the given size: for small ones, a file would be slower."""

    async def check() -> None:
        async with body_reader().read(chunked(b"x" * size), {}, IN_HEAP, PATIENCE_S) as body:
            assert isinstance(body, kind)

    asyncio.run(check())


@pytest.mark.parametrize(("claimed", "chunks"), [("11", []), (None, [b"123456", b"78901"]), ("5", [b"123456789012"])])
def test_body_too_large_by_its_header_or_its_bytes_is_rejected_early(claimed: str | None, chunks: list[bytes]) -> None:
    """The rest of the body is not read."""
    arrived = 0

    async def stream() -> AsyncIterator[bytes]:
        nonlocal arrived
        for chunk in [*chunks, b"more", b"more"]:
            arrived += 1
            yield chunk

    with pytest.raises(PayloadTooLarge):
        asyncio.run(read(body_reader(), stream(), {b"content-length": claimed.encode()} if claimed else {}))
    assert arrived == len(chunks)


def test_compressed_body_is_rejected() -> None:
    """The error names the compression instead of a damaged image."""
    for none in (b"identity", b"Identity", b""):
        assert asyncio.run(read(body_reader(), chunked(b"x"), {b"content-encoding": none})) == b"x"
    with pytest.raises(UnsupportedMediaType, match="Content-Encoding"):
        asyncio.run(read(body_reader(), chunked(b"x"), {b"content-encoding": b"gzip"}))


def test_memory_of_all_bodies_is_bounded() -> None:
    """A body counts until its request ends. Then, and after a rejection, its memory is available again."""
    budget = MemoryBudget(160)
    reader = body_reader(budget=budget)
    with budget.lease() as lease:
        lease.take(155)
        assert asyncio.run(read(reader, chunked(b"five!"))) == b"five!"
        with pytest.raises(Overloaded) as caught:
            asyncio.run(read(reader, chunked(b"fi", b"ve", b"!!")))
        assert caught.value.retry_after_s > 0
        assert asyncio.run(read(reader, chunked(b"five!"))) == b"five!"
    assert asyncio.run(read(reader, chunked(b"0123456789"))) == b"0123456789"
    assert budget.used == 0


def test_slow_body_is_a_request_timeout_and_releases_memory() -> None:
    """The reservation of the body is released."""
    budget = MemoryBudget(100)

    async def stalls() -> AsyncIterator[bytes]:
        yield b"some"
        await asyncio.sleep(PATIENCE_S)

    with pytest.raises(RequestTimeout):
        asyncio.run(read(body_reader(budget=budget), stalls(), timeout_s=0.05))
    assert budget.used == 0


def test_stalled_upload_whose_lease_is_revoked_is_rejected_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other requests get its memory. Its client gets an error that says so, without waiting for the deadline."""
    monkeypatch.setattr("rednet.service.parsing.memory_budget.UPLOAD_GRACE_S", 0.0)

    async def stalls() -> AsyncIterator[bytes]:
        yield b"0123456"
        await asyncio.sleep(PATIENCE_S)

    async def check() -> None:
        reader = body_reader(budget=MemoryBudget(10))
        stalled = asyncio.create_task(read(reader, stalls()))
        await asyncio.sleep(0.01)
        assert await read(reader, chunked(b"four")) == b"four"
        with pytest.raises(Overloaded, match="slow upload"):
            await asyncio.wait_for(stalled, PATIENCE_S / 10)

    asyncio.run(check())
