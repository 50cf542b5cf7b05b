"""uvicorn's HTTP protocol with the timeouts and size limits that are usually left to a reverse proxy."""

import asyncio

import httptools
import orjson
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from rednet.service.errors import HeadersTooLarge, MalformedRequest, ServiceError
from rednet.service.http.read_buffer import Incoming
from rednet.service.http.request_head import (
    MAX_HEAD_BYTES,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    check_headers,
    check_target,
    origin_form,
    oversized,
)
from rednet.service.http.response_transport import AnswerTransport
from rednet.service.http.slow_readers import ReaderWatch
from rednet.service.http.statuses import STATUS
from rednet.service.observability.log import new_id

HEAD_S = 10.0  # for a request's head to arrive, from its first byte, and for the first byte of all
# A chunk costs a microsecond, however small. Many are fine if they are MIN_CHUNK_BYTES long on average.
FREE_CHUNKS, MIN_CHUNK_BYTES = 2_500, 32
MAX_CHUNKS_AT_ONCE = 1_000  # parsed before the event loop sees to other connections
MAX_CHUNKED_BYTES = 8_192  # of a chunked body that the parser gets at once: it cannot be stopped within them
# Pipelined requests in a row that are answered at once; the ones behind them are paced, so that one connection does not
# keep the event loop busy.
FREE_PIPELINED, PIPELINE_PAUSE_S = 8, 0.005
LINGER_S = 10.0  # for the rest of a body whose request has its answer already, an error most likely


