"""Signals and inherited streams of real processes, as PID 1 of a namespace where that is allowed."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.conftest import encoded, photo
from tests.http_helpers import occupy, predict
from tests.servers import PATIENCE_S, REDNET, FakeRunner, ServerProcess, ServerThread, free_port, is_ready, wait_until

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
ENDS_WITHIN_S = 2.0
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


def test_sighup_drains_like_sigterm() -> None:
    """Accepted requests are answered, new ones rejected. A second SIGHUP has no effect, because shells send one,
    too."""
    runner = FakeRunner()
    with ServerThread(runner) as running, ThreadPoolExecutor(1) as pool:
        held = occupy(running, runner, pool)
        running.terminate(signal.SIGHUP)
        running.terminate(signal.SIGHUP)
        assert running.client.get("/readyz").status_code == 503
        runner.go_on.set()
        assert held.result().status_code == 200
        running.wait_for_end()
        assert running.exit_code == 0


def test_sighup_ends_the_server_with_status_0(tiny_path: Path) -> None:
    """The default action would cut responses off. The decoders stay alive during the drain."""
    with ServerProcess("--checkpoint", tiny_path) as running:
        assert predict(running.client, encoded(photo())).status_code == 200
        decoders = children(running.process.pid)
        assert decoders
        for decoder in decoders:
            os.kill(decoder, signal.SIGHUP)
        running.process.send_signal(signal.SIGHUP)
        assert running.process.wait(PATIENCE_S) == 0
        assert "a decoder process exited" not in running.log


def test_nohup_keeps_a_server_running(tiny_path: Path) -> None:
    """A SIGHUP that was ignored when the process began stays ignored."""
    with ServerProcess("--checkpoint", tiny_path, before=["nohup"]) as running:
        running.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert predict(running.client, encoded(photo())).status_code == 200
        assert running.terminate() == 0


def test_closed_terminal_drains_the_server(tiny_path: Path) -> None:
    """The kernel sends SIGHUP to all processes of the terminal, and log lines fail. The exit status is still 0."""
    ours, theirs = pty.openpty()
    command = [str(REDNET), "serve", "--port", "0", "--checkpoint", str(tiny_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, *command], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    try:
        os.close(theirs)
        log = b""
        while b"ready" not in log:
            log += os.read(ours, 10_000)
        os.close(ours)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()


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
