"""The memory budget on a real server: stalled uploads, many bodies, and responses that are not read."""

import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import httpx
import numpy as np
import pytest

from rednet.service.engine.transfer import Finished
from rednet.service.http.connections import FREE_CHUNKS
from rednet.service.parsing.memory_budget import SMALL_BYTES
from rednet.service.types import ExplainSpec, Pixels, Running
from tests.conftest import encoded, photo
from tests.http_helpers import PREDICT, assert_error, connected, predict
from tests.servers import PATIENCE_S, FakeRunner, ServerThread, wait_until

MAX_BODY = 2_000_000
HEAD = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: "
STALLED = 14  # uploads fill the part of the budget for large bodies: seven eighths of 16
LARGE = encoded(photo()) + bytes(MAX_BODY - 20_000)


@pytest.fixture
def running() -> Iterator[ServerThread]:
    with ServerThread(FakeRunner(), max_body_mb=MAX_BODY / 1_000_000) as server:
        yield server


def stalled(url: str, missing: int) -> socket.socket:
    """An upload that stops the given number of bytes before its end."""
    return connected(url, f"{HEAD}{len(LARGE)}\r\n\r\n".encode() + LARGE[:-missing])


def budget_used(running: ServerThread) -> int:
    used: int = running.app.state.current_context().budget.used
    return used


def test_stalled_large_uploads_leave_room_for_small_bodies(
    running: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While stalled uploads fill the budget, a body of up to a megabyte is answered and a larger one is rejected. After
    the grace time, stalled uploads are evicted for it."""
    monkeypatch.setattr("rednet.service.parsing.memory_budget.UPLOAD_GRACE_S", PATIENCE_S)
    with ExitStack() as uploads:
        for _ in range(STALLED):
            uploads.enter_context(stalled(running.url, 10))
        wait_until(lambda: budget_used(running) == STALLED * (len(LARGE) - 10), "the uploads")
        small = encoded(photo())
        assert predict(running.client, small + bytes(SMALL_BYTES - len(small))).status_code == 200
        assert_error(predict(running.client, LARGE), 429, "overloaded")
        monkeypatch.setattr("rednet.service.parsing.memory_budget.UPLOAD_GRACE_S", 0.0)
        assert predict(running.client, LARGE).status_code == 200
    wait_until(lambda: budget_used(running) == 0, "the memory")


def test_slow_upload_is_answered_while_memory_is_available(running: ServerThread) -> None:
    """An upload over a bad connection may take much longer than the grace time for stalled uploads."""
    with stalled(running.url, 40) as upload:
        for index in range(40, 0, -10):
            time.sleep(0.3)
            upload.sendall(LARGE[-index : len(LARGE) - index + 10])
        assert upload.recv(65_536).startswith(b"HTTP/1.1 200 ")


def test_body_in_thousands_of_tiny_chunks_is_rejected(running: ServerThread) -> None:
    """Each chunk costs a call, so thousands of them in one read would block the event loop. A few are accepted."""
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    chunks = b"1\r\nx\r\n" * (2 * FREE_CHUNKS)
    with connected(running.url, head + chunks + b"0\r\n\r\n") as connection:
        answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"chunks of the body are too small" in answer
    body = encoded(photo())
    chunks = b"".join(b"1\r\n%b\r\n" % body[index : index + 1] for index in range(1000))
    with connected(
        running.url, head + chunks + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body) - 1000, body[1000:])
    ) as connection:
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")


class WideRunner(FakeRunner):
    """Returns feature vectors of four megabytes, more than socket buffers hold."""

    def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
        output = super().launch(pixels, specs).wait()
        return Finished(output._replace(features=np.arange(1_000_000, dtype=np.float32)[None].repeat(len(pixels), 0)))


def test_unread_responses_count_against_the_memory_budget() -> None:
    """Clients that do not read large responses exhaust the budget, other requests are rejected, and memory does not
    grow."""
    body = encoded(photo())
    lines = [
        "POST /v1/features HTTP/1.1",
        "Host: x",
        "Accept: application/x-npy",
        f"Content-Length: {len(body)}",
        "\r\n",
    ]
    request = "\r\n".join(lines).encode() + body
    with ServerThread(WideRunner(), max_body_mb=1) as running:
        with ExitStack() as readers:
            for number in range(1, 4):
                readers.enter_context(connected(running.url, request, 4096))
                wait_until(lambda least=4_000_000 * number: budget_used(running) >= least, "an answer")  # type: ignore[misc]
            response = features(running.client, body)
            assert_error(response, 429, "overloaded")
            assert int(response.headers["retry-after"]) > 0
        wait_until(lambda: budget_used(running) == 0, "the end of the answers")
        response = features(running.client, body)
        assert response.status_code == 200
        assert len(response.content) > 4_000_000
        assert (np.frombuffer(response.content[-4_000_000:], "<f4") == np.arange(1_000_000)).all()


def features(client: httpx.Client, body: bytes) -> httpx.Response:
    return client.post("/v1/features", content=body, headers={"Accept": "application/x-npy"})


def test_large_json_response_is_complete() -> None:
    """The response is serialised and sent in pieces."""
    with ServerThread(WideRunner()) as running:
        response = running.client.post("/v1/features", content=encoded(photo()))
        assert int(response.headers["content-length"]) == len(response.content)
        answer = json.loads(response.content)
        assert answer["dimension"] == 1_000_000
        assert answer["features"] == [list(range(1_000_000))]
