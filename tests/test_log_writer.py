"""The log writer on descriptors that block or fail, and servers whose log is not read."""

import logging
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from rednet.service.observability import log_writer
from rednet.service.observability.log_writer import LogWriter
from tests.conftest import encoded, photo
from tests.http_helpers import predict, sample
from tests.servers import REDNET, free_port, is_ready, wait_until

LINE = "x" * 99 + "\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The read end and the write end of a pipe."""
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def read_all(end: int, until: bytes) -> bytes:
    data = b""
    while until not in data:
        data += os.read(end, 1_000_000)
    return data


def test_log_lines_of_several_threads_arrive_complete_and_in_order(pipe: tuple[int, int]) -> None:
    """The lines of each thread keep their order."""
    writer = LogWriter(pipe[1])
    threads = [
        threading.Thread(target=lambda name=name: [writer.write(f"{name} {i}\n") for i in range(300)]) for name in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    lines = os.read(pipe[0], 1_000_000).decode().splitlines()
    for name in "ab":
        assert [line for line in lines if line[0] == name] == [f"{name} {i}" for i in range(300)]
    assert writer.dropped == 0


@pytest.mark.parametrize("blocking", [True, False])
def test_unread_log_does_not_block_and_counts_dropped_lines(
    pipe: tuple[int, int], blocking: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When the reader continues, every line is either there or counted as dropped."""
    monkeypatch.setattr(log_writer, "CLOSE_TIMEOUT_S", 0.2)
    os.set_blocking(pipe[1], blocking)
    writer = LogWriter(pipe[1])
    count = 3 * log_writer.MAX_PENDING_CHARS // len(LINE)
    with caplog.at_level(logging.WARNING):
        for _ in range(count):
            writer.write(LINE)
        started = time.monotonic()
        writer.close()
        assert 0.2 <= time.monotonic() - started < 5
        assert writer.dropped >= count // 3
        expected = count - writer.dropped
        arrived = 0
        while arrived < expected * len(LINE):
            arrived += len(os.read(pipe[0], 1_000_000))
        wait_until(lambda: bool(caplog.records), "the report")
    assert f"{writer.dropped} log lines were dropped" in caplog.text
    writer.write("and it goes on\n")
    assert b"and it goes on" in read_all(pipe[0], b"goes on\n")


def test_log_lines_to_a_closed_pipe_are_counted_as_dropped(pipe: tuple[int, int]) -> None:
    """EPIPE, as after `rednet serve 2>&1 | head`."""
    os.close(pipe[0])
    writer = LogWriter(pipe[1])
    for _ in range(10):
        writer.write(LINE)
    wait_until(lambda: writer.dropped == 10, "the count")
    writer.close()


def test_log_lines_are_dropped_while_the_disk_is_full(tmp_path: Path) -> None:
    """/dev/full returns ENOSPC. Later lines, to a disk with space, are written."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        writer = LogWriter(descriptor)
        for _ in range(10):
            writer.write(LINE)
        wait_until(lambda: writer.dropped == 10, "the count")
        os.dup2(room := os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), descriptor)
        os.close(room)
        writer.write("room again\n")
        writer.close()
        assert (tmp_path / "log").read_text() == "room again\n"
        assert writer.dropped == 10
    finally:
        os.close(descriptor)


def test_log_text_that_is_not_unicode_is_escaped(pipe: tuple[int, int]) -> None:
    """A file name with an undecodable byte does not end the log."""
    writer = LogWriter(pipe[1])
    writer.write("before \udcff after\n")
    assert read_all(pipe[0], b"\n") == b"before \\udcff after\n"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_server_with_an_unread_log_answers_and_stops(tiny_path: Path, log_format: str) -> None:
    """With `rednet serve 2>&1 | sleep 1000`, the pipe is full after some hundred requests. SIGTERM still ends the
    server."""
    command = [str(REDNET), "serve", "--port", "0", "--checkpoint", str(tiny_path), "--log-format", log_format]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stderr is not None
        found = (re.search(r"running on http://127.0.0.1:(\d+)", line) for line in process.stderr)
        port = next(int(each[1]) for each in found if each)
        with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            for _ in range(600):  # ids of 128 characters make 150 kB, twice the size of a pipe
                connection.request("GET", "/v1/model", headers={"X-Request-Id": "i" * 128})
                answer = connection.getresponse()
                assert answer.status == 200
                answer.read()
        process.terminate()
        assert process.wait(60) == 0


def test_server_on_a_full_disk_counts_dropped_log_lines(tiny_path: Path) -> None:
    """It answers, `/metrics` shows the number of dropped lines, and it exits with status 0."""
    port = free_port()
    command = [str(REDNET), "serve", "--port", str(port), "--checkpoint", str(tiny_path)]
    with (
        Path("/dev/full").open("wb") as full,
        subprocess.Popen(command, stderr=full) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        wait_until(lambda: is_ready(client), "readiness")
        before = sample(client, "rednet_log_lines_dropped_total")
        assert before > 0
        assert predict(client, encoded(photo())).status_code == 200
        wait_until(lambda: sample(client, "rednet_log_lines_dropped_total") == before + 1, "the count")
        process.terminate()
        assert process.wait(60) == 0
