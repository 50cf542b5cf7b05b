"""Deadlines, cancellation, overload and the drain over gRPC."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import encoded, photo
from tests.grpc_helpers import (
    INFER,
    Stub,
    assert_failed,
    channel,
    failed,
    grpc,
    health,
    image_request,
    never_sent,
    pb,
    reason,
    retry_delays_s,
)
from tests.http_helpers import occupy, predict, sample
from tests.servers import PATIENCE_S, FakeRunner, ServerProcess, ServerThread, wait_until

pytestmark = pytest.mark.slow

REQUEST = image_request(encoded(photo()))
LATE = "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"


@contextmanager
def occupied(**options: Any) -> Iterator[tuple[ServerThread, FakeRunner, Any, Any]]:
    """A server whose device is busy until `runner.go_on` is set, and a connection to it."""
    runner = FakeRunner()
    with ServerThread(runner, grpc_port=0, **options) as running, channel(running.grpc_address) as opened:
        wait_until(lambda: running.client.get("/readyz").status_code == 200, "readiness")
        with ThreadPoolExecutor(1) as pool:
            held = occupy(running, runner, pool)
            try:
                yield running, runner, opened, held
            finally:
                runner.go_on.set()


def requests(running: ServerThread, status: int) -> float:
    labels = {"endpoint": INFER, "status": str(status)}
    return sample(running.client, "rednet_request_duration_seconds_count", **labels)


def test_deadline_of_the_call_is_the_deadline_of_the_request() -> None:
    """No device time is spent after it. It counts as short, like X-Request-Timeout-Ms."""
    with occupied() as (running, runner, opened, held):
        started = time.monotonic()
        error = failed(Stub(opened).ModelInfer, REQUEST, timeout=0.3)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0.2 < time.monotonic() - started < PATIENCE_S / 2
        wait_until(lambda: requests(running, 504) == 1, "the end of the call")
        assert sample(running.client, "rednet_short_deadline_exceeded_total") == 1
        runner.go_on.set()
        assert held.result().status_code == 200
        assert runner.batches == [1]
        assert Stub(opened).ModelInfer(REQUEST, timeout=PATIENCE_S).outputs


def test_deadline_of_the_server_bounds_that_of_the_call() -> None:
    """A call without a deadline, or with a later one, gets the server's. It is not a short one."""
    with occupied(request_timeout_s=0.5) as (running, _, opened, _):
        calls = Stub(opened)
        for timeout in (None, 3600):
            assert_failed(*LATE, calls.ModelInfer, REQUEST, timeout=timeout)
        assert_failed(*LATE, opened.stream_unary(INFER), never_sent())  # a message that does not arrive
        assert requests(running, 504) == 3
        assert sample(running.client, "rednet_short_deadline_exceeded_total") == 0


def test_cancelled_call_is_dropped_and_counted() -> None:
    """From the queue, and while its message is arriving."""
    with occupied() as (running, runner, opened, held):
        call = Stub(opened).ModelInfer.future(REQUEST)
        decoded = {"series": "rednet_stage_duration_seconds_count", "stage": "decode"}
        wait_until(lambda: sample(running.client, **decoded) == 2, "the queue")
        upload = opened.stream_unary(INFER).future(never_sent())
        wait_until(lambda: running.engine_client.requests == 3, "the upload")
        call.cancel()
        upload.cancel()
        wait_until(lambda: requests(running, 499) == 2, "the end of the calls")
        assert running.engine_client.queue_depth == 1
        runner.go_on.set()
        assert held.result().status_code == 200
        wait_until(lambda: sample(running.client, "rednet_cancelled_total", stage="queue") == 1, "the count")
        assert runner.batches == [1]
        assert running.engine_client.requests == 0
        assert sample(running.client, "rednet_inflight_requests") == 1  # the scrape


def test_overload_is_resource_exhausted_with_a_time_to_retry() -> None:
    """In seconds as over HTTP, and in the forms that gRPC's clients know."""
    with occupied(max_queue=1) as (running, runner, opened, held):
        calls = Stub(opened)
        error = assert_failed("RESOURCE_EXHAUSTED", "OVERLOADED", calls.ModelInfer, REQUEST)
        assert all(0.5 <= delay_s < 60 for delay_s in retry_delays_s(error))
        assert sample(running.client, "rednet_refused_total", reason="overloaded") == 1
        assert requests(running, 429) == 1
        unsent = opened.stream_unary(INFER)
        assert_failed("RESOURCE_EXHAUSTED", "OVERLOADED", unsent, never_sent())  # before the message has arrived
        assert_failed("RESOURCE_EXHAUSTED", "OVERLOADED", calls.ModelInfer, REQUEST, timeout=0.05)
        runner.go_on.set()
        assert held.result().status_code == 200
        assert calls.ModelInfer(REQUEST).outputs


