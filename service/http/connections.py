"""uvicorn's HTTP protocol with the timeouts and size limits that are usually left to a reverse proxy."""

import asyncio

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from rednet.service.errors import HeadersTooLarge, MalformedRequest, ServiceError
from rednet.service.http.read_buffer import ReadBuffer, ReadFlowControl
from rednet.service.http.request_head import (
    MAX_HEAD_BYTES,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    check_headers,
    check_target,
    origin_form,
    oversized,
)
from rednet.service.http.response_transport import ResponseTransport
from rednet.service.http.slow_readers import SlowReaderMonitor
from rednet.service.observability.log import new_id
from rednet.service.statuses import STATUS

HEAD_TIMEOUT_S = 10.0  # for the first byte on a connection, and for a whole head from its first byte
# A chunk costs a microsecond, however small. More than FREE_CHUNKS must be MIN_CHUNK_BYTES long on average.
FREE_CHUNKS, MIN_CHUNK_BYTES = 2_500, 32
MAX_CHUNKS_AT_ONCE = 1_000  # parsed before the event loop serves other connections
MAX_CHUNKED_BYTES = 8_192  # of a chunked body, passed to the parser at once: it cannot be stopped in between
# After FREE_PIPELINED pipelined requests in a row, the following ones are delayed, so that one connection cannot keep
# the event loop busy.
FREE_PIPELINED, PIPELINE_DELAY_S = 8, 0.005
MAPPED_IPV4 = "::ffff:"  # how a socket for IPv6 and IPv4 writes IPv4 addresses
LINGER_TIMEOUT_S = 10.0  # for the rest of a body whose request was answered early, most likely with an error


