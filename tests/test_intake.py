"""Bodies as they arrive: too large, compressed, too many."""

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest

from service.errors import Overloaded, PayloadTooLarge, UnsupportedMediaType
from service.intake import LARGEST_BODIES, Intake


async def chunked(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def read(intake: Intake, chunks: AsyncIterator[bytes], headers: Mapping[bytes, bytes] | None = None) -> bytes:
    with intake.room() as take:
        return asyncio.run(intake.read(chunks, headers or {}, take))


def test_a_body_is_put_together() -> None:
    """However it is cut; it may be exactly as large as allowed."""
    assert read(Intake(10), chunked(b"01", b"", b"234567", b"89")) == b"0123456789"


@pytest.mark.parametrize(("claimed", "chunks"), [("11", []), (None, [b"123456", b"78901"]), ("5", [b"123456789012"])])
def test_a_body_is_refused_as_soon_as_it_is_known_to_be_too_large(claimed: str | None, chunks: list[bytes]) -> None:
    """By what it claims or by what has arrived, whichever tells first; what comes after is not read."""
    arrived = 0

    async def stream() -> AsyncIterator[bytes]:
        nonlocal arrived
        for chunk in [*chunks, b"more", b"more"]:
            arrived += 1
            yield chunk

    with pytest.raises(PayloadTooLarge):
        read(Intake(10), stream(), {b"content-length": claimed.encode()} if claimed else {})
    assert arrived == len(chunks)


def test_a_compressed_body_is_refused() -> None:
    """With an error that says so, instead of one about a damaged image."""
    for none in (b"identity", b"Identity", b""):
        assert read(Intake(10), chunked(b"x"), {b"content-encoding": none}) == b"x"
    with pytest.raises(UnsupportedMediaType, match="Content-Encoding"):
        read(Intake(10), chunked(b"x"), {b"content-encoding": b"gzip"})


def test_all_bodies_together_are_bounded() -> None:
    """What is held until its request ends counts; then there is room again, also after a refusal."""
    intake = Intake(10)
    with intake.room() as take:
        take(10 * LARGEST_BODIES - 5)
        assert read(intake, chunked(b"five!")) == b"five!"
        with pytest.raises(Overloaded) as caught:
            read(intake, chunked(b"fi", b"ve", b"!!"))
        assert caught.value.retry_after_s > 0
        assert read(intake, chunked(b"five!")) == b"five!"
    assert read(intake, chunked(b"0123456789")) == b"0123456789"
