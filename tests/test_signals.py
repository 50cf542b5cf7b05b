"""Signals and inherited streams of real processes, as PID 1 of a namespace where that is allowed."""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.conftest import encoded, photo
from tests.http_helpers import PREDICT, connected, predict, sample
from tests.servers import PATIENCE_S, REDNET, ServerProcess, free_port, is_ready, wait_until

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
ENDS_WITHIN_S = 2.0
RELOADED = "has answered its last request"
INTERPRETER_S = 0.3  # until Python runs our first line on a busy machine; before that, PID 1 ignores signals


def allowed() -> bool:
    return bool(shutil.which("unshare")) and not subprocess.call([*UNSHARE, "true"], stderr=subprocess.DEVNULL)


as_pid_1 = pytest.mark.skipif(not allowed(), reason="no PID namespace can be made here: unshare is absent or forbidden")


def children(process: int) -> list[int]:
    """The child processes of a process."""
    lists = Path(f"/proc/{process}/task").glob("*/children")  # the children that each thread has started
    return [int(child) for each in lists for child in each.read_text().split()]


def state(process: int) -> str:
    """R, S, ...; Z is a zombie."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def init(command: str, log: Path, *options: object) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """`rednet serve` as PID 1 of a namespace: the `unshare` process, and the server's PID outside of the namespace."""
    serve = [str(part) for part in (REDNET, "serve", "--port", "0", *options)]
    with log.open("wb") as stderr:
        process = subprocess.Popen([*UNSHARE, "sh", "-c", command + ' exec "$@"', "sh", *serve], stderr=stderr)
    try:
        wait_until(lambda: bool(children(process.pid)), "PID 1")
        yield process, children(process.pid)[0]
    finally:
        process.kill()
        process.wait()


@as_pid_1
@pytest.mark.parametrize("moment", range(10))
def test_sigterm_ends_pid_1_at_any_moment_of_its_start(tiny_path: Path, tmp_path: Path, moment: int) -> None:
    """During imports, preparation of the network, warm-up, and afterwards."""
    with init("", tmp_path / "log", "--checkpoint", tiny_path) as (process, ours):
        time.sleep(INTERPRETER_S + 0.4 * moment)
        os.kill(ours, signal.SIGTERM)
        sent = time.monotonic()
        assert process.wait(PATIENCE_S) in (0, 128 + signal.SIGTERM)
        assert time.monotonic() - sent < ENDS_WITHIN_S