class Connection(HttpToolsProtocol):
    """One HTTP connection.

    It is closed when the client is too slow. A head that is too large is answered with an error first. Bodies have no
    timeout here, because requests have deadlines.

    Pipelined requests are answered one by one: until the response is complete, the data behind a request is not parsed,
    and the connection is not read, so that the server does not notice a disconnect meanwhile.
    """

    flow: ReadFlowControl
    _timeout: asyncio.TimerHandle | None = None  # closes the connection
    _resume_handle: asyncio.Handle | None = None  # parses the rest of the received data
    _bytes_since_progress = 0  # since the last complete head or piece of a body
    _chunked = False
    _chunks = _chunk_bytes = _chunks_at_once = 0  # of the current body
    _pipelined = 0  # requests in a row that had to wait for the one before
    _in_head = False
    _in_body = False
    _closing = False  # when the current body has arrived

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.client and self.client[0].startswith(MAPPED_IPV4):
            self.client = (self.client[0].removeprefix(MAPPED_IPV4), self.client[1])
        self.flow = ReadFlowControl(transport)
        self._incoming = ReadBuffer()
        self._slow_reader = SlowReaderMonitor(self.loop, transport)
        self._set_timeout(HEAD_TIMEOUT_S)

    @property
    def is_new(self) -> bool:
        """Whether the client has not sent a request yet."""
        return not (self.cycle or self.transport.is_closing())

    def data_received(self, data: bytes) -> None:
        waits = bool(self._incoming)  # the transport had read the data before it paused
        self._incoming.add(data)
        if not waits:
            self._parse()

    def _parse(self) -> None:
        """Parse the received data, up to the end of a request that must be answered first."""
        self._unset_keepalive_if_required()
        self._chunks_at_once = 0
        try:
            while self._incoming and self._may_parse():
                piece = self._incoming.next(MAX_CHUNKED_BYTES if self._in_body else None)
                self._bytes_since_progress += len(piece)
                self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            self._decline_upgrade()
            return
        except httptools.HttpParserError as error:
            reason = error.__context__
            self._reject(reason if isinstance(reason, ServiceError) else MalformedRequest(f"invalid HTTP: {error}"))
        if self.transport.is_closing():
            self._incoming.clear()
        elif self._bytes_since_progress > MAX_HEAD_BYTES:
            self._reject(
                HeadersTooLarge(f"the headers or trailers of the request are larger than {MAX_HEAD_BYTES} bytes")
            )
        else:
            self._pause_or_resume_reading()

    def _may_parse(self) -> bool:
        answering = self.cycle and not self._in_body and not self.cycle.response_complete
        return not (answering or self._chunks_at_once > MAX_CHUNKS_AT_ONCE or self.transport.is_closing())

    def _pause_or_resume_reading(self) -> None:
        """Pause reading while received data waits to be parsed."""
        waits = bool(self._incoming)
        if waits:
            self.flow.pause_reading()
            if self._chunks_at_once > MAX_CHUNKS_AT_ONCE:
                self._resume_soon()
        elif not (self._timeout or self.timeout_keep_alive_task) and self.cycle and self.cycle.response_complete:
            self._set_timeout(self.timeout_keep_alive)  # no request has begun: an empty line, or the end of a body
        if self.flow.data_waits != waits:
            self.flow.data_waits = waits
            self.flow.resume_reading()

    def _resume_soon(self, delay_s: float = 0.0) -> None:
        if self._incoming and not self._resume_handle:
            later = self.loop.call_later
            self._resume_handle = later(delay_s, self._resume) if delay_s else self.loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._resume_handle = None
        if not self.transport.is_closing():
            self._parse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._set_timeout(HEAD_TIMEOUT_S)

    def on_url(self, url: bytes) -> None:
        self.url += url
        check_target(self.url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer, which must not be taken for a header (RFC 9110, section 6.5.1)
        name, value = name.lower(), value.strip(b" \t")
        if len(name) + len(value) > MAX_HEADER_BYTES or len(self.headers) >= MAX_HEADERS:
            raise oversized(name)
        if name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        if name != b"cookie":  # not used here, but FastAPI would parse it for every request
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():  # `_parse` declines it
            return
        if self._bytes_since_progress > MAX_HEAD_BYTES:
            raise HeadersTooLarge(f"the head of the request is larger than {MAX_HEAD_BYTES} bytes")
        version = self.parser.get_http_version()
        headers = check_headers(version, self.headers)
        self.url = origin_form(self.url)
        self.expect_100_continue &= version != "1.0"
        self._chunked = b"transfer-encoding" in headers
        self._incoming.body_bytes_left = 0 if self._chunked else int(headers.get(b"content-length", b"0"))
        self._chunks = self._chunk_bytes = 0
        self._in_head, self._in_body, self._bytes_since_progress = False, True, 0
        self._cancel_timeout()
        super().on_headers_complete()
        self.cycle.transport = ResponseTransport(self.transport, self.close_after_body)  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        self._bytes_since_progress = 0
        if self._chunked:
            self._chunks += 1
            self._chunks_at_once += 1
            self._chunk_bytes += len(body)
            if self._chunks > FREE_CHUNKS + self._chunk_bytes // MIN_CHUNK_BYTES:
                raise MalformedRequest(
                    f"the chunks of the body are too small: less than {MIN_CHUNK_BYTES} bytes on average"
                )  # the parser stops here
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_body, self._bytes_since_progress = False, 0
        self._cancel_timeout()
        super().on_message_complete()
        if self._closing:
            self.transport.close()

    def on_response_complete(self) -> None:
        self.cycle.transport.flush()  # type: ignore[attr-defined]
        super().on_response_complete()
        if self.transport.is_closing():
            return
        self._pipelined = self._pipelined + 1 if self._incoming else 0
        self._resume_soon(PIPELINE_DELAY_S if self._pipelined > FREE_PIPELINED else 0.0)
        if self._in_body:
            self._set_timeout(LINGER_TIMEOUT_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._slow_reader.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._slow_reader.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timeout()
        self._slow_reader.stop()
        super().connection_lost(exc)
        self._incoming.clear()
        self.cycle = None  # type: ignore[assignment]  # a reference cycle, which would wait for the garbage collector

    def _reject(self, error: ServiceError) -> None:
        """Answer an invalid request with an error body and a request id, like all errors, and close the connection."""
        request_id = new_id()
        self.logger.warning("rejected an invalid request, request_id=%s: %s", request_id, error.message)
        if not self.cycle or self.cycle.response_complete or not self.cycle.response_started:
            body = orjson.dumps({"error": {"code": error.code, "message": error.message}})
            headers = (
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\nx-request-id: {request_id}\r\n"
                "cache-control: no-store\r\nx-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(STATUS_LINE[STATUS[type(error)]] + headers.encode() + body)
        self.transport.close()

    def close_after_body(self) -> None:
        """Close, after the rest of the body if it is still arriving. Otherwise the kernel would reset the connection,
        and the client might lose the response."""
        if self._in_body and not self.transport.is_closing():
            self._closing = True
            self.transport.write_eof()
            self.flow.resume_reading()
            self._set_timeout(LINGER_TIMEOUT_S)
        else:
            self.transport.close()

    def _decline_upgrade(self) -> None:
        """Continue in HTTP/1.1 with a client that offers another protocol. The head is parsed again without the offer,
        by a new parser, as the old one accepts nothing after it."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._reject(MalformedRequest("CONNECT is not supported"))
            return
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self._bytes_since_progress = 0
        rest = self._incoming.rest()
        self._incoming.clear()
        self._incoming.add(b"\r\n".join([*lines, b"", b""]) + rest)
        self._parse()

    def _set_timeout(self, seconds: float) -> None:
        self._cancel_timeout()
        self._timeout = self.loop.call_later(seconds, self.transport.close)

    def _cancel_timeout(self) -> None:
        if self._timeout:
            self._timeout.cancel()
            self._timeout = None
