"""Photos that overflow the network's float32 range: a client error without effect on other requests."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from rednet import Checkpoint, Preprocess, create_rednet, save_checkpoint
from rednet.model.io.labels import Label
from tests.conftest import encoded, lively, needs_int8, photo
from tests.http_helpers import PREDICT, assert_error, predict, sample
from tests.servers import ServerProcess
from tests.shared import SHARED

SIDE = 72
GOOD = encoded(photo(0, SIDE, SIDE))
NAN_PHOTO = SHARED / "cases" / "attacks" / "nan_photo.png"


def checkerboard(cell: int = 4) -> bytes:
    """A pattern far from the noise of the network's batch norm statistics."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return encoded(Image.fromarray(((x // cell + y // cell) % 2 * 255).astype(np.uint8)).convert("RGB"))


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a network whose kernels grow with their input: a checkerboard squares its values, layer by layer,
    past the range of float32. Photos and the noise of the self-check stay far below."""
    net = lively(create_rednet("rednet26", num_classes=5, base_channels=16, stem_channels=32))
    for name, parameter in net.named_parameters():
        if name.endswith("conv2.conv.weight"):
            parameter.data.mul_(8)
    labels = [Label(f"n{index}", f"thing {index}") for index in range(5)]
    path = tmp_path_factory.mktemp("fragile") / "fragile.safetensors"
    save_checkpoint(path, Checkpoint(net=net, labels=labels, preprocess=Preprocess(resize=SIDE, crop=64), name="f"))
    with ServerProcess("--checkpoint", path, "--precision", "fp32") as running:
        yield running


@pytest.mark.parametrize("endpoint", [PREDICT, "/v1/features", "/v1/explain", "/v1/explain?layer=stage2"])
def test_overflowing_photo_is_422_numerical_overflow(fragile: ServerProcess, endpoint: str) -> None:
    """On every endpoint, and as a warning without traceback in the log."""
    assert_error(fragile.client.post(endpoint, content=checkerboard()), 422, "numerical_overflow")
    assert fragile.client.post(endpoint, content=GOOD).status_code == 200
    assert "Traceback" not in fragile.log


def test_overflowing_photo_among_others_has_its_own_error(fragile: ServerProcess) -> None:
    """The other photos are answered as if it were absent, and no response holds NaN or null."""
    alone = predict(fragile.client, GOOD).json()["predictions"][0]
    files = [("f", ("f.png", data)) for data in (GOOD, checkerboard(), GOOD)]
    for endpoint in (PREDICT, "/v1/features"):
        response = fragile.client.post(endpoint, files=files)
        assert response.status_code == 200
        assert not re.search("nan|null|inf", response.text, re.IGNORECASE)
    first, failed, last = fragile.client.post(PREDICT, files=files).json()["predictions"]
    assert failed["error"]["code"] == "numerical_overflow"
    for found in (first, last):
        for one, other in zip(found["classes"], alone["classes"], strict=True):
            assert one["index"] == other["index"]
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)


def test_overflowing_photo_does_not_repeat_its_batch(fragile: ServerProcess) -> None:
    """The batch is not bisected: every answered image has run exactly once."""
    before = sample(fragile.client, "rednet_batch_size_sum")
    photos = [GOOD, checkerboard()] * 20
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=fragile.url, timeout=60) as client:
        statuses = list(pool.map(lambda data: predict(client, data).status_code, photos))
    assert statuses == [200, 422] * 20
    assert sample(fragile.client, "rednet_batch_size_sum") - before == len(photos)
    assert sample(fragile.client, "rednet_images_total", outcome="numerical_overflow") >= 20


@pytest.mark.skipif(not NAN_PHOTO.exists(), reason="../shared is absent: no photo that the embedded network fails on")
@pytest.mark.parametrize(("precision", "status"), [("fp32", 422), pytest.param("int8", 200, marks=needs_int8)])
def test_adversarial_photo_overflows_the_embedded_network_in_float32_only(precision: str, status: int) -> None:
    """Int8 clips values to its activation ranges, so its result is finite."""
    with ServerProcess("--precision", precision) as running:
        assert predict(running.client, NAN_PHOTO.read_bytes()).status_code == status


def test_features_of_huge_values_are_normalized(fragile: ServerProcess) -> None:
    """The squares of the values exceed float32, and the computed length is still finite."""
    data = encoded(Image.fromarray(red_and_blue()))
    (vector,) = fragile.client.post("/v1/features?normalize=true", content=data).json()["features"]
    (plain,) = fragile.client.post("/v1/features", content=data).json()["features"]
    assert np.abs(plain).max() > 1e15
    assert np.linalg.norm(vector) == pytest.approx(1, rel=1e-5)


def red_and_blue() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.stack([x // 4 % 2 * 255, 255 - x // 4 % 2 * 255, y // 4 % 2 * 255], axis=-1).astype(np.uint8)
