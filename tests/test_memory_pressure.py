"""Bodies and answers on a real server: what many of them together, or stalled ones, do to others."""

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
STALLED = 14  # that fill the part of the budget that is open to large bodies: seven eighths of 16
LARGE = encoded(photo()) + bytes(MAX_BODY - 20_000)


@pytest.fixture
def running() -> Iterator[ServerThread]:
    with ServerThread(FakeRunner(), max_body_mb=MAX_BODY / 1_000_000) as server:
        yield server


def stalled(url: str, missing: int) -> socket.socket:
    """An upload that stops so many bytes short."""
    return connected(url, f"{HEAD}{len(LARGE)}\r\n\r\n".encode() + LARGE[:-missing])


def budget_used(running: ServerThread) -> int:
    used: int = running.app.state.context.budget.used
    return used


def test_stalled_large_uploads_leave_room_for_small_bodies(
    running: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there is room for, ten bytes short: a photo of up to a megabyte is answered at once, and a larger one
    is refused until the stalled ones have had their time; then they make room for it."""
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


def test_slow_upload_is_answered_where_there_is_room(running: ServerThread) -> None:
    """As from a phone on a bad line: it may take much longer than the time after which it would make room."""
    with stalled(running.url, 40) as upload:
        for index in range(40, 0, -10):
            time.sleep(0.3)
            upload.sendall(LARGE[-index : len(LARGE) - index + 10])
        assert upload.recv(65_536).startswith(b"HTTP/1.1 200 ")


def test_body_in_very_small_chunks_is_refused(running: ServerThread) -> None:
    """Each chunk costs a call: by the thousands in one piece they would hold the event loop. A few do not matter."""
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
    """Its feature vectors have four megabytes, more than a connection takes at once."""

    def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
        output = super().launch(pixels, specs).wait()
        return Finished(output._replace(features=np.arange(1_000_000, dtype=np.float32)[None].repeat(len(pixels), 0)))


def test_answers_being_sent_are_part_of_the_memory_budget() -> None:
    """Callers who ask for large answers and do not read them use it up, and others are refused; nothing grows."""
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


def test_large_json_answer_is_whole() -> None:
    """Made and sent in pieces."""
    with ServerThread(WideRunner()) as running:
        response = running.client.post("/v1/features", content=encoded(photo()))
        assert int(response.headers["content-length"]) == len(response.content)
        answer = json.loads(response.content)
        assert answer["dimension"] == 1_000_000
        assert answer["features"] == [list(range(1_000_000))]
