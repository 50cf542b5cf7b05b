"""The Open Inference Protocol on real servers, with Triton's client and with plain requests."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.http as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from rednet import Preprocess, load_checkpoint, prepare
from rednet.service.engine.runner import PreparedRunner
from tests.conftest import encoded, photo
from tests.http_helpers import CUT, TEXT, classes, occupy, sample
from tests.servers import FakeRunner, ServerProcess, ServerThread, wait_until

INFER = "/v2/models/{name}/infer"
PHOTOS = [encoded(photo(seed)) for seed in range(3)]
PREPROCESS = Preprocess(resize=72, crop=64)  # the tiny checkpoint's


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Any]:
    with client_of(server) as client:
        yield client


def client_of(running: ServerProcess | ServerThread) -> Any:
    return triton.InferenceServerClient(running.url.removeprefix("http://"))


def image_input(photos: list[Any], binary: bool = True) -> Any:
    tensor = triton.InferInput("image", [len(photos)], "BYTES")
    return tensor.set_data_from_numpy(np.array(photos, dtype=np.object_), binary_data=binary)


def pixels_input(pixels: NDArray[np.float32], binary: bool = True) -> Any:
    tensor = triton.InferInput("pixels", list(pixels.shape), "FP32")
    return tensor.set_data_from_numpy(pixels, binary_data=binary)


def normalised(*seeds: int) -> NDArray[np.float32]:
    pixels = np.stack([PREPROCESS.pixels(photo(seed)) for seed in seeds])
    result: NDArray[np.float32] = PREPROCESS.normalise(torch.from_numpy(pixels)).numpy()
    return result


def ask(client: httpx.Client, name: str, json: Any) -> httpx.Response:
    return client.post(f"/v2/models/{name}/infer", json=json)


def as_json(*photos: bytes) -> dict[str, Any]:
    texts = [base64.b64encode(data).decode() for data in photos]
    return {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [len(texts)], "data": texts}]}


def assert_error(response: httpx.Response, status: int, code: str) -> None:
    body = response.json()
    assert (response.status_code, body["code"]) == (status, code), response.text
    assert isinstance(body["error"], str)
    assert body.keys() == {"error", "code"}


def test_triton_client_reads_health_and_metadata(client: Any) -> None:
    """With the version and without it, but not with another one."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("tiny", "2")
    assert not client.is_model_ready("large")
    server = client.get_server_metadata()
    assert server["name"] == "rednet-serve"
    assert {"binary_tensor_data", "classification", "parameters"} <= {*server["extensions"]}
    metadata = client.get_model_metadata("tiny")
    assert metadata == client.get_model_metadata("tiny", "1")
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"] == [
        {"name": "image", "datatype": "BYTES", "shape": [-1]},
        {"name": "pixels", "datatype": "FP32", "shape": [-1, 3, 64, 64]},
    ]
    assert [(output["name"], output["shape"]) for output in metadata["outputs"]] == [
        ("logits", [-1, 5]),
        ("probabilities", [-1, 5]),
        ("features", [-1, 512]),
    ]
    with pytest.raises(InferenceServerException, match="no such model") as caught:
        client.get_model_metadata("large")
    assert caught.value.status() == "404"


@pytest.mark.parametrize("binary", [True, False])
def test_infer_results_equal_those_of_v1(server: ServerProcess, client: Any, binary: bool) -> None:
    """For three photos, as files or as normalised pixels, in binary or in JSON."""
    files = [("f", (f"{index}.png", data)) for index, data in enumerate(PHOTOS)]
    predicted = server.client.post("/v1/predict", files=files)
    features = server.client.post("/v1/features", files=files).json()["features"]
    texts = [base64.b64encode(data) for data in PHOTOS]
    for tensor in (image_input(PHOTOS if binary else texts, binary), pixels_input(normalised(0, 1, 2), binary)):
        wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("features", "probabilities")]
        result = client.infer("tiny", [tensor], outputs=wanted, request_id="order 66")
        assert result.get_response()["id"] == "order 66"
        assert result.as_numpy("logits") is None
        np.testing.assert_allclose(result.as_numpy("features"), features, rtol=1e-3, atol=1e-4)
        for row, each in zip(result.as_numpy("probabilities"), range(3), strict=True):
            for score in classes(predicted, each):
                assert row[int(score["index"])] == pytest.approx(score["probability"], abs=1e-4)


