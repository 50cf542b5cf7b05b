"""HTTP pipelining, and bodies in tiny chunks."""

import gc
import time
import weakref

import pytest

from rednet.service.http.connections import FREE_CHUNKS, FREE_PIPELINED, PIPELINE_DELAY_S, Connection
from tests.conftest import encoded, photo
from tests.http_helpers import connected, predict
from tests.servers import PATIENCE_S, FakeRunner, ServerThread, wait_until

GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
CHUNKED = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def post(body: bytes) -> bytes:
    return b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def answers(server: ServerThread, *parts: bytes) -> list[bytes]:
    """The status lines of all responses to pieces that are sent one after another."""
    received = b""
    with connected(server.url, parts[0]) as connection:
        for part in parts[1:]:
            time.sleep(0.01)
            connection.sendall(part)
        while chunk := connection.recv(65536):
            received += chunk
    return [line for line in received.split(b"\r\n") if b"HTTP/1.1 " in line]


def test_pipelined_requests_are_all_answered_in_order() -> None:
    """Bodies with a length and chunked bodies, photos that contain empty lines, and pieces of any size."""
    body = encoded(photo()) + b"\r\n\r\n"
    chunked = CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    sent = GET + post(body) + chunked + post(b"x") + GET + LAST
    with ServerThread(FakeRunner()) as running:
        expected = [200, 200, 200, 415, 200, 200]
        found = [answers(running, sent), answers(running, sent[:40], sent[40:])]
        found += [answers(running, sent[:cut], sent[cut:]) for cut in range(len(GET) - 4, len(GET) + 5)]
        ends = sent.index(chunked) + len(chunked)
        found += [answers(running, sent[:cut], sent[cut:]) for cut in range(ends - 6, ends + 2)]
    for lines in found:
        assert [int(line.split(b"HTTP/1.1 ")[1][:3]) for line in lines] == expected


def test_long_pipeline_does_not_block_the_event_loop() -> None:
    """Beyond the first few, the requests of one connection are answered one by one, with pauses between them."""
    requests = 100
    with ServerThread(FakeRunner()) as running:
        started = time.monotonic()
        lines = answers(running, GET * (requests - 1) + LAST)
        assert time.monotonic() - started >= (requests - FREE_PIPELINED - 2) * PIPELINE_DELAY_S
    assert len(lines) == requests


def test_pipelined_requests_wait_unparsed() -> None:
    """The server neither reads nor starts further requests while the first one is being answered."""
    runner = FakeRunner()
    runner.go_on.clear()
    with ServerThread(runner) as running:
        with connected(running.url, post(encoded(photo()))) as connection:
            assert runner.running.wait(PATIENCE_S)
            connection.settimeout(0.5)
            with pytest.raises(TimeoutError):  # the socket buffers are full
                connection.sendall(GET * 1_000_000)
            assert running.engine_client.requests == 1
            assert predict_later(running, runner)
        wait_until(lambda: running.engine_client.requests == 0, "the end of the request")
        assert running.client.get("/livez").status_code == 200


def predict_later(running: ServerThread, runner: FakeRunner) -> bool:
    """Whether another client is answered when the device is free again."""
    runner.go_on.set()
    return predict(running.client, encoded(photo())).status_code == 200


def test_invalid_http_behind_a_request_does_not_cancel_its_response() -> None:
    """The error follows as the second response."""
    with ServerThread(FakeRunner()) as running:
        lines = answers(running, post(encoded(photo())) + b"GARBAGE\r\n\r\n")
    assert [line.split()[1] for line in (lines[0], lines[1][lines[1].index(b"HTTP/1.1 ") :])] == [b"200", b"400"]


def test_one_byte_chunks_are_rejected() -> None:
    """They cost a microsecond each, so a body may have only a few thousand of them, however slowly they arrive."""
    with ServerThread(FakeRunner()) as running, connected(running.url, CHUNKED) as connection:
        for _ in range(4):
            connection.sendall(b"1\r\nx\r\n" * (FREE_CHUNKS // 3))
            time.sleep(0.05)
        assert b"HTTP/1.1 400 " in connection.recv(65536)


def test_body_in_small_chunks_is_served() -> None:
    """Ten thousand chunks of sixty-four bytes are accepted."""
    body = encoded(photo(0, 600, 600), "BMP")[:640_000]
    chunks = b"".join(b"40\r\n%b\r\n" % body[at : at + 64] for at in range(0, len(body) // 64 * 64, 64))
    with ServerThread(FakeRunner()) as running:
        (line,) = answers(running, CHUNKED.replace(b"Host", b"Connection: close\r\nHost") + chunks + b"0\r\n\r\n")
    assert b" 422 " in line  # the whole body arrived: a photo that is truncated


def test_closed_connections_leave_no_reference_cycles() -> None:
    """Their memory is freed immediately, without the garbage collector."""
    with ServerThread(FakeRunner()) as running:
        running.client.get("/livez")
        gc.collect()
        gc.disable()
        try:
            known: list[weakref.ref[Connection]] = []
            for _ in range(5):
                with connected(running.url, post(encoded(photo())) + GET * 100) as connection:
                    assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
                    known += [weakref.ref(each) for each in gc.get_objects() if isinstance(each, Connection)]
            running.client.close()
            wait_until(lambda: not any(each() for each in known), "the end of the connections")
        finally:
            gc.enable()
