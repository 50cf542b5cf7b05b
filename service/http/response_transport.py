"""A connection's transport as the answer to one request sees it."""

import asyncio
from collections.abc import Callable


class AnswerTransport:
    """Sends the head of an answer together with its body, which takes half as long as one after the other.

    Args:
        transport: of the connection.
        close: closes the connection, once this answer has been handed to the transport.
    """

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport = transport
        self._close = close
        self._head: bytes | None = None  # None: it has not come yet; empty: it was handed on
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self._head is None:
            if data.startswith(b"HTTP/1.1 100 "):  # leave to send a body
                self._transport.write(data)
            else:
                self._head = data
            return
        data, self._head = self._head + data, b""
        if data and not self.is_closing():
            self._transport.write(data)

    def flush(self) -> None:
        """Send the head of an answer that has no body."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self._close()