def test_infer_returns_all_outputs_by_default(client: Any) -> None:
    """As the protocol requires. Triton's client requests binary data, with the version, too."""
    result = client.infer("tiny", [image_input(PHOTOS)], model_version="1")
    logits, shares = result.as_numpy("logits"), result.as_numpy("probabilities")
    assert (logits.shape, result.as_numpy("features").shape) == ((3, 5), (3, 512))
    np.testing.assert_allclose(shares, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), rtol=1e-4)
    assert "id" not in result.get_response()
    assert result.get_response()["model_version"] == "1"
    assert "data" not in result.get_output("logits")


@pytest.mark.parametrize("binary", [True, False])
def test_triton_client_gets_classifications(server: ServerProcess, client: Any, binary: bool) -> None:
    """With `class_count`, they are the classes of `/v1`, best first, as value, index and label."""
    wanted = [triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=3)]
    wanted.append(triton.InferRequestedOutput("features", class_count=1))
    result = client.infer("tiny", [image_input(PHOTOS)], outputs=wanted)
    rows = result.as_numpy("probabilities")
    assert (rows.shape, result.get_output("probabilities")["datatype"]) == ((3, 3), "BYTES")
    assert result.as_numpy("features").shape == (3, 1)
    files = [("f", (f"{index}.png", data)) for index, data in enumerate(PHOTOS)]
    predicted = server.client.post("/v1/predict", files=files)
    for index, row in enumerate(rows):
        for text, score in zip(row, classes(predicted, index), strict=False):
            value, position, label = (text.decode() if isinstance(text, bytes) else text).split(":", 2)
            assert (int(position), label) == (score["index"], score["label"])
            assert float(value) == pytest.approx(score["probability"], abs=1e-4)
    every = [triton.InferRequestedOutput("logits", class_count=1000)]
    assert client.infer("tiny", [image_input(PHOTOS)], outputs=every).as_numpy("logits").shape == (3, 5)


def test_shared_memory_of_the_triton_client_is_rejected(client: Any) -> None:
    """The message says what to do instead."""
    wanted = triton.InferRequestedOutput("logits")
    wanted.set_shared_memory("region", 20)
    with pytest.raises(InferenceServerException, match="shared memory is not supported") as caught:
        client.infer("tiny", [image_input(PHOTOS)], outputs=[wanted])
    assert caught.value.status() == "400"


def test_infer_outputs_mix_binary_and_json(server: ServerProcess, client: Any) -> None:
    """Each output has its own setting, and a response header gives the length of the JSON."""
    wanted = [triton.InferRequestedOutput("logits"), triton.InferRequestedOutput("probabilities", binary_data=False)]
    result = client.infer("tiny", [image_input(PHOTOS)], outputs=wanted)
    assert result.get_output("logits")["parameters"] == {"binary_data_size": 3 * 5 * 4}
    assert len(result.get_output("probabilities")["data"]) == 15
    np.testing.assert_array_equal(result.as_numpy("logits").argmax(1), result.as_numpy("probabilities").argmax(1))
    response = ask(server.client, "tiny", as_json(*PHOTOS) | {"parameters": {"binary_data_output": True}})
    json_bytes = int(response.headers["inference-header-content-length"])
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.content[json_bytes - 1 : json_bytes] == b"}"
    assert len(response.content) == json_bytes + 4 * 3 * (5 + 5 + 512)
    assert "inference-header-content-length" not in ask(server.client, "tiny", as_json(*PHOTOS)).headers


def test_infer_has_the_headers_and_metrics_of_other_endpoints(server: ServerProcess) -> None:
    """Request id, `Server-Timing` and counters."""

    def counts() -> list[float]:
        series = "rednet_request_duration_seconds_count"
        return [
            sample(server.client, series, endpoint=INFER, status="200"),
            sample(server.client, "rednet_images_total", endpoint=INFER, outcome="ok"),
        ]

    before = counts()
    response = ask(server.client, "tiny", as_json(*PHOTOS))
    assert response.headers["x-request-id"]
    assert response.headers["server-timing"].startswith("decode;dur=")
    wait_until(lambda: [b - a for a, b in zip(before, counts(), strict=True)] == [1, 3], "the counts")


@pytest.mark.parametrize(
    ("bad", "status", "code"), [(TEXT, 415, "unsupported_media_type"), (CUT, 422, "unreadable_image")]
)
def test_unreadable_image_fails_its_infer_request(
    server: ServerProcess, client: Any, bad: bytes, status: int, code: str
) -> None:
    """The protocol has no errors of single images, so the message says which image it was. Other requests succeed."""
    response = ask(server.client, "tiny", as_json(PHOTOS[0], bad, PHOTOS[1]))
    assert_error(response, status, code)
    assert response.json()["error"].startswith("image 1: ")
    with pytest.raises(InferenceServerException, match="image 2: ") as caught:
        client.infer("tiny", [image_input([*PHOTOS[:2], bad])])
    assert caught.value.status() == str(status)
    assert ask(server.client, "tiny", as_json(*PHOTOS)).status_code == 200


