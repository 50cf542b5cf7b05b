"""Connections that would hold a server up, on a real one."""

import json
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from service import connections
from tests.asking import predict
from tests.conftest import encoded, photo
from tests.servers import PATIENCE_S, FakeRunner, ServerThread

LIMIT_S = 0.5


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerThread]:
    """A server that waits half a second instead of ten."""
    monkeypatch.setattr(connections, "HEAD_S", LIMIT_S)
    monkeypatch.setattr(connections, "LINGER_S", LIMIT_S)
    with ServerThread(FakeRunner(), max_body_mb=0.1) as server:
        yield server


def connected(server: ServerThread, sent: bytes) -> socket.socket:
    parts = urlsplit(server.url)
    connection = socket.create_connection((parts.hostname, parts.port), PATIENCE_S)
    connection.sendall(sent)
    return connection


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection, which must not take much longer than the limit."""
    started = time.monotonic()
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    assert time.monotonic() - started < 10 * LIMIT_S
    return received


@pytest.mark.parametrize("sent", [b"", b"POST /v1/pred", b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_head_that_does_not_come_ends_its_connection(running: ServerThread, sent: bytes) -> None:
    """Silently: nobody asked for anything. Others are served meanwhile."""
    with connected(running, sent) as connection:
        assert predict(running.client, encoded(photo())).status_code == 200
        assert rest(connection) == b""


def test_the_second_head_of_a_connection_has_its_time_too(running: ServerThread) -> None:
    """A connection that was good for one request can become slow with the next."""
    with connected(running, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /li") as connection:
        assert rest(connection).startswith(b"HTTP/1.1 200 ")


def test_an_endless_head_is_an_error(running: ServerThread) -> None:
    """As soon as it is too long, in the shape of all errors."""
    with connected(running, b"GET /livez HTTP/1.1\r\nX-Long: " + b"x" * connections.LONGEST_HEAD) as connection:
        head, _, body = rest(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "malformed_request"


def test_what_is_no_http_is_an_error(running: ServerThread) -> None:
    """In the shape of all errors, and the connection ends."""
    with connected(running, b"\x16\x03\x01 this is TLS\r\n\r\n") as connection:
        head, _, body = rest(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "malformed_request"


def test_a_body_that_was_refused_is_not_waited_for(running: ServerThread) -> None:
    """Its sender has the answer, and a little time to notice."""
    request = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\nthe first bytes"
    with connected(running, request) as connection:
        assert rest(connection).startswith(b"HTTP/1.1 413 ")


def test_a_slow_body_has_until_the_deadline(running: ServerThread) -> None:
    """Which is the request's own matter: the time for heads does not end it."""
    body = encoded(photo())
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    with connected(running, head.encode() + body[:100]) as connection:
        time.sleep(3 * LIMIT_S)
        connection.sendall(body[100:])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
