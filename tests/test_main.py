"""A server from its start to its end, as a real process."""

import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.conftest import encoded, photo
from tests.http_helpers import assert_error, connected, occupy, predict
from tests.servers import REDNET, FakeRunner, ServerProcess, ServerThread, wait_until

UPLOAD = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc"  # which does not end


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    """One line on standard error, no trace, status 2: for a missing file and for a misspelt variable alike."""
    missing = subprocess.run(
        [REDNET, "serve", "--checkpoint", tmp_path / "no"], capture_output=True, text=True, check=False
    )
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "cannot be read" in missing.stderr
    environment = {"REDNET_MAX_QUEU": "5", "PATH": ""}
    misspelt = subprocess.run([REDNET, "serve"], capture_output=True, text=True, check=False, env=environment)
    assert (misspelt.returncode, misspelt.stderr.count("\n")) == (2, 1)
    assert "REDNET_MAX_QUEU is not an option" in misspelt.stderr


def test_sigterm_answers_what_was_accepted_and_exits_0(tiny_path: Path) -> None:
    """Under load, no accepted request is lost: every caller gets an answer or a refusal that says when to retry."""
    with ServerProcess("--checkpoint", tiny_path) as running:
        outcomes: list[int | str] = []
        stop = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=running.url, timeout=60) as client:
                while not stop.is_set():
                    try:
                        response = predict(client, encoded(photo()))
                    except httpx.ConnectError:  # the port is closed: this request was never accepted
                        return
                    except httpx.TransportError as error:
                        outcomes.append(repr(error))
                        return
                    outcomes.append(response.status_code)
                    if response.status_code == 503:
                        assert response.json()["error"]["code"] == "draining"
                        assert int(response.headers["retry-after"]) >= 1
                        return

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: outcomes.count(200) > 40, "traffic")
        assert running.terminate() == 0
        stop.set()
        for thread in threads:
            thread.join()
        assert set(outcomes) <= {200, 503}


def test_while_it_drains_it_is_not_ready_and_takes_nothing_new() -> None:
    """From the first moment; what was accepted is still answered."""
    runner = FakeRunner()
    with ServerThread(runner) as running, ThreadPoolExecutor(1) as pool:
        held = occupy(running, runner, pool)
        running.terminate()
        assert running.client.get("/readyz").status_code == 503
        assert running.client.get("/livez").status_code == 200
        response = predict(running.client, encoded(photo()))
        assert_error(response, 503, "draining")
        assert response.headers["connection"] == "close"
        assert int(response.headers["retry-after"]) >= 1
        runner.go_on.set()
        assert held.result().status_code == 200
        running.wait_for_end()


def test_when_the_drain_takes_too_long_everyone_is_told() -> None:
    """A runner that hangs and an upload that does not end: 503 for both callers, and the server ends all the same."""
    runner = FakeRunner()
    with ServerThread(runner, drain_timeout_s=0.5) as running, ThreadPoolExecutor(2) as pool:
        held = occupy(running, runner, pool)
        with connected(running.url, UPLOAD) as connection:
            wait_until(lambda: running.engine_client.requests == 2, "the upload")
            running.terminate()
            assert_error(held.result(), 503, "draining")
            answer = b"".join(iter(lambda: connection.recv(10_000), b""))
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"draining" in answer
        assert b"x-request-id" in answer.lower()
        running.wait_for_end()
        runner.go_on.set()


def test_one_device_is_not_served_on_twice(tiny_path: Path) -> None:
    """However it is spelt."""
    command = [str(REDNET), "serve", "--port", "0", "--checkpoint", str(tiny_path), "--device", "cpu, cpu:0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "names one device twice" in done.stderr


def test_threads_beyond_the_cores_are_not_used(tiny_path: Path) -> None:
    """A thousand are asked for: it serves, with as many as there are cores, and says so. More are refused."""
    with ServerProcess("--checkpoint", tiny_path, "--threads", 1000) as running:
        assert predict(running.client, encoded(photo())).status_code == 200
        assert f"using {os.cpu_count()}," in running.log
    refused = subprocess.run([REDNET, "serve", "--threads", "100000"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--threads cannot be '100000'" in refused.stderr


def test_a_second_signal_ends_it_at_once(tiny_path: Path) -> None:
    """Ctrl-C twice never hangs, even with an upload that does not end; the status tells that it was cut short."""
    with (
        ServerProcess("--checkpoint", tiny_path, "--drain-timeout-s", "600") as running,
        connected(running.url, UPLOAD),
    ):
        time.sleep(0.2)
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(10) == 1