def test_implausible_pixels_are_400(server: ServerProcess, client: Any) -> None:
    """NaN, infinity, and values and sizes that no photo has. The log has no exception."""
    for value in (np.nan, np.inf, 1e30):
        pixels = normalised(0, 1)
        pixels[1, 0, 0, 0] = value
        with pytest.raises(InferenceServerException, match="image 1: pixels must be normalised, between") as caught:
            client.infer("tiny", [pixels_input(pixels)])
        assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match=r"pixels must be \[3, 64, 64\]"):
        client.infer("tiny", [pixels_input(np.zeros((1, 3, 32, 32), np.float32))])
    assert "the network failed" not in server.log


def test_infer_errors_have_the_body_of_the_protocol(server: ServerProcess) -> None:
    """`error` is the message. The stable code is an additional field, which clients of the protocol ignore."""
    client = server.client
    assert_error(ask(client, "tiny", {}), 400, "malformed_request")
    assert_error(ask(client, "tiny", as_json()), 400, "malformed_request")
    assert_error(ask(client, "tiny", as_json(*[b""] * 257)), 413, "payload_too_large")
    assert_error(client.post("/v2/models/tiny/infer", content=bytes(33_000_000)), 413, "payload_too_large")
    assert_error(ask(client, "large", as_json(*PHOTOS)), 404, "not_found")
    assert_error(client.post("/v2/models/tiny/versions/2/infer", json=as_json(*PHOTOS)), 404, "not_found")
    assert_error(client.get("/v2/nothing"), 404, "not_found")
    assert_error(client.get("/v2/models/tiny/infer"), 405, "method_not_allowed")


def test_infer_rejections_and_deadlines_equal_those_of_v1() -> None:
    """429 and 503 with Retry-After, and 504. Health endpoints report starting and draining servers."""
    runner = FakeRunner()
    runner.warm.clear()
    with ServerThread(runner, max_queue=2) as running, ThreadPoolExecutor(1) as pool, client_of(running) as client:
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert not client.is_model_ready("fake")
        assert running.client.get("/v2/health/ready").json() == {"ready": False, "live": False}
        response = ask(running.client, "fake", as_json(*PHOTOS))
        assert_error(response, 503, "not_ready")
        assert int(response.headers["retry-after"]) >= 1
        runner.warm.set()
        wait_until(client.is_server_ready, "readiness")
        held = occupy(running, runner, pool)
        late = running.client.post(
            "/v2/models/fake/infer", json=as_json(PHOTOS[0]), headers={"X-Request-Timeout-Ms": "100"}
        )
        assert_error(late, 504, "deadline_exceeded")
        assert_error(ask(running.client, "fake", as_json(*PHOTOS[:2])), 429, "overloaded")
        running.terminate()
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert_error(ask(running.client, "fake", as_json(PHOTOS[0])), 503, "draining")
        runner.go_on.set()
        assert held.result().status_code == 200
        running.wait_for_end()


def test_photos_and_their_normalised_pixels_have_the_same_features(tiny_path: Path) -> None:
    """They run in separate batches."""
    checkpoint = load_checkpoint(tiny_path)
    runner = PreparedRunner(prepare(checkpoint.net, checkpoint.preprocess, "cpu"), max_batch_size=4)
    photos, pixels = [PREPROCESS.pixels(photo(0)), PREPROCESS.pixels(photo(1))], normalised(0, 1)
    as_photos, as_pixels = runner.launch(photos).wait(), runner.launch(list(pixels)).wait()
    np.testing.assert_allclose(as_photos.features, as_pixels.features, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(as_photos.logits, as_pixels.logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(AssertionError, match="one dtype"):
        runner.launch([photos[0], pixels[0]])


def test_openapi_describes_infer_with_and_without_version(server: ServerProcess) -> None:
    """Its path parameters, and an example."""
    paths = server.client.get("/openapi.json").json()["paths"]
    for path, names in ((INFER, {"name"}), ("/v2/models/{name}/versions/{version}/infer", {"name", "version"})):
        operation = paths[path]["post"]
        assert {each["name"] for each in operation["parameters"] if "name" in each} == names
        assert operation["requestBody"]["content"]["application/json"]["example"]["inputs"]
    assert {"/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/{name}"} <= paths.keys()