class _Flow(FlowControl):
    """Flow control that does not read on while something that was read waits to be parsed."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """One connection. What is too slow is closed; a head that is too large is answered with an error first.

    Bodies have no timeout here: requests have deadlines. Pipelined requests are answered one by one: what follows a
    request stays unparsed, and the connection unread, until the answer is complete. Meanwhile the server does not
    notice when the client leaves.
    """

    flow: _Flow
    _timer: asyncio.TimerHandle | None = None  # closes the connection
    _resuming: asyncio.Handle | None = None  # parses the rest of what has come
    _since_progress = 0  # bytes since the last head or piece of a body
    _chunked = False
    _chunks = _chunk_bytes = _chunks_at_once = 0  # pieces of this chunked body
    _pipelined = 0  # requests in a row that waited behind the one before
    _in_head = False
    _in_body = False
    _closing = False  # as soon as the body that is coming has come

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._incoming = Incoming()
        self._reader = ReaderWatch(self.loop, transport)
        self._close_in(HEAD_S)

    def data_received(self, data: bytes) -> None:
        waits = bool(self._incoming)  # the transport had read this before it paused
        self._incoming.add(data)
        if not waits:
            self._parse()

    def _parse(self) -> None:
        """Parse what has come, up to the end of a request that must be answered first."""
        self._unset_keepalive_if_required()
        self._chunks_at_once = 0
        try:
            while self._incoming and self._may_parse():
                piece = self._incoming.next(MAX_CHUNKED_BYTES if self._in_body else None)
                self._since_progress += len(piece)
                self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            self._decline()
            return
        except httptools.HttpParserError as error:
            reason = error.__context__
            self._refuse(reason if isinstance(reason, ServiceError) else MalformedRequest(f"invalid HTTP: {error}"))
        if self.transport.is_closing():
            self._incoming.clear()
        elif self._since_progress > MAX_HEAD_BYTES:
            self._refuse(
                HeadersTooLarge(f"the headers or trailers of the request are larger than {MAX_HEAD_BYTES} bytes")
            )
        else:
            self._wait_or_read_on()

    def _may_parse(self) -> bool:
        answering = self.cycle and not self._in_body and not self.cycle.response_complete
        return not (answering or self._chunks_at_once > MAX_CHUNKS_AT_ONCE or self.transport.is_closing())

    def _wait_or_read_on(self) -> None:
        """Stop reading while something waits to be parsed."""
        waits = bool(self._incoming)
        if waits:
            self.flow.pause_reading()
            if self._chunks_at_once > MAX_CHUNKS_AT_ONCE:
                self._resume_soon()
        elif not (self._timer or self.timeout_keep_alive_task) and self.cycle and self.cycle.response_complete:
            self._close_in(self.timeout_keep_alive)  # this was not a request: an empty line, or the end of a body
        if self.flow.held != waits:
            self.flow.held = waits
            self.flow.resume_reading()

    def _resume_soon(self, pause_s: float = 0.0) -> None:
        if self._incoming and not self._resuming:
            later = self.loop.call_later
            self._resuming = later(pause_s, self._resume) if pause_s else self.loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._resuming = None
        if not self.transport.is_closing():
            self._parse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._close_in(HEAD_S)

    def on_url(self, url: bytes) -> None:
        self.url += url
        check_target(self.url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer, which must not pass for a header (RFC 9110, section 6.5.1)
        name, value = name.lower(), value.strip(b" \t")
        if len(name) + len(value) > MAX_HEADER_BYTES or len(self.headers) >= MAX_HEADERS:
            raise oversized(name)
        if name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        if name != b"cookie":  # unused here, but FastAPI would parse them for every request
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():  # to which `_parse` says no
            return
        if self._since_progress > MAX_HEAD_BYTES:
            raise HeadersTooLarge(f"the head of the request is larger than {MAX_HEAD_BYTES} bytes")
        version = self.parser.get_http_version()
        headers = check_headers(version, self.headers)
        self.url = origin_form(self.url)
        self.expect_100_continue &= version != "1.0"
        self._chunked = b"transfer-encoding" in headers
        self._incoming.length_left = 0 if self._chunked else int(headers.get(b"content-length", b"0"))
        self._chunks = self._chunk_bytes = 0
        self._in_head, self._in_body, self._since_progress = False, True, 0
        self._go_on()
        super().on_headers_complete()
        self.cycle.transport = AnswerTransport(self.transport, self.close_after_body)  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        self._since_progress = 0
        if self._chunked:
            self._chunks += 1
            self._chunks_at_once += 1
            self._chunk_bytes += len(body)
            if self._chunks > FREE_CHUNKS + self._chunk_bytes // MIN_CHUNK_BYTES:
                raise MalformedRequest("the chunks of the body are too small")  # the parser stops here
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_body, self._since_progress = False, 0
        self._go_on()
        super().on_message_complete()
        if self._closing:
            self.transport.close()

    def on_response_complete(self) -> None:
        self.cycle.transport.flush()  # type: ignore[attr-defined]
        super().on_response_complete()
        if self.transport.is_closing():
            return
        self._pipelined = self._pipelined + 1 if self._incoming else 0
        self._resume_soon(PIPELINE_PAUSE_S if self._pipelined > FREE_PIPELINED else 0.0)
        if self._in_body:
            self._close_in(LINGER_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reader.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._go_on()
        self._reader.stop()
        super().connection_lost(exc)
        self._incoming.clear()
        self.cycle = None  # type: ignore[assignment]  # each refers to the other: memory would wait for the collector

    def _refuse(self, error: ServiceError) -> None:
        """Answer what is not a request in the shape of our errors, with an id like every answer, and close."""
        request_id = new_id()
        self.logger.warning("refused a connection, request_id=%s: %s", request_id, error.message)
        if not self.cycle or self.cycle.response_complete or not self.cycle.response_started:
            body = orjson.dumps({"error": {"code": error.code, "message": error.message}})
            headers = (
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\nx-request-id: {request_id}\r\n"
                "cache-control: no-store\r\nx-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(STATUS_LINE[STATUS[type(error)]] + headers.encode() + body)
        self.transport.close()

    def close_after_body(self) -> None:
        """Close, but not under a body that is still coming: the system would take back the answer to it."""
        if self._in_body and not self.transport.is_closing():
            self._closing = True
            self.transport.write_eof()
            self.flow.resume_reading()
            self._close_in(LINGER_S)
        else:
            self.transport.close()

    def _decline(self) -> None:
        """Go on in HTTP/1.1 where a client offers another protocol. The parser took this head for the last."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(MalformedRequest("CONNECT is not served"))
            return
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self._since_progress = 0
        rest = self._incoming.rest()
        self._incoming.clear()
        self._incoming.add(b"\r\n".join([*lines, b"", b""]) + rest)
        self._parse()

    def _close_in(self, seconds: float) -> None:
        self._go_on()
        self._timer = self.loop.call_later(seconds, self.transport.close)

    def _go_on(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
