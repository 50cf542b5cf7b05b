"""Every row of the contract's error table on a real server, which still answers afterwards."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from rednet.service.cost_table import CostTable
from rednet.service.decoding.decoder import Decoded, Decoder
from rednet.service.decoding.fair_queue import Flow
from rednet.service.types import State
from tests.conftest import encoded, photo
from tests.http_helpers import CUT, PREDICT, TEXT, assert_error, connected, occupy, predict, sample
from tests.servers import FakeRunner, ServerProcess, ServerThread, wait_until


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b"", "image/png", 400, "malformed_request"),
        (b"{", "application/json", 400, "malformed_request"),
        (b'{"images": []}', "application/json", 400, "malformed_request"),
        (b'{"images": [""]}', "application/json", 400, "malformed_request"),
        (
            b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
            400,
            "malformed_request",
        ),
        (b'{"images": "text"}', "application/json", 400, "malformed_request"),
        (b'{"pictures": [""]}', "application/json", 400, "malformed_request"),
        (b'{"images": ["%%%"]}', "application/json", 400, "malformed_request"),
        (b"[" * 100_000, "application/json", 400, "malformed_request"),
        (b"--x\r\n", "multipart/form-data", 400, "malformed_request"),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 400, "malformed_request"),
        (b"nothing of the kind", "multipart/form-data; boundary=x", 400, "malformed_request"),
        (
            b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\ncut',
            "multipart/form-data; boundary=x",
            400,
            "malformed_request",
        ),
        (TEXT, "image/png", 415, "unsupported_media_type"),
        (TEXT, "text/plain", 415, "unsupported_media_type"),
        (CUT, "image/png", 422, "unreadable_image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "image/png", 422, "unreadable_image"),
    ],
)
def test_invalid_body_has_the_documented_error(
    server: ServerProcess, content: bytes, content_type: str, status: int, code: str
) -> None:
    """Status and code are those of the contract, and the next valid request is answered."""
    response = server.client.post(PREDICT, content=content, headers={"Content-Type": content_type})
    assert_error(response, status, code)
    assert predict(server.client, encoded(photo())).status_code == 200


@pytest.mark.parametrize("parameters", [{"top_k": "0"}, {"top_k": "x"}])
def test_invalid_query_parameter_is_400(server: ServerProcess, parameters: dict[str, str]) -> None:
    """The body is the contract's, not the framework's."""
    response = server.client.post(PREDICT, content=encoded(photo()), params=parameters)
    assert_error(response, 400, "malformed_request")


@pytest.mark.parametrize("timeout", ["0", "-5", "soon", "1e3", "99999999999"])
def test_invalid_timeout_header_is_400(server: ServerProcess, timeout: str) -> None:
    """The message names the header."""
    response = predict(server.client, encoded(photo()), **{"X-Request-Timeout-Ms": timeout})
    assert_error(response, 400, "malformed_request")


def test_unknown_paths_and_methods_have_the_same_error_body(server: ServerProcess) -> None:
    """404 and 405."""
    assert_error(server.client.get("/v1/nothing"), 404, "not_found")
    assert_error(server.client.get(PREDICT), 405, "method_not_allowed")


def test_too_large_body_or_image_is_413(tiny_path: Path) -> None:
    """Too many bytes, announced or streamed, and too many pixels. The server continues."""
    with ServerProcess("--checkpoint", tiny_path, "--max-body-mb", "0.05", "--max-pixels", "10000") as running:
        assert_error(predict(running.client, bytes(60_000)), 413, "payload_too_large")
        chunks = (bytes(10_000) for _ in range(6))
        assert_error(running.client.post(PREDICT, content=chunks), 413, "payload_too_large")
        assert_error(predict(running.client, encoded(photo(width=101, height=100), "GIF")), 413, "payload_too_large")
        assert predict(running.client, encoded(photo(width=100, height=100), "GIF")).status_code == 200


def test_full_queue_is_429_with_retry_after() -> None:
    """With a busy device and a full queue, the next request is rejected immediately. Later requests are answered."""
    runner = FakeRunner()
    with ServerThread(runner, max_queue=2) as running, ThreadPoolExecutor(2) as pool:
        runner.go_on.clear()
        held = [pool.submit(predict, running.client, encoded(photo())) for _ in range(2)]
        wait_until(lambda: running.engine_client.queue_depth == 2, "a full queue")
        response = predict(running.client, encoded(photo()))
        assert_error(response, 429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        assert sample(running.client, "rednet_refused_total", reason="overloaded") == 1
        runner.go_on.set()
        assert [future.result().status_code for future in held] == [200, 200]
        assert predict(running.client, encoded(photo())).status_code == 200
        files = [("f", ("f.png", encoded(photo())))] * 3
        assert_error(running.client.post(PREDICT, files=files), 413, "payload_too_large")
        assert sample(running.client, "rednet_queue_depth") == 0


def test_stalled_uploads_hold_no_queue_slots() -> None:
    """A request of which only the head arrives takes no slot, whatever its deadline, and leaves nothing behind."""
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nX-Request-Timeout-Ms: 3600000\r\n\r\n"
    with ServerThread(FakeRunner(), max_queue=2) as running, ExitStack() as uploads:
        for _ in range(5):
            uploads.enter_context(connected(running.url, head))
        wait_until(lambda: running.engine_client.requests == 5, "the uploads")
        assert predict(running.client, encoded(photo())).status_code == 200
        assert sample(running.client, "rednet_queue_depth") == 0
        uploads.close()
        wait_until(lambda: running.engine_client.requests == 0, "their end")


def test_slow_body_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later deadline does not help, because received bytes take memory from other requests."""
    monkeypatch.setattr("rednet.service.http.image_requests.MAX_ARRIVAL_S", 0.3)
    with ServerThread(FakeRunner(), request_timeout_s=0.3) as running:

        def body() -> Iterator[bytes]:
            yield b"some"
            time.sleep(1)
            yield b"more"

        headers = {"Content-Length": "8", "X-Request-Timeout-Ms": "3600000"}
        assert_error(running.client.post(PREDICT, content=body(), headers=headers), 408, "request_timeout")


