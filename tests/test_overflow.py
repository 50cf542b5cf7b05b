"""Photos that overflow the network's float32 range: a client error without effect on other requests."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from rednet import Checkpoint, Preprocess, create_rednet, save_checkpoint
from rednet.model.inference.activation_ranges import collect_activation_ranges
from rednet.model.io.labels import Label
from tests.conftest import encoded, lively, needs_int8, photo
from tests.http_helpers import PREDICT, assert_error, predict, sample
from tests.servers import ServerProcess

SIDE = 72
GOOD = encoded(photo(0, SIDE, SIDE))


def checkerboard(cell: int = 4) -> bytes:
    """A pattern far from the noise of the network's batch norm statistics."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return encoded(Image.fromarray(((x // cell + y // cell) % 2 * 255).astype(np.uint8)).convert("RGB"))


@pytest.fixture(scope="module")
def fragile_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose kernels grow with their input: a checkerboard squares its values, layer by layer,
    past the range of float32. Photos and the noise of the self-check stay far below."""
    net = lively(create_rednet("rednet26", num_classes=5, base_channels=16, stem_channels=32))
    for name, parameter in net.named_parameters():
        if name.endswith("conv2.conv.weight"):
            parameter.data.mul_(8)
    preprocess = Preprocess(resize=SIDE, crop=64)
    noise = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ranges = collect_activation_ranges(net, preprocess, noise)  # the self-check compares int8 with float32 on noise
    labels = [Label(f"n{index}", f"thing {index}") for index in range(5)]
    path = tmp_path_factory.mktemp("fragile") / "fragile.safetensors"
    save_checkpoint(path, Checkpoint(net=net, labels=labels, preprocess=preprocess, name="f", calibration=ranges))
    return path


@pytest.fixture(scope="module")
def fragile(fragile_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess("--checkpoint", fragile_path, "--precision", "fp32") as running:
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


@needs_int8
def test_photo_that_overflows_float32_is_answered_in_int8(fragile_path: Path) -> None:
    """Int8 clips values to its activation ranges, so its result is finite."""
    with ServerProcess("--checkpoint", fragile_path, "--precision", "int8") as running:
        response = predict(running.client, checkerboard())
        assert response.status_code == 200
        assert not re.search("nan|null|inf", response.text, re.IGNORECASE)


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
