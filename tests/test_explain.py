"""Heat maps from the forward pass of the prediction, and the endpoint that returns them."""

import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rednet import Preprocess, RedNet, load_checkpoint, prepare
from rednet.model.inference.backend import InferenceBackend, Output, Stages
from rednet.model.inference.preparation import Prepared
from rednet.model.inference.torch_backend import TorchBackend
from rednet.service.engine.runner import PreparedRunner
from rednet.service.http.schemas import ExplainBody
from rednet.service.types import ClassActivation, ExplainSpec, KernelSums, Pixels, Running
from tests.conftest import encoded, photo
from tests.http_helpers import CUT, TEXT, assert_error, occupy, predict, sample
from tests.servers import FakeRunner, ServerProcess, ServerThread, wait_until
from tests.shared import needs_native
from tests.test_preparation import photos

EXPLAIN = "/v1/explain"
JSON = {"Accept": "application/json"}
SQUARE = Preprocess(resize=72, crop=64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net(tiny_path: Path) -> RedNet:
    return load_checkpoint(tiny_path).net


class RecordingBackend:
    """Records the maps that are requested of a backend."""

    name = "recording"

    def __init__(self, backend: InferenceBackend) -> None:
        self._backend = backend
        self.requested: list[tuple[list[int], list[int]]] = []

    def __call__(self, pixels: Tensor, stages: Stages = (), kernel_sums: Stages = ()) -> Output:
        self.requested.append((list(stages), list(kernel_sums)))
        return self._backend(pixels, stages, kernel_sums)


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "torch"])
def backend(request: pytest.FixtureRequest, net: RedNet) -> RecordingBackend:
    if request.param == "native":
        return RecordingBackend(prepare(net, SQUARE, "cpu").implementation)
    return RecordingBackend(TorchBackend(net, SQUARE, CPU, torch.float32))


@pytest.fixture
def runner(backend: RecordingBackend, net: RedNet) -> PreparedRunner:
    return PreparedRunner(Prepared(backend, SQUARE, net.head.fc.weight.detach(), CPU, "fp32", 0.0), max_batch_size=8)


def kernels_of(net: RedNet, pixels: Tensor) -> list[Tensor]:
    """The summed kernels of each stage's last involution, [B, G, h, w], computed by the network itself."""
    sums: list[Tensor] = []
    handles = []
    for stage in range(1, 5):
        generator = net.backbone.get_submodule(f"layer{stage}")[-1].conv2.conv2  # type: ignore[index]
        add = lambda _, __, out: sums.append(out.unflatten(1, (-1, 49)).sum(dim=2))  # noqa: E731
        handles.append(generator.register_forward_hook(add))
    with torch.inference_mode():
        net(SQUARE.normalise(pixels))
    for handle in handles:
        handle.remove()
    return sums


def test_images_of_one_batch_get_their_own_maps(runner: PreparedRunner, net: RedNet) -> None:
    """The batch has class maps, kernel maps, and images without maps."""
    pixels = photos(5, 64, 64)
    specs: dict[int, ExplainSpec] = {
        0: ClassActivation(3),
        2: KernelSums(1),
        3: KernelSums(2, group=3),
        4: ClassActivation(),
    }
    output = runner.launch(list(pixels.numpy()), specs).wait()
    assert output.grids.keys() == specs.keys()
    with torch.inference_mode():
        last = net.stages(SQUARE.normalise(pixels))[-1]
        sums = kernels_of(net, pixels)
        by_class = torch.einsum("bchw,kc->bkhw", last, net.head.fc.weight)
    predicted = int(output.logits[4].argmax())
    expected = {0: by_class[0, 3], 2: sums[1][2].mean(dim=0), 3: sums[2][3, 3], 4: by_class[4, predicted]}
    for index, grid in expected.items():
        np.testing.assert_allclose(output.grids[index], grid, rtol=1e-3, atol=1e-4)


def test_mean_of_a_class_map_plus_the_bias_is_the_logit(runner: PreparedRunner, net: RedNet) -> None:
    """For every class, predicted or not."""
    images = list(photos(5, 64, 64).numpy())
    output = runner.launch(images, {index: ClassActivation(index) for index in range(5)}).wait()
    bias = net.head.fc.bias.detach().numpy()
    for index, grid in output.grids.items():
        assert grid.mean() + bias[index] == pytest.approx(output.logits[index, index], rel=1e-5, abs=1e-5)


def test_backend_computes_only_requested_maps(runner: PreparedRunner, backend: RecordingBackend) -> None:
    """None for a batch of plain images, those of the last stage for a class, and one stage's kernels for kernels."""
    images = list(photos(2, 64, 64).numpy())
    specs: list[Mapping[int, ExplainSpec]] = [{}, {0: ClassActivation()}, {1: KernelSums(2)}]
    for each in (*specs, {0: KernelSums(3), 1: KernelSums(0)}):
        runner.launch(images, each).wait()
    assert backend.requested == [([], []), ([3], []), ([], [2]), ([], [0, 3])]


