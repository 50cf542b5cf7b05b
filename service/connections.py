"""Connections that hold nobody up: uvicorn's, with the limits that it leaves to a proxy."""

import asyncio
import socket
import struct
import sys

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.errors import MalformedRequest
from service.log import new_id

if sys.platform == "linux":
    import fcntl
    import termios

LONGEST_HEAD = 65_536  # bytes of a request line and its headers, and of whatever else is neither that nor a body
HEAD_S = 10.0  # for a request's head to arrive, from its first byte, and for the first byte of all
MAX_PIECES = 2_500  # of a body, in what is read from a connection at once (256 kB): each chunk costs a microsecond
LINGER_S = 10.0  # for the rest of a body whose request has its answer already, an error most likely
UNREAD_S = 30.0  # in which a caller must read something of an answer
UNREAD_BYTES = 100_000  # so much: less is no line that anyone has, but would hold an answer in memory for long


class Connection(HttpToolsProtocol):
    """One connection. What is too slow is closed; a head that is too long is an error first.

    The time for a body is no matter of connections: requests have deadlines. Who sends another request before
    the last one's answer is not read any further meanwhile, and so not seen to leave.
    """

    _timer: asyncio.TimerHandle | None = None  # closes the connection
    _unread: asyncio.TimerHandle | None = None  # likewise, while the caller does not read
    _since_progress = 0  # bytes since the last head or piece of a body
    _pieces = 0  # of a body, in what is being parsed
    _in_head = False
    _in_body = False
    _closing = False  # as soon as the body that is coming has come
    _held = b""  # a head whose body is a moment away

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._close_in(HEAD_S)

    def data_received(self, data: bytes) -> None:
        self._since_progress += len(data)
        self._pieces = 0
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except httptools.HttpParserError:
            tiny = self._pieces > MAX_PIECES
            self.send_400_response("the chunks of the body are too small" if tiny else "Invalid HTTP request received.")
        if self.transport.is_closing():
            return
        if self._since_progress > LONGEST_HEAD:
            self.send_400_response(f"the head of the request is larger than {LONGEST_HEAD} bytes")
        elif not (self._timer or self.timeout_keep_alive_task) and self.cycle and self.cycle.response_complete:
            self._close_in(self.timeout_keep_alive)  # what has come is no request: an empty line, or the end of a body

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        if not self.cycle or self.cycle.response_complete:  # otherwise it would cost the request before its answer
            self._close_in(HEAD_S)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():  # to which `data_received` says no
            return
        self._in_head, self._in_body, self._since_progress = False, True, 0
        self._go_on()
        super().on_headers_complete()
        self.cycle.transport = _Lingering(self, self.cycle)  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        self._since_progress = 0
        self._pieces += 1
        if self._pieces > MAX_PIECES:
            raise httptools.HttpParserError  # the parser stops here
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_body = False
        self._go_on()
        super().on_message_complete()
        if self._closing:
            self.transport.close()

    def on_response_complete(self) -> None:
        self.write(b"")
        super().on_response_complete()
        if (self._in_head or self._in_body) and self.cycle.response_complete and not self.transport.is_closing():
            self._close_in(HEAD_S if self._in_head else LINGER_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._is_read()

    def connection_lost(self, exc: Exception | None) -> None:
        self._go_on()
        self._is_read()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, answered in the shape of our errors, and with an id like every answer."""
        request_id = new_id()
        self.logger.warning("no HTTP, request_id=%s: %s", request_id, msg)
        body = orjson.dumps({"error": {"code": MalformedRequest.code, "message": msg}})
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}x-request-id: {request_id}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def write(self, data: bytes, more: bool = False) -> None:
        """Write now, or with what comes next: a head and its body are sent as one, which takes half as long."""
        data, self._held = self._held + data, b""
        if self.transport.is_closing():
            return  # of several requests at once, uvicorn tells only the last one of the end
        if more:
            self._held = data
        elif data:
            self.transport.write(data)

    def close_after_body(self) -> None:
        """Close, but not under a body that is still coming: the system would take back the answer to it."""
        if self._in_body and not self.transport.is_closing():
            self._closing = True
            self.transport.write_eof()
            self.flow.resume_reading()
            self._close_in(LINGER_S)
        else:
            self.transport.close()

    def _decline(self, rest: bytes) -> None:
        """Go on in HTTP/1.1 where a caller offers another protocol. The parser has taken the head for the last of it.

        Args:
            rest: what came behind the head.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("CONNECT is not served")
            return
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _watch_reader(self) -> None:
        self._unread = self.loop.call_later(UNREAD_S, self._check_reader, self._left_to_send())

    def _check_reader(self, left_before: int) -> None:
        if left_before - self._left_to_send() < UNREAD_BYTES:
            self._cut_off()
        else:
            self._watch_reader()

    def _left_to_send(self) -> int:
        """Bytes, also those that the system holds: it takes new ones only when a large part of those has gone."""
        held = bytes(4)
        if sys.platform == "linux":
            held = fcntl.ioctl(self._socket().fileno(), termios.TIOCOUTQ, held)
        return self.transport.get_write_buffer_size() + int.from_bytes(held, sys.byteorder)

    def _socket(self) -> socket.socket:
        connection: socket.socket = self.transport.get_extra_info("socket")
        return connection

    def _cut_off(self) -> None:
        """Close at once: the system, too, drops what it still holds for the caller."""
        self._socket().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _close_in(self, seconds: float) -> None:
        self._go_on()
        self._timer = self.loop.call_later(seconds, self.transport.close)

    def _go_on(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _is_read(self) -> None:
        if self._unread:
            self._unread.cancel()
            self._unread = None


class _Lingering:
    """A connection's transport as one request sees it."""

    def __init__(self, connection: Connection, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle
        self._in_head = True
        self.is_closing = connection.transport.is_closing

    def write(self, data: bytes) -> None:
        head = self._in_head and self._cycle.response_started  # before that, it is leave to send a body
        self._in_head &= not head
        self._connection.write(data, more=head)

    def close(self) -> None:
        self._connection.close_after_body()