def test_retry_policy_of_a_client_waits_as_long_as_the_server_says() -> None:
    """gRPC's own clients obey the trailer: the call succeeds once the server is ready."""
    policy = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.01s",
        "maxBackoff": "0.01s", "backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE"]}}]}"""
    runner = FakeRunner()
    runner.warm.clear()
    with ServerThread(runner, grpc_port=0) as running:
        options = [("grpc.service_config", policy), ("grpc.enable_retries", 1)]
        with grpc.insecure_channel(running.grpc_address, options) as opened:
            call = Stub(opened).ModelInfer.future(REQUEST)
            wait_until(lambda: requests(running, 503) == 1, "the first attempt")
            runner.warm.set()
            assert call.result(PATIENCE_S).outputs
            assert requests(running, 503) == 1  # with a backoff of 10 ms, all attempts would have been over


def test_starting_server_is_unavailable() -> None:
    """ServerLive holds; ServerReady and ModelReady do not."""
    runner = FakeRunner()
    runner.warm.clear()
    with ServerThread(runner, grpc_port=0) as running, channel(running.grpc_address) as opened:
        calls = Stub(opened)
        assert calls.ServerLive(pb.ServerLiveRequest()).live
        assert not calls.ServerReady(pb.ServerReadyRequest()).ready
        assert not calls.ModelReady(pb.ModelReadyRequest(name="fake")).ready
        assert health(opened) == "NOT_SERVING"
        error = assert_failed("UNAVAILABLE", "NOT_READY", calls.ModelInfer, REQUEST)
        assert all(delay_s >= 1 for delay_s in retry_delays_s(error))
        runner.warm.set()
        wait_until(lambda: bool(calls.ServerReady(pb.ServerReadyRequest()).ready), "readiness")


def test_drain_answers_accepted_calls_and_refuses_new_ones() -> None:
    """Health changes first, and the server ends once it has answered, with status 0."""
    with occupied() as (running, runner, opened, held):
        calls = Stub(opened)
        accepted = calls.ModelInfer.future(REQUEST)
        wait_until(lambda: running.engine_client.queue_depth == 2, "the queue")
        running.terminate()
        assert health(opened) == "NOT_SERVING"
        assert calls.ServerLive(pb.ServerLiveRequest()).live
        assert not calls.ServerReady(pb.ServerReadyRequest()).ready
        error = assert_failed("UNAVAILABLE", "DRAINING", calls.ModelInfer, REQUEST)
        assert all(delay_s >= 1 for delay_s in retry_delays_s(error))
        runner.go_on.set()
        assert accepted.result(PATIENCE_S).outputs
        assert held.result().status_code == 200
        running.wait_for_end()
        assert running.exit_code == 0
        assert failed(calls.ModelInfer, REQUEST).code() is grpc.StatusCode.UNAVAILABLE


def test_calls_are_told_when_the_drain_is_over() -> None:
    """Those that wait for the device, and those whose message has not arrived. Open streams hold nothing up."""
    with occupied(drain_timeout_s=0.2) as (running, runner, opened, _):
        waiting = Stub(opened).ModelInfer.future(REQUEST)
        upload = opened.stream_unary(INFER).future(never_sent())
        path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        stream = opened.stream_stream(path)(never_sent())
        wait_until(lambda: running.engine_client.requests == 3, "the calls")
        started = time.monotonic()
        running.terminate()
        assert_failed("UNAVAILABLE", "DRAINING", waiting.result)
        assert_failed("UNAVAILABLE", "DRAINING", upload.result)
        assert failed(next, stream).code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        runner.go_on.set()
        running.wait_for_end()
        assert time.monotonic() - started < 10


def test_second_signal_ends_calls_at_once(tiny_path: Path) -> None:
    """As over HTTP: a person who presses Ctrl-C twice does not want to wait."""
    with ServerProcess("--checkpoint", tiny_path, "--grpc-port", 0) as running, channel(running.grpc_address) as opened:
        upload = opened.stream_unary(INFER).future(never_sent())
        wait_until(lambda: sample(running.client, "rednet_inflight_requests") == 2, "the upload")
        running.process.send_signal(signal.SIGINT)
        wait_until(lambda: running.client.get("/readyz").status_code == 503, "the drain")
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(10) == 1
        assert failed(upload.result).code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize("delay_s", [0.05 * index for index in range(int(os.environ.get("TERMINATIONS", "2")))])
def test_sigterm_under_load_loses_no_call(tiny_path: Path, delay_s: float) -> None:
    """Every call is answered or refused as UNAVAILABLE; clients have every answer that the server has in its log.

    Set TERMINATIONS=20 for more of these tests.
    """
    request = image_request(encoded(photo()), model="tiny")
    outcomes: Counter[str] = Counter()
    answered, over = threading.Event(), threading.Event()
    options = ["--checkpoint", tiny_path, "--grpc-port", 0, "--log-format", "json"]
    with ServerProcess(*options) as running, ThreadPoolExecutor(9) as pool:
        address = running.grpc_address

        def call_until_over() -> Counter[str]:
            found: Counter[str] = Counter()
            with channel(address) as opened:
                calls = Stub(opened)
                while not over.is_set():
                    try:
                        found["OK" if calls.ModelInfer(request, timeout=PATIENCE_S).outputs else "empty"] += 1
                        answered.set()
                    except grpc.RpcError as error:
                        found[f"{error.code().name} {reason(error)}".strip()] += 1
                        time.sleep(0.01)
            return found

        callers = [pool.submit(call_until_over) for _ in range(8)]
        try:
            assert answered.wait(PATIENCE_S)
            time.sleep(delay_s)
            over_http = pool.submit(predict, running.client, encoded(photo()))
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(PATIENCE_S) == 0
            assert over_http.result().status_code in (200, 503)
        finally:
            over.set()
        for caller in callers:
            outcomes += caller.result()
        logged = sum('"status":200' in line and f'"endpoint":"{INFER}"' in line for line in running.log.splitlines())
    assert outcomes.keys() <= {"OK", "UNAVAILABLE DRAINING", "UNAVAILABLE"}, outcomes
    assert outcomes["OK"] == logged
    assert outcomes["UNAVAILABLE DRAINING"] > 0
