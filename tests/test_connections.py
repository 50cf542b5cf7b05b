"""HTTP connections of slow or malicious clients, on a real server."""

import errno
import json
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest

from rednet.service.engine.transfer import Finished
from rednet.service.http import connections, slow_readers
from rednet.service.http.request_head import MAX_HEAD_BYTES
from rednet.service.types import ExplainSpec, Pixels, Running
from tests.conftest import encoded, photo
from tests.http_helpers import connected, predict
from tests.servers import PATIENCE_S, FakeRunner, ServerThread, wait_until

LIMIT_S = 0.5


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerThread]:
    """A server whose timeouts are half a second instead of ten."""
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", LIMIT_S)
    monkeypatch.setattr(connections, "LINGER_TIMEOUT_S", LIMIT_S)
    monkeypatch.setattr(slow_readers, "SEND_TIMEOUT_S", LIMIT_S)
    monkeypatch.setattr("rednet.service.http.server.KEEP_ALIVE_S", 2 * LIMIT_S)
    with ServerThread(FakeRunner(), max_body_mb=0.1) as server:
        yield server


def rest(connection: socket.socket) -> bytes:
    """Receive until the server closes the connection, which must not take much longer than the limit."""
    started = time.monotonic()
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    assert time.monotonic() - started < 10 * LIMIT_S
    return received


@pytest.mark.parametrize("sent", [b"", b"POST /v1/pred", b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_incomplete_request_head_times_out_silently(running: ServerThread, sent: bytes) -> None:
    """The connection closes without a response, and other requests are served meanwhile."""
    with connected(running.url, sent) as connection:
        assert predict(running.client, encoded(photo())).status_code == 200
        assert rest(connection) == b""


def test_second_request_head_on_a_connection_times_out(running: ServerThread) -> None:
    """A client may become slow after its first request."""
    with connected(running.url, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /li") as connection:
        assert rest(connection).startswith(b"HTTP/1.1 200 ")


def test_endless_request_head_is_rejected(running: ServerThread) -> None:
    """It is rejected as soon as it is too long, with the usual error body."""
    with connected(running.url, b"GET /livez HTTP/1.1\r\nX-Long: " + b"x" * MAX_HEAD_BYTES) as connection:
        head, _, body = rest(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", head)
    assert json.loads(body)["error"]["code"] == "headers_too_large"


@pytest.mark.parametrize("trailers", [b"X-Many: x\r\n" * 10_000, b"X-Long: " + b"x" * 100_000])
def test_endless_trailers_are_rejected(running: ServerThread, trailers: bytes) -> None:
    """Trailers after a chunked body are limited like a head."""
    request = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
    with connected(running.url, request) as connection:
        time.sleep(LIMIT_S / 5)
        connection.sendall(trailers)
        assert b"HTTP/1.1 431 " in rest(connection)


def test_empty_line_does_not_extend_the_keepalive_timeout(running: ServerThread) -> None:
    """An empty line is not a request, so the timeout continues."""
    with connected(running.url, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"\r\n")
        assert rest(connection) == b""


def test_client_that_does_not_read_responses_is_disconnected(running: ServerThread) -> None:
    """Unread responses do not accumulate."""
    with connected(running.url, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 400, 4096) as connection:
        wait_until(lambda: connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET, "the reset")
    assert predict(running.client, encoded(photo())).status_code == 200


class WideRunner(FakeRunner):
    """Returns feature vectors of eight megabytes, more than socket buffers hold."""

    def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
        output = super().launch(pixels, specs).wait()
        return Finished(output._replace(features=np.zeros((len(pixels), 2_000_000), np.float32)))


def test_slow_reader_gets_the_whole_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """A response may take longer than the timeout as long as the client makes progress."""
    monkeypatch.setattr(slow_readers, "SEND_TIMEOUT_S", 2 * LIMIT_S)
    body = encoded(photo())
    head = f"POST /v1/features HTTP/1.1\r\nHost: x\r\nAccept: application/x-npy\r\nContent-Length: {len(body)}\r\n\r\n"
    with ServerThread(WideRunner()) as running, connected(running.url, head.encode() + body, 65536) as connection:
        left = 8_000_000
        while left > 0 and (chunk := connection.recv(65536)):
            left -= len(chunk)
            time.sleep(len(chunk) / 1_600_000)
        assert left <= 0


def test_incomplete_head_behind_a_request_does_not_cancel_its_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timeout of the next head starts when the response has been sent."""
    runner = FakeRunner()
    runner.go_on.clear()
    body = encoded(photo())
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", LIMIT_S)
    with ServerThread(runner) as running, connected(running.url, head.encode() + body + b"POST /v1/pre") as connection:
        assert runner.running.wait(PATIENCE_S)
        time.sleep(3 * LIMIT_S)
        runner.go_on.set()
        assert rest(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("offered", ["h2c", "websocket"])
def test_upgrade_header_is_ignored(running: ServerThread, offered: str) -> None:
    """The request is answered as if there were no Upgrade header, with its body: some clients send it with each first
    request."""
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": offered, "HTTP2-Settings": "AAMAAABk"}
    for _ in range(2):
        assert predict(running.client, encoded(photo()), **headers).status_code == 200
    with connected(running.url, b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        assert rest(connection).startswith(b"HTTP/1.1 400 ")


def test_early_response_is_not_lost_when_the_body_is_unread(running: ServerThread) -> None:
    """When the connection closes after an early response, the rest of the body is still received."""
    request = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 9000000\r\n\r\n"
    with connected(running.url, request + bytes(2_000_000)) as connection:
        connection.sendall(bytes(7_000_000))
        assert rest(connection).startswith(b"HTTP/1.1 413 ")


def test_body_of_a_pipelined_request_has_its_full_timeout(running: ServerThread) -> None:
    """A body behind a rejected request may take longer than what is left of the rejected one's timeout."""
    body = encoded(photo())
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    with connected(running.url, (head.encode() + body) + head.encode() + body[:100]) as connection:
        time.sleep(3 * LIMIT_S)
        connection.sendall(body[100:])
        received = b""
        while received.count(b"HTTP/1.1 200 ") < 2:
            chunk = connection.recv(65536)
            assert chunk, received
            received += chunk


def test_invalid_http_is_rejected(running: ServerThread) -> None:
    """The response has the usual error body, and the connection closes."""
    with connected(running.url, b"\x16\x03\x01 this is TLS\r\n\r\n") as connection:
        head, _, body = rest(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "malformed_request"


def test_connection_closes_soon_after_rejecting_an_unsent_body(running: ServerThread) -> None:
    """The client has the response and a little time to read it."""
    request = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\nthe first bytes"
    with connected(running.url, request) as connection:
        assert rest(connection).startswith(b"HTTP/1.1 413 ")


def test_slow_body_may_take_until_the_request_deadline(running: ServerThread) -> None:
    """The timeout for heads does not apply to bodies."""
    body = encoded(photo())
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    with connected(running.url, head.encode() + body[:100]) as connection:
        time.sleep(3 * LIMIT_S)
        connection.sendall(body[100:])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