def test_requested_stages_are_returned_in_their_order(backend: RecordingBackend) -> None:
    """Whatever the order and the container of the request."""
    pixels = photos(2, 64, 64)
    every, some = backend(pixels, range(4), range(4)), backend(pixels, {3, 1}, [2])
    assert every.stages is not None
    assert every.kernel_sums is not None
    assert some.stages is not None
    assert some.kernel_sums is not None
    for ours, whole in zip((*some.stages, *some.kernel_sums), (*every.stages[1::2], every.kernel_sums[2]), strict=True):
        torch.testing.assert_close(ours, whole)


def explained(server: ServerProcess, data: bytes, **parameters: object) -> dict[str, Any]:
    """The JSON response for one photo, checked against its schema."""
    response = server.client.post(EXPLAIN, content=data, params=parameters, headers=JSON)  # type: ignore[arg-type]
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    ExplainBody.model_validate(response.json())
    answer: dict[str, Any] = response.json()["explanations"][0]
    return answer


def test_explain_class_by_index_or_id(server: ServerProcess, net: RedNet) -> None:
    """The predicted class is the default. The logit is the mean of the grid plus the bias."""
    data = encoded(photo())
    likeliest = predict(server.client, data).json()["predictions"][0]["classes"][0]
    best, by_index, by_id = (explained(server, data, **chosen) for chosen in ({}, {"class": 3}, {"class": "n3"}))
    assert best["class"]["label"] == likeliest["label"]
    assert best["class"]["probability"] == pytest.approx(likeliest["probability"], rel=1e-4)
    assert by_index == by_id
    assert (by_id["class"]["index"], by_id["class"]["label"]) == (3, "thing 3")
    for each in (best, by_id):
        assert np.shape(each["grid"]) == (2, 2)
        bias = net.head.fc.bias[each["class"]["index"]].item()
        assert np.mean(each["grid"]) + bias == pytest.approx(each["class"]["logit"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("parameters", [{}, {"class": 3}, {"layer": "stage2"}])
def test_map_in_json_comes_with_the_predicted_classes(server: ServerProcess, parameters: dict[str, object]) -> None:
    """Those of `/v1/predict`, whichever map is requested."""
    data = encoded(photo())
    predicted = predict(server.client, data).json()["predictions"][0]["classes"]
    classes = explained(server, data, **parameters)["classes"]
    assert [each["id"] for each in classes] == [each["id"] for each in predicted]
    for ours, theirs in zip(classes, predicted, strict=True):
        assert ours["probability"] == pytest.approx(theirs["probability"], rel=1e-4)


def test_explain_kernels_by_stage_and_group(server: ServerProcess) -> None:
    """Four stages have four resolutions, and without a group the result is the mean of all groups."""
    data = encoded(photo())
    for stage, side in ((1, 16), (2, 8), (3, 4), (4, 2)):
        assert np.shape(explained(server, data, layer=f"stage{stage}")["grid"]) == (side, side)
    groups = [explained(server, data, layer="stage2", group=group)["grid"] for group in range(2)]
    mean = explained(server, data, layer="stage2")
    np.testing.assert_allclose(mean["grid"], np.mean(groups, axis=0), rtol=1e-4, atol=1e-5)
    assert not np.allclose(*groups)
    assert "class" not in mean


def test_explain_returns_a_png_unless_json_is_requested(server: ServerProcess) -> None:
    """The picture has the photo's size, whichever way the photo is sent. `Server-Timing` includes the drawing."""
    data = encoded(photo(width=90, height=70))
    answers = [
        server.client.post(EXPLAIN, content=data),
        server.client.post(EXPLAIN, files={"any": ("photo.png", data)}, headers={"Accept": "image/png"}),
        server.client.post(EXPLAIN, json={"images": [base64.b64encode(data).decode()]}),
    ]
    for answer in answers:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        assert Image.open(io.BytesIO(answer.content)).size == (90, 70)
        assert "draw;dur=" in answer.headers["server-timing"]
    kernels = server.client.post(EXPLAIN, content=data, params={"layer": "stage1"})
    assert kernels.content != answers[0].content


def test_explain_several_images_needs_json(server: ServerProcess) -> None:
    """Each image has its own result or error. A PNG can show one image only."""
    data = encoded(photo())
    files = [("f", ("a.png", data)), ("f", ("b.png", TEXT)), ("f", ("c.png", encoded(photo(1))))]
    answer = server.client.post(EXPLAIN, files=files, headers=JSON).json()
    first, second, third = answer["explanations"]
    np.testing.assert_allclose(first["grid"], explained(server, data)["grid"], rtol=1e-4)
    assert second["error"]["code"] == "unsupported_media_type"
    assert third["grid"] != first["grid"]
    refused = server.client.post(EXPLAIN, files=files)
    assert_error(refused, 400, "malformed_request")
    assert "application/json" in refused.text


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"layer": "stage5"}, "'stage4'"),
        ({"layer": "stem"}, "'class'"),
        ({"class": "5"}, "is not an index from 0 to 4, a label or one of the ids n0, n1"),
        ({"class": "-1"}, "from 0 to 4"),
        ({"class": "thing 9"}, "n0, n1"),
        ({"class": "٣"}, "from 0 to 4"),
        ({"class": "1", "layer": "stage1"}, "only layer class"),
        ({"group": "0"}, "only layers stage1"),
        ({"group": "1", "layer": "stage1"}, "groups 0 to 0"),
        ({"group": "-1", "layer": "stage2"}, "query.group: must be at least 0, not '-1'"),
        ({"group": "x", "layer": "stage2"}, "query.group: must be a whole number, not 'x'"),
    ],
)
def test_explain_with_unknown_class_stage_or_group_is_400(
    server: ServerProcess, parameters: dict[str, str], says: str
) -> None:
    """The message says which values are valid."""
    response = server.client.post(EXPLAIN, content=encoded(photo()), params=parameters)
    assert_error(response, 400, "malformed_request")
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize("headers", [{}, JSON])
def test_explain_unreadable_images_have_the_usual_errors(server: ServerProcess, headers: dict[str, str]) -> None:
    """For PNG and for JSON responses."""
    for data, status, code in (
        (b"", 400, "malformed_request"),
        (TEXT, 415, "unsupported_media_type"),
        (CUT, 422, "unreadable_image"),
    ):
        assert_error(server.client.post(EXPLAIN, content=data, headers=headers), status, code)


