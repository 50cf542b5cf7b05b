"""A server from start to end, as a real process."""

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

UPLOAD = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc"  # an incomplete body


def test_server_that_cannot_start_reports_the_reason_in_one_line(tmp_path: Path) -> None:
    """For a missing file and for a misspelt variable, without a traceback and with status 2."""
    missing = subprocess.run(
        [REDNET, "serve", "--checkpoint", tmp_path / "no"], capture_output=True, text=True, check=False
    )
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "cannot be read" in missing.stderr
    (tmp_path / "no.training").write_bytes(b"")
    unfinished = subprocess.run(
        [REDNET, "serve", "--checkpoint", tmp_path / "no"], capture_output=True, text=True, check=False
    )
    assert (unfinished.returncode, unfinished.stderr.count("\n")) == (2, 1)
    assert "training has not finished" in unfinished.stderr
    environment = {"REDNET_MAX_QUEU": "5", "PATH": ""}
    misspelt = subprocess.run([REDNET, "serve"], capture_output=True, text=True, check=False, env=environment)
    assert (misspelt.returncode, misspelt.stderr.count("\n")) == (2, 1)
    assert "REDNET_MAX_QUEU is not an option" in misspelt.stderr


def test_sigterm_under_load_loses_no_accepted_request(tiny_path: Path) -> None:
    """Every client gets an answer or a 503 with Retry-After, and the exit status is 0."""
    with ServerProcess("--checkpoint", tiny_path) as running:
        outcomes: list[int | str] = []
        stop = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=running.url, timeout=60) as client:
                while not stop.is_set():
                    try:
                        response = predict(client, encoded(photo()))
                    except httpx.ConnectError:  # the port is closed, so this request was not accepted
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
        assert running.log.count("SIGTERM: new requests are refused; requests still to be answered: ") == 1
        stop.set()
        for thread in threads:
            thread.join()
        assert set(outcomes) <= {200, 503}


def test_draining_server_is_not_ready_and_rejects_new_requests() -> None:
    """Immediately after the signal. Accepted requests are still answered."""
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


def test_drain_timeout_answers_all_requests_with_503() -> None:
    """With a hung runner and an incomplete upload, both clients get 503, and the server ends."""
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


def test_duplicate_device_is_rejected(tiny_path: Path) -> None:
    """In any spelling."""
    command = [str(REDNET), "serve", "--port", "0", "--checkpoint", str(tiny_path), "--device", "cpu, cpu:0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "names one device twice" in done.stderr


def test_threads_are_limited_to_the_usable_cores(tiny_path: Path) -> None:
    """With --threads 1000 the server uses as many threads as cores and logs it. Larger values are rejected."""
    with ServerProcess("--checkpoint", tiny_path, "--threads", 1000) as running:
        assert predict(running.client, encoded(photo())).status_code == 200
        assert f"using {os.cpu_count()}," in running.log
    refused = subprocess.run([REDNET, "serve", "--threads", "100000"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--threads cannot be '100000'" in refused.stderr


def test_second_signal_ends_the_server_immediately(tiny_path: Path) -> None:
    """Ctrl-C twice does not hang, even with an incomplete upload. The exit status shows that the drain was cut
    short."""
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
