"""Triton's extensions of the Open Inference Protocol on real servers, as its client asks for them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.conftest import encoded, photo
from tests.http_helpers import CUT
from tests.servers import FakeRunner, ServerProcess, ServerThread, wait_until

PHOTOS = [encoded(photo(seed)) for seed in range(3)]


@pytest.fixture(scope="module", params=["1", "2"], ids=["one process", "two front ends"])
def counted(request: pytest.FixtureRequest, tiny_path: Path) -> Iterator[ServerProcess]:
    """A server whose statistics no other test changes."""
    with ServerProcess("--checkpoint", tiny_path, "--frontends", request.param, "--max-queue", 100) as running:
        yield running


def client_of(running: ServerProcess | ServerThread) -> Any:
    return triton.InferenceServerClient(running.url.removeprefix("http://"))


def statistics(running: ServerProcess) -> dict[str, Any]:
    with client_of(running) as client:
        (model,) = client.get_inference_statistics("tiny")["model_stats"]
    found: dict[str, Any] = model
    return found


def counts(model: Mapping[str, Any]) -> dict[str, int]:
    """The counts of everything that is timed, by name."""
    return {name: each["count"] for name, each in model["inference_stats"].items()}


def infer(running: ServerProcess, *photos: bytes) -> None:
    tensor = triton.InferInput("image", [len(photos)], "BYTES")
    tensor.set_data_from_numpy(np.array(photos, dtype=np.object_))
    with client_of(running) as client:
        client.infer("tiny", [tensor])


def test_statistics_count_requests_images_and_batches(counted: ServerProcess) -> None:
    """Of every endpoint that takes images, and of both front ends: each request has a connection of its own."""
    before = statistics(counted)
    with pytest.raises(InferenceServerException, match="image 1"):
        infer(counted, PHOTOS[0], CUT)
    for _ in range(4):
        infer(counted, *PHOTOS)
        httpx.post(f"{counted.url}/v1/predict", content=PHOTOS[0])
    counted.client.get("/v1/model")
    wait_until(lambda: counts(statistics(counted))["success"] - counts(before)["success"] == 8, "the counts")
    after = statistics(counted)
    added = {name: count - counts(before)[name] for name, count in counts(after).items()}
    assert added == {
        "success": 8,
        "fail": 1,
        "queue": 17,
        "compute_input": 17,
        "compute_infer": 17,
        "compute_output": 8,
    }
    assert (after["name"], after["version"]) == ("tiny", "1")
    assert after["inference_count"] - before["inference_count"] == 17
    assert 8 <= after["execution_count"] - before["execution_count"] <= 17
    spent_s = {name: each["ns"] / 1e9 for name, each in after["inference_stats"].items()}
    assert 0 < spent_s["compute_input"] < 60
    assert spent_s["compute_infer"] / after["inference_stats"]["compute_infer"]["count"] < spent_s["success"]


def test_statistics_have_the_same_answer_at_every_address(counted: ServerProcess) -> None:
    with client_of(counted) as client:
        expected = client.get_inference_statistics("tiny")
        assert client.get_inference_statistics() == expected
        assert client.get_inference_statistics("tiny", "1") == expected
        for wrong in (("large",), ("tiny", "2")):
            with pytest.raises(InferenceServerException, match="no such"):
                client.get_inference_statistics(*wrong)


def test_config_describes_a_model_that_batches(counted: ServerProcess) -> None:
    """Shapes are without the number of images, as Triton's tools expect where `max_batch_size` is not 0."""
    with client_of(counted) as client:
        config = client.get_model_config("tiny")
        assert client.get_model_config("tiny", "1") == config
        metadata = client.get_model_metadata("tiny")
        with pytest.raises(InferenceServerException, match="no such model"):
            client.get_model_config("large")
    assert (config["name"], config["platform"], config["max_batch_size"]) == ("tiny", "pytorch_rednet", 100)
    assert config["input"] == [
        {"name": "image", "data_type": "TYPE_STRING", "dims": [], "optional": True},
        {"name": "pixels", "data_type": "TYPE_FP32", "dims": [3, 64, 64], "optional": True},
    ]
    assert [(each["name"], each["dims"]) for each in config["output"]] == [
        (each["name"], each["shape"][1:]) for each in metadata["outputs"]
    ]
    assert config["instance_group"] == [{"name": "tiny_cpu", "kind": "KIND_CPU", "count": 1, "gpus": []}]
    largest = counted.client.get("/v1/model").json()["max_batch_size"]
    assert config["dynamic_batching"] == {"preferred_batch_size": [largest]}


def test_repository_index_lists_the_model(counted: ServerProcess) -> None:
    with client_of(counted) as client:
        assert client.get_model_repository_index() == [{"name": "tiny", "version": "1", "state": "READY", "reason": ""}]
        assert {"model_configuration", "model_repository", "statistics"} <= {
            *client.get_server_metadata()["extensions"]
        }
    for body in ('{"ready": 1}', "[]", "{", " " * 2000):
        assert counted.client.post("/v2/repository/index", content=body).status_code in (400, 413)


def test_repository_index_shows_the_state_of_the_model() -> None:
    """While it warms up, while it is ready, and while it drains."""
    runner = FakeRunner()
    runner.warm.clear()

    def index(running: ServerThread, **asked: bool) -> list[tuple[str, str]]:
        entries = running.client.post("/v2/repository/index", json=asked).json()
        return [(entry["state"], entry["reason"]) for entry in entries]

    with ServerThread(runner) as running:
        assert index(running) == [("LOADING", "starting")]
        assert index(running, ready=True) == []
        runner.warm.set()
        wait_until(lambda: index(running, ready=True) == [("READY", "")], "readiness")


def test_triton_client_cannot_load_models_or_share_memory(counted: ServerProcess) -> None:
    """400, with a message that says what to do instead."""
    with client_of(counted) as client:
        for call, message in (
            (lambda: client.load_model("tiny"), "after SIGHUP"),
            (lambda: client.unload_model("tiny"), "after SIGHUP"),
            (client.get_system_shared_memory_status, "shared memory is not supported"),
            (lambda: client.get_cuda_shared_memory_status("a"), "shared memory is not supported"),
            (lambda: client.register_system_shared_memory("a", "/a", 100), "shared memory is not supported"),
            (lambda: client.register_cuda_shared_memory("a", b"a", 0, 100), "shared memory is not supported"),
            (client.unregister_system_shared_memory, "shared memory is not supported"),
            (lambda: client.unregister_cuda_shared_memory("a"), "shared memory is not supported"),
        ):
            with pytest.raises(InferenceServerException, match=message) as caught:
                call()
            assert caught.value.status() == "400"


def test_input_in_shared_memory_is_rejected(counted: ServerProcess) -> None:
    """With the message of outputs in shared memory, rather than that it has no data."""
    tensor = triton.InferInput("image", [1], "BYTES")
    tensor.set_shared_memory("region", 20)
    with client_of(counted) as client, pytest.raises(InferenceServerException, match="not supported") as caught:
        client.infer("tiny", [tensor])
    assert caught.value.status() == "400"


def test_openapi_describes_extensions(counted: ServerProcess) -> None:
    paths = counted.client.get("/openapi.json").json()["paths"]
    for path in ("/v2/models/{name}/config", "/v2/models/{name}/versions/{version}/stats", "/v2/models/stats"):
        assert paths[path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert paths["/v2/repository/index"]["post"]["requestBody"]
    assert not [path for path in paths if "sharedmemory" in path]
