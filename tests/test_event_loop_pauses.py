"""No request blocks the event loop for long: the longest pause is measured for every kind of request."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.body_corpus import FORM, JSON, KINDS, PART, PREDICT, Sent, corpus
from tests.servers import PATIENCE_S, wait_until
from tests.shared import SHARED, needs_shared
from tests.watched_server import HELD_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/schedstat").exists(), reason="/proc/self/schedstat is absent: pauses cannot be measured"
    ),
]

LONGEST_S = 0.005
ATTEMPTS = 4  # a request that blocks the loop does so every time, unlike other events on the machine
SIZE = 32_000_000
GROWTH_MB = 40
STATUS = re.compile(rb"HTTP/1\.1 (\d+) ")
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


class WatchedServer:
    """`tests.watched_server` in its own process."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.watched_server"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._port = int(self._line())

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def longest_pause_s(self) -> float:
        """The longest pause since the last call."""
        self.say("")
        return float(self._line())

    def say(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def answer(self, sent: Sent) -> int:
        """Send a request, receive the whole response, and return its status."""
        with socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE_S) as connection:
            try:
                for piece in sent.raw():
                    connection.sendall(piece)
            except ConnectionError:
                pass  # rejected before all of it was sent
            received = bytearray()
            while not (found := LENGTH.search(received)) or b"\r\n\r\n" not in received:
                received += self._received(connection)
            left = int(found[1]) - len(received.partition(b"\r\n\r\n")[2])
            while left > 0:
                left -= len(self._received(connection))
            status = STATUS.match(received)
            assert status
            return int(status[1])

    def _received(self, connection: socket.socket) -> bytes:
        data = connection.recv(262_144)
        assert data, "the server closed the connection"
        return data

    def resident_mb(self) -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", text)
        assert found
        return int(found[1]) / 1000

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[WatchedServer]:
    running = WatchedServer()
    for sent in corpus(1_000_000, 1000)["json"]:
        running.answer(sent)
    yield running
    running.close()


def pause_s(server: WatchedServer, sent: Sent) -> float:
    """The longest time that one request blocks the loop, less the longest pause of the idle server afterwards."""
    server.longest_pause_s()
    started = time.monotonic()
    status = server.answer(sent)
    assert status < 500 or status == 504, (sent.name, status)
    time.sleep(0.02)  # includes cleaning up after the request
    pause_s, took_s = server.longest_pause_s(), time.monotonic() - started
    if pause_s <= LONGEST_S:
        return pause_s
    time.sleep(took_s)
    return pause_s - server.longest_pause_s()


def check(server: WatchedServer, requests: Iterator[Sent]) -> None:
    """No response is a 500, and no request blocks the loop in all of several attempts."""
    slow: list[str] = []
    for sent in requests:
        pauses_s = [pause_s(server, sent)]
        while len(pauses_s) < ATTEMPTS and min(pauses_s) > LONGEST_S:
            pauses_s.append(pause_s(server, sent))
        print(f"{sent.name}: {1000 * min(pauses_s):.1f} ms")
        if min(pauses_s) > LONGEST_S:
            slow.append(f"{sent.name}: {', '.join(f'{1000 * each:.1f}' for each in pauses_s)} ms")
    assert not slow, "\n".join(slow)


def test_pause_watch_detects_a_blocked_event_loop(server: WatchedServer) -> None:
    """Checks the measurement itself."""
    server.longest_pause_s()
    server.say("hold")
    wait_until(lambda: server.longest_pause_s() > HELD_S / 2, "the pause")


@pytest.mark.parametrize("kind", KINDS)
def test_event_loop_is_not_blocked_by_any_request(server: WatchedServer, kind: str) -> None:
    """Bodies of 32 MB and heads of 60 kB, of every kind that the parsers support, valid and invalid."""
    check(server, corpus(SIZE)[kind])


@needs_shared
def test_event_loop_is_not_blocked_by_regression_files(server: WatchedServer) -> None:
    """Every file of the corpus of earlier defects, as an image, as JSON and in a form."""

    def requests() -> Iterator[Sent]:
        for path in sorted((SHARED / "cases").glob("*/*")):
            if path.suffix in (".py", ".md", ".http", ".tar"):
                continue
            body, fields = path.read_bytes(), {"X-Request-Timeout-Ms": "5000"}
            yield Sent(path.name, PREDICT, fields, body)
            if path.suffix == ".json":
                yield Sent(f"{path.name} as JSON", PREDICT, fields | {"Content-Type": JSON}, body)
            form = PART + body + b"\r\n--frontier--\r\n"
            yield Sent(f"{path.name} in a form", PREDICT, fields | {"Content-Type": FORM}, form)

    check(server, requests())


def test_memory_is_released_after_large_bodies(server: WatchedServer) -> None:
    """After bursts of accepted and rejected bodies, the server's resident memory returns close to its initial value."""
    before_mb = server.resident_mb()
    with ThreadPoolExecutor(8) as pool:
        for kind in ("raw", "form", "binary") * 3:
            assert all(status < 500 for status in pool.map(server.answer, corpus(SIZE)[kind]))
    wait_until(lambda: server.resident_mb() < before_mb + GROWTH_MB, "the memory")