def test_server_is_503_not_ready_before_warm_up_ends() -> None:
    """It is alive, but not ready, and rejects requests. Then it is ready."""
    runner = FakeRunner()
    runner.warm.clear()
    with ServerThread(runner) as running:
        assert running.client.get("/livez").status_code == 200
        assert running.client.get("/readyz").status_code == 503
        response = predict(running.client, encoded(photo()))
        assert_error(response, 503, "not_ready")
        assert int(response.headers["retry-after"]) >= 1
        runner.warm.set()
        wait_until(lambda: running.client.get("/readyz").status_code == 200, "readiness")
        assert predict(running.client, encoded(photo())).status_code == 200


def test_passed_deadline_is_504_without_device_time(caplog: pytest.LogCaptureFixture) -> None:
    """The response comes at the deadline, and the image is not run."""
    runner = FakeRunner()
    with ServerThread(runner) as running, ThreadPoolExecutor(1) as pool:
        held = occupy(running, runner, pool)
        started = time.monotonic()
        response = predict(running.client, encoded(photo()), **{"X-Request-Timeout-Ms": "1000"})
        assert_error(response, 504, "deadline_exceeded")
        assert 1.0 <= time.monotonic() - started < 5
        runner.go_on.set()
        assert held.result().status_code == 200
        assert predict(running.client, encoded(photo())).status_code == 200
        assert runner.batches == [1, 1]
        assert sample(running.client, "rednet_cancelled_total", stage="queue") == 1
        assert sample(running.client, "rednet_images_total", outcome="deadline_exceeded") == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_unexpected_exception_is_500_without_details() -> None:
    """The response does not contain the cause, and the next request is answered."""
    runner = FakeRunner()
    runner.fail_on = lambda pixels: bool((pixels[0] == 255).all())
    with ServerThread(runner) as running:
        response = predict(running.client, encoded(photo().point(lambda _: 255)))
        assert_error(response, 500, "internal")
        assert "asked for" not in response.text
        assert predict(running.client, encoded(photo())).status_code == 200