def test_openapi_describes_all_responses_of_explain(server: ServerProcess) -> None:
    """One media type for each path, every error, and the values of the parameters."""
    paths = server.client.get("/openapi.json").json()["paths"]
    assert paths["/v1/explain.json"]["post"]["responses"]["200"]["content"].keys() == {"application/json"}
    described = paths[EXPLAIN]["post"]
    assert described["responses"]["200"]["content"].keys() == {"image/png"}
    assert {"400", "401", "413", "415", "422", "429", "500", "503", "504"} < described["responses"].keys()
    parameters = {each["name"]: each for each in described["parameters"] if "name" in each}
    assert parameters.keys() == {"layer", "class", "group"}
    assert parameters["layer"]["schema"]["enum"] == ["class", "stage1", "stage2", "stage3", "stage4"]
    assert "multipart/form-data" in described["requestBody"]["content"]


def test_explained_images_share_batches_with_plain_ones() -> None:
    """Images that arrive while the device is busy run together, and only the explained ones have maps."""

    class Noting(FakeRunner):
        def __init__(self) -> None:
            super().__init__()
            self.specs: list[Mapping[int, ExplainSpec]] = []

        def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
            self.specs.append(specs)
            return super().launch(pixels, specs)

    runner = Noting()
    with ServerThread(runner) as running, ThreadPoolExecutor(3) as pool:
        held = occupy(running, runner, pool)
        data = encoded(photo())
        plain = pool.submit(predict, running.client, data)
        requested = pool.submit(running.client.post, EXPLAIN, content=data, headers=JSON)
        decoded = {"series": "rednet_stage_duration_seconds_count", "stage": "decode"}
        wait_until(lambda: sample(running.client, **decoded) == 3, "both")
        runner.go_on.set()
        assert [each.result().status_code for each in (held, plain, requested)] == [200] * 3
        assert runner.batches == [1, 2]
        assert list(runner.specs[0]) == []
        assert list(runner.specs[1].values()) == [ClassActivation(None)]
        assert requested.result().json()["explanations"][0]["grid"] == [[0, 1], [2, 3]]


def test_result_without_its_requested_map_is_500() -> None:
    """The server sends neither an empty picture nor JSON that does not match the schema."""

    class Forgetful(FakeRunner):
        def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
            return super().launch(pixels, {})

    with ServerThread(Forgetful()) as running:
        for headers in ({}, JSON):
            response = running.client.post(EXPLAIN, content=encoded(photo()), headers=headers)
            assert_error(response, 500, "internal")
        assert predict(running.client, encoded(photo())).status_code == 200


def test_class_is_chosen_by_index_id_or_label(server: ServerProcess) -> None:
    """All three name the same class, and every score carries them."""
    data = encoded(photo())
    for name in ("3", "n3", "thing 3"):
        response = server.client.post(EXPLAIN, params={"class": name}, content=data, headers=JSON)
        found = response.json()["explanations"][0]["class"]
        assert (found["index"], found["id"], found["label"]) == (3, "n3", "thing 3")
    for score in predict(server.client, data).json()["predictions"][0]["classes"]:
        assert (score["id"], score["label"]) == (f"n{score['index']}", f"thing {score['index']}")
    assert_error(server.client.post(EXPLAIN, params={"class": "thing"}, content=data), 400, "malformed_request")
