"""Parsing a body into images and options, for every format."""

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
    """`/v1` rejects JSON without a type, and `/v2` reads it as an infer request."""
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


def test_invalid_pixel_tensor_has_its_own_error() -> None:
    """The other images of the request are usable."""
    pixels = np.zeros((2, 3, 32, 32), np.float32)
    pixels[0] = np.nan
    size = {"binary_data_size": pixels.nbytes}
    tensor = {"name": "pixels", "datatype": "FP32", "shape": pixels.shape, "parameters": size}
    header = json.dumps({"inputs": [tensor]}).encode()
    body_format = BodyFormat("v2", header_length=str(len(header)))
    first, second = parse_body(body_format, header + pixels.tobytes(), LIMITS).images
    assert isinstance(first, MalformedRequest)
    np.testing.assert_array_equal(np.asarray(second), pixels[1])


def test_plausible_pixel_values_are_accepted() -> None:
    """Normalised photos, including overshoot of sharpening filters, and random values for a first try."""
    pixels = PREPROCESS.normalise(torch.from_numpy(PREPROCESS.pixels(photo()))).numpy()
    noise = np.random.default_rng(0).normal(size=pixels.shape)
    for values in (pixels, 1.5 * pixels, noise):
        sound = np.asarray(values, np.float32)
        assert check_pixels(sound, LIMITS) is sound


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -20.0])
def test_implausible_pixel_values_are_rejected(value: float) -> None:
    """One such value could overflow the network and fail its batch."""
    pixels = np.zeros((3, 32, 32), np.float32)
    pixels[1, 2, 3] = value
    with pytest.raises(MalformedRequest, match=r"between -10\.6 and 10\.6"):
        check_pixels(pixels, LIMITS)


@pytest.mark.parametrize("shape", [(3, 32, 31), (3, 64, 64), (1, 32, 32), (0, 32, 32), (3, 0, 0)])
def test_pixel_tensor_of_another_size_is_rejected(shape: tuple[int, ...]) -> None:
    """Batches hold images of the checkpoint's crop size only."""
    with pytest.raises(MalformedRequest, match=r"\[3, 32, 32\] for each image"):
        check_pixels(np.zeros(shape, np.float32), LIMITS)
