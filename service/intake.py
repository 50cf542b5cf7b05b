"""Request bodies, as they arrive."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager

from service.errors import Overloaded, PayloadTooLarge, UnsupportedMediaType

LARGEST_BODIES = 16  # of the largest size, that may be held at a time; of photos of an everyday size that is thousands
FULL_RETRY_S = 1.0


class Intake:
    """Takes in bodies: none larger than allowed, and not more together than there is room for.

    Args:
        max_bytes: of one body.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._most = LARGEST_BODIES * max_bytes
        self._held = 0

    @contextmanager
    def room(self) -> Iterator[Callable[[int], None]]:
        """Room for what a request brings, as long as it lasts; the function takes some of it.

        Raises:
            Overloaded: none is left; from the function.
        """
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if self._held + size > self._most:
                raise Overloaded("too many large bodies at once; try again later", FULL_RETRY_S)
            taken += size
            self._held += size

        try:
            yield take
        finally:
            self._held -= taken

    async def read(
        self, chunks: AsyncIterator[bytes], headers: Mapping[bytes, bytes], take: Callable[[int], None]
    ) -> bytes:
        """The whole body, or an error as soon as it is known to be too large, whatever its Content-Length claims.

        Raises:
            PayloadTooLarge: it has, or claims, more than max_bytes.
            UnsupportedMediaType: it is compressed, beyond what image formats do themselves.
            Overloaded: as `room` says.
        """
        if headers.get(b"content-encoding", b"").strip().lower() not in (b"", b"identity"):
            raise UnsupportedMediaType("a Content-Encoding is not read; send the body as it is")
        too_large = PayloadTooLarge(f"the body is larger than {self._max_bytes} bytes")
        claimed = headers.get(b"content-length", b"")
        if claimed.isdigit() and int(claimed) > self._max_bytes:
            raise too_large
        parts, size = [], 0
        async for chunk in chunks:
            size += len(chunk)
            if size > self._max_bytes:
                raise too_large
            take(len(chunk))
            parts.append(chunk)
        return b"".join(parts)
