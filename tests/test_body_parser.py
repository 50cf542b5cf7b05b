"""From a body to what it holds, whatever its format."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from rednet import Preprocess
from rednet.service.errors import MalformedRequest, UnsupportedMediaType
from rednet.service.parsing.bodies import BodyFormat, BodyLimits
from rednet.service.parsing.body_parser import check_pixels, parse_body
from tests.conftest import photo

PREPROCESS = Preprocess(resize=40, crop=32)
LIMITS = BodyLimits.of(4, asdict(PREPROCESS))


def test_body_format_decides_how_a_body_is_parsed() -> None:
    """The same JSON is refused by `/v1` without a type, and an infer request for `/v2`."""
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}
    body = json.dumps({"inputs": [tensor], "id": "7"}).encode()
    with pytest.raises(UnsupportedMediaType, match="application/json"):
        parse_body(BodyFormat("v1"), body, LIMITS)
    raw = parse_body(BodyFormat("v1"), b"\x89PNG", LIMITS)
    assert (raw.images, raw.infer) == ([b"\x89PNG"], None)
    infer = parse_body(BodyFormat("v2"), body, LIMITS)
    assert infer.images == [bytes(3)]
    assert infer.infer
    assert infer.infer.id == "7"


def test_one_unusable_pixel_tensor_leaves_the_others_usable() -> None:
    """Its error stands in its place."""
    pixels = np.zeros((2, 3, 32, 32), np.float32)
    pixels[0] = np.nan
    size = {"binary_data_size": pixels.nbytes}
    tensor = {"name": "pixels", "datatype": "FP32", "shape": pixels.shape, "parameters": size}
    header = json.dumps({"inputs": [tensor]}).encode()
    body_format = BodyFormat("v2", header_length=str(len(header)))
    first, second = parse_body(body_format, header + pixels.tobytes(), LIMITS).images
    assert isinstance(first, MalformedRequest)
    np.testing.assert_array_equal(np.asarray(second), pixels[1])


def test_pixels_that_a_photo_could_have_pass() -> None:
    """Normalised like photos, also with the overshoot of a sharpening filter, or random ones for a first try."""
    pixels = PREPROCESS.normalise(torch.from_numpy(PREPROCESS.pixels(photo()))).numpy()
    noise = np.random.default_rng(0).normal(size=pixels.shape)
    for values in (pixels, 1.5 * pixels, noise):
        sound = np.asarray(values, np.float32)
        assert check_pixels(sound, LIMITS) is sound


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -20.0])
def test_pixels_that_no_photo_has_are_refused(value: float) -> None:
    """A single one: the network would overflow, and its batch fail."""
    pixels = np.zeros((3, 32, 32), np.float32)
    pixels[1, 2, 3] = value
    with pytest.raises(MalformedRequest, match=r"between -10\.6 and 10\.6"):
        check_pixels(pixels, LIMITS)


@pytest.mark.parametrize("shape", [(3, 32, 31), (3, 64, 64), (1, 32, 32), (0, 32, 32), (3, 0, 0)])
def test_pixels_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    """Only the checkpoint's own crop is one that its batches can hold."""
    with pytest.raises(MalformedRequest, match=r"\[3, 32, 32\] for each image"):
        check_pixels(np.zeros(shape, np.float32), LIMITS)
