"""The server as its callers see it: a real process, or the real application around a runner of the test's own."""

import base64
import io
import json
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import encoded, photo
from tests.servers import REDNET, FakeRunner, ServerProcess, ServerThread, wait_until

PREDICT = "/v1/predict"
PNG = {"Content-Type": "image/png"}
TEXT = b"certainly no image"
CUT = encoded(photo())[:500]


def predict(client: httpx.Client, data: bytes, **headers: str) -> httpx.Response:
    return client.post(PREDICT, content=data, headers=PNG | headers)


def sample(client: httpx.Client, series: str, **labels: str) -> float:
    """The value of one series of `/metrics`, 0 where there is none."""
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for each in family.samples:
            if each.name == series and labels.items() <= each.labels.items():
                return float(each.value)
    return 0.0


def assert_error(response: httpx.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    assert response.json()["error"]["message"]
    assert response.headers["x-request-id"]


# Three ways to send images


def test_three_ways_to_send_a_photo_give_one_answer(server: ServerProcess) -> None:
    """As the body, in a form, as base64 in JSON."""
    data = encoded(photo())
    url = {"image": base64.b64encode(data).decode()}
    answers = [
        predict(server.client, data),
        server.client.post(PREDICT, content=data),  # without a Content-Type
        server.client.post(PREDICT, content=data, headers={"Content-Type": "application/octet-stream"}),
        server.client.post(PREDICT, files={"any-name": ("photo.png", data)}),
        server.client.post(PREDICT, json={"images": [url["image"]]}),
        server.client.post(PREDICT, json={"images": ["data:image/png;base64," + url["image"]]}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 6
    expected = answers[0].json()
    assert expected["model"] == "tiny"
    for answer in answers[1:]:
        for ours, theirs in zip(classes(answer), classes(answers[0]), strict=True):
            assert ours["label"] == theirs["label"]
            assert ours["probability"] == pytest.approx(theirs["probability"], rel=1e-4)


def classes(response: httpx.Response, index: int = 0) -> list[dict[str, float]]:
    found: list[dict[str, float]] = response.json()["predictions"][index]["classes"]
    return found


def test_top_k_counts_classes_and_is_clamped(server: ServerProcess) -> None:
    """More than there are means all of them; probabilities fall and add up to one."""
    data = encoded(photo())
    few = server.client.post(PREDICT, content=data, params={"top_k": 2})
    every = server.client.post(PREDICT, content=data, params={"top_k": 1000})
    assert len(classes(few)) == 2
    probabilities = [entry["probability"] for entry in classes(every)]
    assert len(probabilities) == 5
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    assert {entry["index"] for entry in classes(every)} == set(range(5))


def test_one_unreadable_image_never_touches_its_neighbours(server: ServerProcess) -> None:
    """Every image of a request has its own answer or its own error, in order."""
    data = encoded(photo())
    files = [("f", ("a.png", data)), ("f", ("b.png", TEXT)), ("f", ("c.png", CUT)), ("f", ("d.png", data))]
    response = server.client.post(PREDICT, files=files)
    assert response.status_code == 200
    first, second, third, fourth = response.json()["predictions"]
    assert second["error"]["code"] == "unsupported_media_type"
    assert third["error"]["code"] == "unreadable_image"
    alone = predict(server.client, data).json()["predictions"][0]["classes"][0]
    for entry in (first, fourth):
        assert entry["classes"][0]["probability"] == pytest.approx(alone["probability"], rel=1e-4)
    response = server.client.post(PREDICT, json={"images": ["%%%", base64.b64encode(data).decode()]})
    assert response.json()["predictions"][0]["error"]["code"] == "malformed_request"
    assert "classes" in response.json()["predictions"][1]


def test_features_as_json_and_as_an_array(server: ServerProcess) -> None:
    """The same numbers in both; normalised ones have length 1."""
    files = [("f", ("a.png", encoded(photo(1)))), ("f", ("b.png", encoded(photo(2))))]
    answer = server.client.post("/v1/features", files=files).json()
    assert (answer["model"], answer["dimension"]) == ("tiny", 512)
    response = server.client.post("/v1/features", files=files, headers={"Accept": "application/x-npy"})
    array = np.load(io.BytesIO(response.content))
    assert (array.shape, array.dtype) == ((2, 512), np.float32)
    assert response.headers["content-type"] == "application/x-npy"
    np.testing.assert_allclose(array, answer["features"], rtol=1e-3, atol=1e-5)
    normal = server.client.post("/v1/features", files=files, params={"normalize": "true"}).json()["features"]
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, rtol=1e-5)
    files[0] = ("f", ("a.png", TEXT))
    mixed = server.client.post("/v1/features", files=files).json()["features"]
    assert mixed[0]["error"]["code"] == "unsupported_media_type"
    assert len(mixed[1]) == 512
    response = server.client.post("/v1/features", files=files, headers={"Accept": "application/x-npy"})
    assert_error(response, 415, "unsupported_media_type")


# What else there is to ask


def test_the_model_describes_itself(server: ServerProcess) -> None:
    """Name, architecture, labels, preprocessing, precision and device."""
    model = server.client.get("/v1/model").json()
    assert (model["name"], model["architecture"], model["precision"], model["device"]) == (
        "tiny",
        "rednet26",
        "fp32",
        "cpu",
    )
    assert model["labels"][3] == {"index": 3, "id": "n3", "label": "thing 3"}
    assert model["preprocess"]["crop"] == 64


def test_health_and_documentation_answer(server: ServerProcess) -> None:
    """And the document knows every endpoint."""
    assert server.client.get("/livez").json() == server.client.get("/readyz").json() == {"status": "ready"}
    assert server.client.get("/docs").status_code == 200
    assert server.client.get("/", follow_redirects=True).url.path == "/docs"
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {PREDICT, "/v1/features", "/v1/model", "/livez", "/readyz", "/metrics"} <= paths.keys()
    assert "multipart/form-data" in paths[PREDICT]["post"]["requestBody"]["content"]


def test_answers_carry_their_id_and_their_times(server: ServerProcess) -> None:
    """A caller's id comes back, unless it is unfit for a header; then, and without one, the server makes one."""
    data = encoded(photo())
    assert predict(server.client, data, **{"X-Request-Id": "order-66"}).headers["x-request-id"] == "order-66"
    made = predict(server.client, data, **{"X-Request-Id": "a b"}).headers["x-request-id"]
    assert len(made) == 32
    timing = predict(server.client, data).headers["server-timing"]
    stages = dict(part.strip().split(";", 1) for part in timing.split(","))
    assert stages.keys() == {"decode", "queue", "inference", "batch"}
    assert stages["batch"] == 'desc="1"'
    assert float(stages["inference"].removeprefix("dur=")) > 0


def test_metrics_count_what_happened(server: ServerProcess) -> None:
    """Requests, stages, batches and images, good and bad; and nothing stays in flight."""
    client = server.client

    def counts() -> list[float]:
        return [
            sample(client, "rednet_request_duration_seconds_count", endpoint=PREDICT, status="200"),
            sample(client, "rednet_request_duration_seconds_count", endpoint=PREDICT, status="415"),
            sample(client, "rednet_images_total", endpoint=PREDICT, outcome="ok"),
            sample(client, "rednet_images_total", endpoint=PREDICT, outcome="unsupported_media_type"),
            *(
                sample(client, "rednet_stage_duration_seconds_count", stage=stage)
                for stage in ("decode", "queue", "inference", "respond")
            ),
            sample(client, "rednet_batch_size_sum"),
        ]

    before = counts()
    predict(client, encoded(photo()))
    predict(client, TEXT)
    wait_until(lambda: [b - a for a, b in zip(before, counts(), strict=True)] == [1] * 9, "the counts")
    assert sample(client, "rednet_ready") == 1
    assert sample(client, "rednet_queue_depth") == 0
    assert sample(client, "rednet_backlog_seconds") == 0
    assert sample(client, "rednet_inflight_requests") == 1  # this one
    assert (
        sample(client, "rednet_model_info", name="tiny", architecture="rednet26", device="cpu", precision="fp32") == 1
    )
    assert sample(client, "process_resident_memory_bytes") > 0


# Every row of the contract's error table


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b"", "image/png", 400, "malformed_request"),
        (b"{", "application/json", 400, "malformed_request"),
        (b'{"images": []}', "application/json", 400, "malformed_request"),
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
def test_a_bad_body_is_a_clear_error(
    server: ServerProcess, content: bytes, content_type: str, status: int, code: str
) -> None:
    """Status and code as in the contract, and the next good request is answered."""
    response = server.client.post(PREDICT, content=content, headers={"Content-Type": content_type})
    assert_error(response, status, code)
    assert predict(server.client, encoded(photo())).status_code == 200


@pytest.mark.parametrize("parameters", [{"top_k": "0"}, {"top_k": "x"}])
def test_a_bad_parameter_is_a_clear_error(server: ServerProcess, parameters: dict[str, str]) -> None:
    """400, not the framework's own answer."""
    response = server.client.post(PREDICT, content=encoded(photo()), params=parameters)
    assert_error(response, 400, "malformed_request")


@pytest.mark.parametrize("timeout", ["0", "-5", "soon", "1e3", "99999999999"])
def test_a_bad_timeout_is_a_clear_error(server: ServerProcess, timeout: str) -> None:
    """400 names the header."""
    response = predict(server.client, encoded(photo()), **{"X-Request-Timeout-Ms": timeout})
    assert_error(response, 400, "malformed_request")


def test_other_paths_and_methods_have_errors_of_the_same_shape(server: ServerProcess) -> None:
    """404 and 405."""
    assert_error(server.client.get("/v1/nothing"), 404, "not_found")
    assert_error(server.client.get(PREDICT), 405, "method_not_allowed")


def test_too_large_is_413_whatever_the_length_claims(tiny_path: Path) -> None:
    """Too many bytes, announced or streamed, and too many pixels; the server goes on."""
    with ServerProcess("--checkpoint", tiny_path, "--max-body-mb", "0.05", "--max-pixels", "10000") as running:
        assert_error(predict(running.client, bytes(60_000)), 413, "payload_too_large")
        chunks = (bytes(10_000) for _ in range(6))
        assert_error(running.client.post(PREDICT, content=chunks), 413, "payload_too_large")
        assert_error(predict(running.client, encoded(photo(width=101, height=100), "GIF")), 413, "payload_too_large")
        assert predict(running.client, encoded(photo(width=100, height=100), "GIF")).status_code == 200


def test_a_full_queue_is_429_with_a_time_to_retry() -> None:
    """The device is held, the queue is full: the next request is refused at once; later all is well."""
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


def test_before_warm_up_ends_it_is_503_not_ready() -> None:
    """Alive, but neither ready nor taking work; then it is."""
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


def test_a_passed_deadline_is_504_and_costs_no_device_time() -> None:
    """A caller with little patience is answered in time, and the image never runs."""
    runner = FakeRunner()
    with ServerThread(runner) as running, ThreadPoolExecutor(1) as pool:
        runner.go_on.clear()
        held = pool.submit(predict, running.client, encoded(photo()))
        assert runner.running.wait(10)
        started = time.monotonic()
        response = predict(running.client, encoded(photo()), **{"X-Request-Timeout-Ms": "200"})
        assert_error(response, 504, "deadline_exceeded")
        assert 0.2 <= time.monotonic() - started < 5
        runner.go_on.set()
        assert held.result().status_code == 200
        assert predict(running.client, encoded(photo())).status_code == 200
        assert runner.batches == [1, 1]
        assert sample(running.client, "rednet_cancelled_total", stage="queue") == 1


def test_a_defect_is_500_and_stays_inside() -> None:
    """The answer says nothing of the cause; the next request is answered."""
    runner = FakeRunner()
    runner.fail_on = lambda pixels: bool((pixels[0] == 255).all())
    with ServerThread(runner) as running:
        response = predict(running.client, encoded(photo().point(lambda _: 255)))
        assert_error(response, 500, "internal")
        assert "asked for" not in response.text
        assert predict(running.client, encoded(photo())).status_code == 200


def test_a_caller_who_leaves_frees_the_queue() -> None:
    """The image of a closed connection never runs, and no gauge keeps it."""
    runner = FakeRunner()
    with ServerThread(runner) as running, ThreadPoolExecutor(1) as pool:
        runner.go_on.clear()
        held = pool.submit(predict, running.client, encoded(photo()))
        assert runner.running.wait(10)
        host, port = running.url.removeprefix("http://").split(":")
        data = encoded(photo())
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            wait_until(lambda: running.engine_client.queue_depth == 2, "the second image")
        wait_until(lambda: running.engine_client.queue_depth == 1, "its departure")
        runner.go_on.set()
        assert held.result().status_code == 200
        assert predict(running.client, encoded(photo())).status_code == 200
        assert runner.batches == [1, 1]
        assert sample(running.client, "rednet_inflight_requests") == 1  # this one
        assert sample(running.client, "rednet_cancelled_total", stage="queue") == 1


def test_an_engine_that_fails_is_seen() -> None:
    """Liveness turns 503, and requests get an error instead of waiting."""

    class Broken(FakeRunner):
        def warm_up(self) -> None:
            raise RuntimeError("no such device")

    with ServerThread(Broken()) as running:
        wait_until(lambda: running.client.get("/livez").status_code == 503, "the failure")
        assert running.client.get("/readyz").status_code == 503
        assert_error(predict(running.client, encoded(photo())), 500, "internal")


# Batching


def test_concurrent_clients_share_batches_and_get_their_own_answers(server: ServerProcess) -> None:
    """32 clients at once: batches above 1, every answer the one that its photo gets alone."""
    photos = [encoded(photo(seed)) for seed in range(32)]
    alone = [classes(predict(server.client, data)) for data in photos]
    batches_before, images_before = batches(server.client)
    with ThreadPoolExecutor(32) as pool, httpx.Client(base_url=server.url, timeout=60) as client:
        together = [classes(answer) for answer in pool.map(lambda data: predict(client, data), photos * 4)]
    for ours, theirs in zip(together, alone * 4, strict=True):
        by_label = {entry["label"]: entry["probability"] for entry in theirs}
        for entry in ours:
            assert entry["probability"] == pytest.approx(by_label[entry["label"]], abs=1e-4)
    batches_after, images_after = batches(server.client)
    assert images_after - images_before == 128
    assert batches_after - batches_before < 128


def batches(client: httpx.Client) -> tuple[float, float]:
    return sample(client, "rednet_batch_size_count"), sample(client, "rednet_batch_size_sum")


def test_a_window_gathers_a_batch_and_its_size_is_limited() -> None:
    """--max-wait-ms makes requests that arrive one by one share a batch; --max-batch-size bounds it."""
    runner = FakeRunner()
    with ServerThread(runner, max_wait_ms=2000, max_batch_size=4) as running, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: predict(running.client, encoded(photo(seed))), range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert runner.batches == [4, 4]


def test_a_lone_request_is_not_delayed() -> None:
    """No window by default: an image waits for nothing but the device."""
    with ServerThread(FakeRunner()) as running:
        timing = predict(running.client, encoded(photo())).headers["server-timing"]
        queued_ms = float(timing.split("queue;dur=")[1].split(",")[0])
        assert queued_ms < 100


# The end


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
        runner.go_on.clear()
        held = pool.submit(predict, running.client, encoded(photo()))
        assert runner.running.wait(10)
        running.engine_client.begin_drain()
        assert running.client.get("/readyz").status_code == 503
        assert running.client.get("/livez").status_code == 200
        response = predict(running.client, encoded(photo()))
        assert_error(response, 503, "draining")
        assert int(response.headers["retry-after"]) >= 1
        runner.go_on.set()
        assert held.result().status_code == 200


def test_a_second_signal_ends_it_at_once(tiny_path: Path) -> None:
    """Ctrl-C twice never hangs, even with an upload that does not end; the status tells that it was cut short."""
    with ServerProcess("--checkpoint", tiny_path, "--drain-timeout-s", "600") as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
            time.sleep(0.2)
            running.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert running.process.poll() is None
            running.process.send_signal(signal.SIGINT)
            assert running.process.wait(10) == 1


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
    assert "REDNET_MAX_QUEU is no option" in misspelt.stderr


def test_json_answers_are_plain_json(server: ServerProcess) -> None:
    """Readable by the strictest parser: no NaN, no infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for path in (PREDICT, "/v1/features"):
        json.loads(server.client.post(path, content=encoded(photo())).text, parse_constant=refuse)
