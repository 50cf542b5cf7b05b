"""The `/v1` endpoints on a real server."""

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import encoded, photo
from tests.http_helpers import CUT, PREDICT, TEXT, assert_error, classes, predict, sample
from tests.servers import ServerProcess, wait_until


def test_photo_as_body_form_and_json_has_the_same_prediction(server: ServerProcess) -> None:
    """As the body, in a form, and as base64 in JSON."""
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


def test_top_k_is_clamped_to_the_number_of_classes(server: ServerProcess) -> None:
    """A larger value returns all classes. Probabilities are sorted and sum to one."""
    data = encoded(photo())
    few = server.client.post(PREDICT, content=data, params={"top_k": 2})
    every = server.client.post(PREDICT, content=data, params={"top_k": 1000})
    assert len(classes(few)) == 2
    probabilities = [entry["probability"] for entry in classes(every)]
    assert len(probabilities) == 5
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    assert {entry["index"] for entry in classes(every)} == set(range(5))


def test_unreadable_image_does_not_affect_other_images(server: ServerProcess) -> None:
    """Every image of a request has its own result or error, in order."""
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


def test_form_fields_that_are_not_images_are_listed_in_the_response(server: ServerProcess) -> None:
    """Images without a file name are answered in order. Without text fields there is no list."""
    first, second = encoded(photo(1)), encoded(photo(2))
    files: dict[str, Any] = {"a": (None, first), "b": ("b.png", second), "comment": (None, "hello")}
    for path, entries in ((PREDICT, "predictions"), ("/v1/features", "features")):
        answer = server.client.post(path, files=files).json()
        assert answer["ignored"] == ["comment"]
        plain = server.client.post(path, files={"a": ("a.png", first), "b": ("b.png", second)}).json()
        assert "ignored" not in plain
        assert len(answer[entries]) == len(plain[entries]) == 2
    assert_error(server.client.post(PREDICT, files={"comment": (None, "hello")}), 400, "malformed_request")


def test_features_as_json_and_as_npy(server: ServerProcess) -> None:
    """The values are the same, and normalised features have length 1."""
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


def test_model_endpoint_describes_the_model(server: ServerProcess, tiny_path: Path) -> None:
    """Name, architecture, labels, preprocessing, precision, device, and the digest of the checkpoint."""
    model = server.client.get("/v1/model").json()
    assert (model["name"], model["architecture"], model["precision"], model["device"]) == (
        "tiny",
        "rednet26",
        "fp32",
        "cpu",
    )
    assert model["labels"][3] == {"index": 3, "id": "n3", "label": "thing 3"}
    assert model["preprocess"]["crop"] == 64
    assert model["checkpoint_sha256"] == hashlib.sha256(tiny_path.read_bytes()).hexdigest()
    assert 0 < model["deviation"] < 1e-4
    assert sample(server.client, "rednet_selfcheck_deviation_ratio") == pytest.approx(model["deviation"])
    assert 1 <= model["max_batch_size"] <= 64
    assert str(model["max_batch_size"]) in model["cost_s"]
    assert all(seconds > 0 for seconds in model["cost_s"].values())


def test_max_batch_size_is_configurable_and_limited_by_max_queue(tiny_path: Path) -> None:
    """--max-batch-size replaces the size that warm-up would choose."""
    with ServerProcess("--checkpoint", tiny_path, "--max-batch-size", 3) as running:
        model = running.client.get("/v1/model").json()
        assert (model["max_batch_size"], list(model["cost_s"])) == (3, ["1", "2", "3"])
    with ServerProcess("--checkpoint", tiny_path, "--max-batch-size", 300, "--max-queue", 2) as running:
        assert running.client.get("/v1/model").json()["max_batch_size"] == 2


def test_predictions_without_the_native_library_are_equal(server: ServerProcess, tiny_path: Path) -> None:
    """It is slower, and the log and /v1/model give the reason."""
    data = encoded(photo())
    with ServerProcess("--checkpoint", tiny_path, REDNET_NATIVE="off") as running:
        model = running.client.get("/v1/model").json()
        assert model["backend"] == "torch, involution: torch"
        assert model["passed_over"] == ["native engine: REDNET_NATIVE is off"]
        assert "rejected backend: native engine: REDNET_NATIVE is off" in running.log
        slow, fast = classes(predict(running.client, data)), classes(predict(server.client, data))
        assert [entry["label"] for entry in slow] == [entry["label"] for entry in fast]
        for one, other in zip(slow, fast, strict=True):
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_health_and_documentation_endpoints(server: ServerProcess) -> None:
    """The OpenAPI document describes every endpoint."""
    assert server.client.get("/livez").json() == server.client.get("/readyz").json() == {"status": "ready"}
    assert server.client.get("/docs").status_code == 200
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {PREDICT, "/v1/features", "/v1/explain", "/v1/model", "/livez", "/readyz", "/metrics"} <= paths.keys()
    assert "multipart/form-data" in paths[PREDICT]["post"]["requestBody"]["content"]


def test_responses_have_request_id_and_server_timing(server: ServerProcess) -> None:
    """A client's id is returned if it is fit for the log. Otherwise the server makes one."""
    data = encoded(photo())
    assert predict(server.client, data, **{"X-Request-Id": "order-66"}).headers["x-request-id"] == "order-66"
    for unfit in ("a b", "a" * 129):
        assert len(predict(server.client, data, **{"X-Request-Id": unfit}).headers["x-request-id"]) == 32
    timing = predict(server.client, data).headers["server-timing"]
    stages = dict(part.strip().split(";", 1) for part in timing.split(","))
    assert stages.keys() == {"decode", "queue", "inference", "batch", "precision", "total"}
    assert stages["precision"] == f"desc={server.client.get('/v1/model').json()['precision']}"
    assert predict(server.client, TEXT).headers["server-timing"].startswith("total;dur=")
    assert stages["batch"] == 'desc="1"'
    assert float(stages["inference"].removeprefix("dur=")) > 0


def test_metrics_count_requests_stages_batches_and_images(server: ServerProcess) -> None:
    """Successful and failed ones, and no gauge keeps a request."""
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
    assert sample(client, "rednet_inflight_requests") == 1  # this request itself
    assert (
        sample(client, "rednet_model_info", name="tiny", architecture="rednet26", device="cpu", precision="fp32") == 1
    )
    assert sample(client, "process_resident_memory_bytes") > 0


def test_json_responses_have_no_nan_or_infinity(server: ServerProcess) -> None:
    """A strict parser accepts them."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for path in (PREDICT, "/v1/features"):
        json.loads(server.client.post(path, content=encoded(photo())).text, parse_constant=refuse)
