"""Connections that hold nobody up: uvicorn's, with the limits that it leaves to a proxy."""

import asyncio

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import MalformedRequest

LONGEST_HEAD = 65_536  # bytes of a request line and its headers
HEAD_S = 10.0  # for a request's head to arrive, from its first byte, and for the first byte of all
LINGER_S = 10.0  # for the rest of a body whose request has its answer already, an error most likely


class Connection(HttpToolsProtocol):
    """One connection. What is too slow is closed; a head that is too long is an error first.

    The time for a body is no matter of connections: requests have deadlines.
    """

    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _in_head = True
    _in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._close_in(HEAD_S)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > LONGEST_HEAD and not self.transport.is_closing():
            self.send_400_response(f"the head of the request is larger than {LONGEST_HEAD} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._close_in(HEAD_S)

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body, self._head_bytes = False, True, 0
        self._go_on()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and not self.transport.is_closing():
            self._close_in(LINGER_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._go_on()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, answered in the shape of our errors."""
        error = {"error": {"code": MalformedRequest.code, "message": msg}}
        body = orjson.dumps(error)
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def _close_in(self, seconds: float) -> None:
        self._go_on()
        self._timer = self.loop.call_later(seconds, self.transport.close)

    def _go_on(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