@as_pid_1
def test_pid_1_drains_and_passes_on_the_exit_status(tiny_path: Path, tmp_path: Path) -> None:
    """The status after SIGTERM is 0, as without an init process."""
    log = tmp_path / "log"
    with init("", log, "--checkpoint", tiny_path) as (process, ours):
        wait_until(lambda: "ready" in log.read_text(), "readiness")
        os.kill(ours, signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    assert "Finished server process" in log.read_text()


@as_pid_1
def test_pid_1_reaps_orphans(tiny_path: Path, tmp_path: Path) -> None:
    """An orphaned process becomes a child of PID 1, and does not stay a zombie when it ends."""
    with init("(sleep 1 & sleep 1.5 &);", tmp_path / "log", "--checkpoint", tiny_path) as (_, ours):
        wait_until(lambda: len(children(ours)) == 3, "both orphans beside the server")
        wait_until(lambda: len(children(ours)) == 1, "their end")
        assert state(children(ours)[0]) != "Z"


@as_pid_1
def test_failed_command_as_pid_1_passes_on_status_and_message(tmp_path: Path) -> None:
    """They are those of the command."""
    command = [*UNSHARE, str(REDNET), "info", "--checkpoint", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot be read" in done.stderr


@as_pid_1
def test_pid_1_reloads_on_sighup(tiny_path: Path, tmp_path: Path) -> None:
    """As `docker kill --signal HUP` asks for."""
    log = tmp_path / "log"
    with init("", log, "--checkpoint", tiny_path) as (process, ours):
        wait_until(lambda: "ready" in log.read_text(), "readiness")
        os.kill(ours, signal.SIGHUP)
        wait_until(lambda: RELOADED in log.read_text(), "the reload")
        os.kill(ours, signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


def test_sighup_reloads(tiny_path: Path) -> None:
    """Again and again. Decoder processes ignore the signal, which a service manager may send to all of them."""
    with ServerProcess("--checkpoint", tiny_path) as running:
        for turn in range(1, 3):
            for process in (*children(running.process.pid), running.process.pid):
                os.kill(process, signal.SIGHUP)
            wait_until(lambda turn=turn: running.log.count(RELOADED) == turn, "the reload")  # type: ignore[misc]
            assert predict(running.client, encoded(photo())).status_code == 200
        assert running.terminate() == 0
        assert "a decoder process exited" not in running.log


def test_sighup_during_the_start_reloads_afterwards(tiny_path: Path) -> None:
    """The default action would end a server that systemd is told to reload as soon as it has started it."""
    with ServerProcess("--checkpoint", tiny_path, ready=False, before=HANGS_UP_DURING_IMPORTS) as running:
        wait_until(lambda: RELOADED in running.log, "the reload")
        assert predict(running.client, encoded(photo())).status_code == 200
        assert running.terminate() == 0


# A program that runs another one, and sends it SIGHUP as soon as it handles the signal.
HANGS_UP_DURING_IMPORTS = [
    sys.executable,
    "-c",
    """
import os, re, signal, sys, time
from pathlib import Path
parent = os.getpid()
if not os.fork():
    def is_handled():
        caught = re.search(r"SigCgt:\\s*(\\w+)", Path(f"/proc/{parent}/status").read_text())[1]
        return int(caught, 16) >> (signal.SIGHUP - 1) & 1
    while not is_handled():
        time.sleep(0.001)
    os.kill(parent, signal.SIGHUP)
    os._exit(0)
os.execv(sys.argv[1], sys.argv[1:])
""",
]


def test_nohup_keeps_a_server_running(tiny_path: Path) -> None:
    """A SIGHUP that was ignored when the process began stays ignored, and the log says so."""
    with ServerProcess("--checkpoint", tiny_path, before=["nohup"]) as running:
        running.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert predict(running.client, encoded(photo())).status_code == 200
        assert "SIGHUP is ignored" in running.log
        assert "SIGHUP: loading" not in running.log
        assert running.terminate() == 0


class TerminalServer:
    """`rednet serve` in a terminal of its own."""

    def __init__(self, *options: object) -> None:
        self.terminal, theirs = pty.openpty()
        self.log = b""
        command = [str(part) for part in (REDNET, "serve", "--port", "0", *options)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", TERMINAL, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def __enter__(self) -> "TerminalServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def read_until(self, text: str) -> None:
        """Read what the server writes to the terminal, up to this text."""
        while text.encode() not in self.log:
            self.log += os.read(self.terminal, 10_000)

    @property
    def url(self) -> str:
        found = re.search(rb"running on (http://\S+)", self.log)
        assert found
        return found[1].decode()


def test_closed_terminal_drains_the_server(tiny_path: Path) -> None:
    """The kernel sends SIGHUP to all processes of the terminal, and so does a shell; log lines fail. Accepted requests
    are answered, new ones rejected, and the exit status is 0."""
    body = encoded(photo())
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    with TerminalServer("--checkpoint", tiny_path) as running:
        running.read_until("ready")
        with (
            connected(running.url, head.encode() + body[:100]) as accepted,
            httpx.Client(base_url=running.url) as client,
        ):
            wait_until(lambda: sample(client, "rednet_inflight_requests") == 2, "the upload beside the scrape")
            os.close(running.terminal)
            wait_until(lambda: client.get("/readyz").status_code == 503, "the drain")
            running.process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
            assert client.get("/readyz").json() == {"status": "draining"}
            accepted.sendall(body[100:])
            assert accepted.recv(10_000).startswith(b"HTTP/1.1 200")
        assert running.process.wait(PATIENCE_S) == 0


def test_sighup_reloads_while_the_terminal_is_open(tiny_path: Path) -> None:
    """Whoever sends it; then the terminal is closed."""
    with TerminalServer("--checkpoint", tiny_path) as running:
        running.read_until("ready")
        running.process.send_signal(signal.SIGHUP)
        running.read_until(RELOADED)
        os.close(running.terminal)
        assert running.process.wait(PATIENCE_S) == 0


def test_terminal_that_is_closed_during_the_start_ends_the_server(tiny_path: Path) -> None:
    """At once, as without a handler: nothing has been accepted."""
    with TerminalServer("--checkpoint", tiny_path) as running:
        wait_until(lambda: handles(running.process.pid, signal.SIGHUP), "the handler")
        os.close(running.terminal)
        assert running.process.wait(PATIENCE_S) == -signal.SIGHUP


def handles(process: int, sent: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    assert caught
    return bool(int(caught[1], 16) >> (sent - 1) & 1)


TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal is now this session's
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- >&- 2>&-"])
def test_server_runs_without_standard_streams(tiny_path: Path, closed: str) -> None:
    """It answers and exits with status 0, and no socket gets the descriptor of standard input."""
    port = free_port()
    command = f'exec "{REDNET}" serve --port {port} --checkpoint "{tiny_path}" {closed}'
    process = subprocess.Popen(["sh", "-c", command], stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            wait_until(lambda: is_ready(client) or process.poll() is not None, "readiness")
            assert predict(client, encoded(photo())).status_code == 200
            for descriptor in range(3):
                target = os.readlink(f"/proc/{process.pid}/fd/{descriptor}")
                assert "socket" not in target
                assert "eventpoll" not in target
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