def test_unexpected_exception_cancels_the_other_images_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their results would not be sent."""
    runner, right, bad = FakeRunner(), Decoder.decode, encoded(photo(1))

    async def decode(decoder: Decoder, data: bytes, flow: Flow) -> Decoded:
        if data == bad:
            raise RuntimeError("a defect")
        return await right(decoder, data, flow)

    monkeypatch.setattr(Decoder, "decode", decode)
    with ServerThread(runner) as running, ThreadPoolExecutor(1) as pool:
        held = occupy(running, runner, pool)
        files = [("f", ("f.png", data)) for data in (encoded(photo()), bad)]
        assert_error(running.client.post(PREDICT, files=files), 500, "internal")
        runner.go_on.set()
        assert held.result().status_code == 200
        assert predict(running.client, encoded(photo())).status_code == 200
        assert runner.batches == [1, 1]


def test_disconnected_client_frees_the_queue(caplog: pytest.LogCaptureFixture) -> None:
    """Its image is not run, and the gauges return to zero."""
    runner = FakeRunner()
    with ServerThread(runner) as running, ThreadPoolExecutor(1) as pool:
        held = occupy(running, runner, pool)
        data = encoded(photo())
        head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data)
        with connected(running.url, head + data):
            decoded = {"series": "rednet_stage_duration_seconds_count", "stage": "decode"}
            wait_until(lambda: sample(running.client, **decoded) == 2, "the second image")
        wait_until(lambda: running.engine_client.queue_depth == 1, "its departure")
        runner.go_on.set()
        assert held.result().status_code == 200
        assert predict(running.client, encoded(photo())).status_code == 200
        assert runner.batches == [1, 1]
        assert sample(running.client, "rednet_inflight_requests") == 1  # this request itself
        assert sample(running.client, "rednet_cancelled_total", stage="queue") == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_request_that_would_miss_its_deadline_is_429_before_decoding() -> None:
    """`Retry-After` is the time after which the deadline could be met. Requests with a later deadline are admitted."""
    runner = FakeRunner()  # its cost table says 10 ms per image
    with ServerThread(runner, request_timeout_s=600) as running, ThreadPoolExecutor(80) as pool:
        runner.go_on.clear()
        held = [pool.submit(predict, running.client, encoded(photo())) for _ in range(80)]
        wait_until(lambda: running.engine_client.queue_depth == 80, "a queue of 0.8 s")
        response = predict(running.client, TEXT, **{"X-Request-Timeout-Ms": "500"})
        assert_error(response, 429, "overloaded")
        assert (
            response.headers["retry-after"] == "2"
        )  # 0.81 s of work, times the safety factor of two, less half a second
        assert_error(predict(running.client, TEXT, **{"X-Request-Timeout-Ms": "5000"}), 415, "unsupported_media_type")
        runner.go_on.set()
        assert {future.result().status_code for future in held} == {200}
        assert predict(running.client, encoded(photo()), **{"X-Request-Timeout-Ms": "500"}).status_code == 200


def test_hung_device_fails_liveness_and_ends_the_server(caplog: pytest.LogCaptureFixture) -> None:
    """Waiting requests get an error, and the process exits with status 1 so that its supervisor restarts it."""
    runner = FakeRunner()
    with ServerThread(runner, hung_s=0.5) as running, ThreadPoolExecutor(1) as pool:
        held = occupy(running, runner, pool)
        response = held.result()
        assert_error(response, 503, "device_failed")
        assert int(response.headers["retry-after"]) >= 1
        assert running.engine_client.state is State.FAILED
        running.wait_for_end()
        assert running.exit_code == 1
        runner.go_on.set()
    assert "the device hangs" in caplog.text
    assert "in launch" in caplog.text  # the stack of its thread


def test_hung_warm_up_ends_the_server(caplog: pytest.LogCaptureFixture) -> None:
    """The process does not stay "starting". The limit is ten times as long, for compilers."""
    runner = FakeRunner()
    runner.warm.clear()
    with ServerThread(runner, hung_s=0.1) as running:
        running.wait_for_end()
        assert running.exit_code == 1
        runner.warm.set()
    assert "the device hangs" in caplog.text
    assert "in warm_up" in caplog.text


def test_failed_engine_ends_the_server() -> None:
    """The process exits with status 1 so that its supervisor restarts it."""

    class Broken(FakeRunner):
        def warm_up(self, begin: Callable[[float], None]) -> CostTable:
            super().warm_up(begin)
            raise RuntimeError("no such device")

    runner = Broken()
    runner.warm.clear()
    with ServerThread(runner) as running:
        assert running.client.get("/livez").status_code == 200
        runner.warm.set()
        running.wait_for_end()
        assert running.exit_code == 1
