"""Familiarity on real servers: in `/v1`, in the Open Inference Protocol over HTTP and gRPC, and in the metrics."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http
from PIL import Image

from rednet import Checkpoint, Familiarity, load_checkpoint, prepare, save_checkpoint
from tests.architecture import ROOT
from tests.conftest import encoded, needs_int8, photo
from tests.http_helpers import TEXT, predict, sample
from tests.servers import PATIENCE_S, ServerProcess, wait_until
from tests.test_v2 import as_json, image_input

PHOTOS = [encoded(photo(seed)) for seed in range(6)]
GRPC = ("--grpc-port", 0) if find_spec("grpc") else ()  # an extra
FILES = [("f", (f"{index}.png", data)) for index, data in enumerate(PHOTOS)]


def logits_of(checkpoint: Checkpoint, seeds: range) -> torch.Tensor:
    run = prepare(checkpoint.net, checkpoint.preprocess, "cpu", "fp32")
    pixels = np.stack([checkpoint.preprocess.pixels(photo(seed)) for seed in seeds])
    return run(torch.from_numpy(pixels)).logits


@pytest.fixture(scope="module")
def measured(tiny_path: Path) -> Checkpoint:
    """The tiny checkpoint with familiarity, among which the photos of the tests are spread."""
    tiny = load_checkpoint(tiny_path)
    return replace(tiny, familiarity=Familiarity.fit(logits_of(tiny, range(40))))


@pytest.fixture(scope="module")
def measured_path(measured: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measured") / "measured.safetensors"
    save_checkpoint(path, measured)
    return path


@pytest.fixture(scope="module")
def expected(measured: Checkpoint) -> list[float]:
    assert measured.familiarity
    values: list[float] = measured.familiarity(logits_of(measured, range(6))).tolist()
    assert max(values) - min(values) > 0.3  # otherwise the tests would mistake one photo for another
    return values


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def server(request: pytest.FixtureRequest, measured_path: Path) -> Iterator[ServerProcess]:
    """One process, or two front ends without torch."""
    with ServerProcess("--checkpoint", measured_path, "--frontends", request.param, *GRPC) as running:
        yield running


def infer_over_grpc(server: ServerProcess, images: int, *outputs: str) -> Any:
    import tritonclient.grpc as triton

    tensor = triton.InferInput("image", [images], "BYTES")
    tensor.set_data_from_numpy(np.array(PHOTOS[:images], dtype=np.object_))
    wanted = [triton.InferRequestedOutput(name) for name in outputs]
    result = triton.InferenceServerClient(server.grpc_address).infer("tiny", [tensor], outputs=wanted or None)
    return result.as_numpy("familiarity")


def test_v1_returns_familiarity_beside_classes(server: ServerProcess, expected: list[float]) -> None:
    """In `/v1/predict` and `/v1/explain.json`, for each image that has an answer; it is observed once per image."""
    before = sample(server.client, "rednet_familiarity_count")
    files = [*FILES[:3], ("f", ("text.png", TEXT)), *FILES[3:]]
    answers = server.client.post("/v1/predict", files=files).json()["predictions"]
    broken = answers.pop(3)
    assert broken.keys() == {"error"}
    assert [each["familiarity"] for each in answers] == pytest.approx(expected, abs=1e-3)
    assert answers[0].keys() == {"classes", "familiarity"}
    explained = server.client.post("/v1/explain.json", files=FILES[:2]).json()["explanations"]
    assert [each["familiarity"] for each in explained] == pytest.approx(expected[:2], abs=1e-3)
    kernels = server.client.post("/v1/explain.json?layer=stage1", files=FILES[:1]).json()["explanations"]
    assert kernels[0]["familiarity"] == pytest.approx(expected[0], abs=1e-3)
    assert sample(server.client, "rednet_familiarity_count") == before + 9
    low = sample(server.client, "rednet_familiarity_bucket", le="0.25")
    assert low >= sum(value <= 0.24 for value in expected) > 0


def test_many_images_keep_their_own_familiarity(server: ServerProcess, expected: list[float]) -> None:
    """More images than are compared at once."""
    files = [FILES[index % 5] for index in range(130)]
    answers = server.client.post("/v1/predict", files=files, timeout=PATIENCE_S).json()["predictions"]
    assert [each["familiarity"] for each in answers] == pytest.approx((expected[:5] * 26), abs=1e-3)


def test_model_description_says_that_answers_have_familiarity(server: ServerProcess) -> None:
    """Without the numbers behind it."""
    response = server.client.get("/v1/model")
    assert response.json()["familiarity"] is True
    assert "energies" not in response.text


def test_v2_has_an_output_familiarity(server: ServerProcess, expected: list[float]) -> None:
    """FP32 [N], by default and by name, in binary and in JSON."""
    with tritonclient.http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        outputs = client.get_model_metadata("tiny")["outputs"]
        assert outputs[-1] == {"name": "familiarity", "datatype": "FP32", "shape": [-1]}
        for binary in (True, False):
            wanted = tritonclient.http.InferRequestedOutput("familiarity", binary_data=binary)
            values = client.infer("tiny", [image_input(PHOTOS)], outputs=[wanted]).as_numpy("familiarity")
            assert values.shape == (6,)
            assert values.tolist() == pytest.approx(expected, abs=1e-3)
        every = client.infer("tiny", [image_input(PHOTOS)]).as_numpy("familiarity")
        assert every.tolist() == pytest.approx(expected, abs=1e-3)
        classified = tritonclient.http.InferRequestedOutput("familiarity", class_count=3)
        (text,) = client.infer("tiny", [image_input(PHOTOS[:1])], outputs=[classified]).as_numpy("familiarity")[0]
        value, index = text.decode().split(":")
        assert float(value) == pytest.approx(expected[0], abs=1e-3)
        assert index == "0"
    answer = server.client.post("/v2/models/tiny/infer", json=as_json(*PHOTOS[:2])).json()
    assert [each["name"] for each in answer["outputs"]] == ["logits", "probabilities", "features", "familiarity"]
    assert answer["outputs"][-1]["shape"] == [2]
    assert answer["outputs"][-1]["data"] == pytest.approx(expected[:2], abs=1e-3)


def test_grpc_has_an_output_familiarity(server: ServerProcess, expected: list[float]) -> None:
    """The same as over HTTP."""
    triton: Any = pytest.importorskip("tritonclient.grpc")
    model = triton.InferenceServerClient(server.grpc_address).get_model_metadata("tiny", as_json=True)
    assert model["outputs"][-1] == {"name": "familiarity", "datatype": "FP32", "shape": ["-1"]}
    for outputs in (["familiarity"], []):
        values = infer_over_grpc(server, 6, *outputs)
        assert values.shape == (6,)
        assert values.tolist() == pytest.approx(expected, abs=1e-3)


def test_familiarity_that_was_not_measured_is_absent(tiny_path: Path) -> None:
    """From answers and metadata; an infer request that names it is refused before the image is looked at."""
    with ServerProcess("--checkpoint", tiny_path, *GRPC) as server:
        assert predict(server.client, PHOTOS[0]).json()["predictions"][0].keys() == {"classes"}
        assert server.client.get("/v1/model").json()["familiarity"] is False
        outputs = server.client.get("/v2/models/tiny").json()["outputs"]
        assert [each["name"] for each in outputs] == ["logits", "probabilities", "features"]
        answer = server.client.post("/v2/models/tiny/infer", json=as_json(PHOTOS[0])).json()
        assert [each["name"] for each in answer["outputs"]] == ["logits", "probabilities", "features"]
        before = sample(server.client, "rednet_images_total")
        named = as_json(PHOTOS[0]) | {"outputs": [{"name": "logits"}, {"name": "familiarity"}]}
        refused = server.client.post("/v2/models/tiny/infer", json=named)
        assert (refused.status_code, refused.json()["code"]) == (400, "malformed_request")
        assert "this model has no 'familiarity', only logits, probabilities, features" in refused.json()["error"]
        if GRPC:
            with pytest.raises(Exception, match="this model has no 'familiarity'"):
                infer_over_grpc(server, 1, "familiarity")
        assert sample(server.client, "rednet_images_total") == before
        assert sample(server.client, "rednet_familiarity_count") == 0


@pytest.mark.slow
@pytest.mark.parametrize("front_ends", [1, 2])
def test_familiarity_follows_a_reload(
    measured: Checkpoint, expected: list[float], tmp_path: Path, front_ends: int
) -> None:
    """It comes, changes and goes with the network: an answer has the name and the familiarity of one network."""
    path = tmp_path / "served.safetensors"
    networks = {
        "first": replace(measured, name="first", familiarity=None),
        "second": replace(measured, name="second"),
        "third": replace(measured, name="third", familiarity=Familiarity((100.0, 200.0))),  # nothing is familiar
        "last": replace(measured, name="last", familiarity=None),
    }
    meant = {"first": None, "second": pytest.approx(expected[0], abs=1e-3), "third": 0.0, "last": None}
    save_checkpoint(path, networks["first"])

    with ServerProcess("--checkpoint", path, "--frontends", front_ends) as running:

        def model_that_answers() -> str:
            answer = predict(running.client, PHOTOS[0], Connection="close").json()
            assert answer["predictions"][0].get("familiarity") == meant[answer["model"]]
            return str(answer["model"])

        assert model_that_answers() == "first"
        for name in ("second", "third", "last"):
            save_checkpoint(path, networks[name])
            running.process.send_signal(signal.SIGHUP)
            wait_until(lambda name=name: model_that_answers() == name, name)  # type: ignore[misc]


@needs_int8
def test_int8_has_the_familiarity_of_float32(tmp_path: Path) -> None:
    """Up to what int8 changes of the logits: the numbers were measured in float32."""
    embedded = load_checkpoint()
    familiarity = Familiarity((0.0, 10.0))
    save_checkpoint(tmp_path / "int8.safetensors", replace(embedded, familiarity=familiarity))
    files = sorted((ROOT / "service/http/page/photos").iterdir())
    run = prepare(embedded.net, embedded.preprocess, "cpu", "fp32")
    pixels = np.stack([embedded.preprocess.pixels(Image.open(file)) for file in files])
    values = familiarity(run(torch.from_numpy(pixels)).logits)
    with ServerProcess("--checkpoint", tmp_path / "int8.safetensors", "--precision", "int8") as server:
        assert server.client.get("/v1/model").json()["precision"] == "int8"
        sent = [("f", (file.name, file.read_bytes())) for file in files]
        answers = server.client.post("/v1/predict", files=sent).json()["predictions"]
    differences = np.abs(values - [each["familiarity"] for each in answers])
    assert differences.max() < 0.05 < values.max() - values.min()
