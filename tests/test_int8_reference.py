"""The reference of the int8 network, compared with exact arithmetic and with the float32 network."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rednet import Preprocess, create_rednet, load_checkpoint
from rednet.model.inference.activation_ranges import collect_activation_ranges, required_activations
from rednet.model.inference.int8_backend import Int8Backend
from tests.conftest import lively, needs_int8, photo
from tests.int8_reference import Codes, Int8Reference, averaged, fused


def test_reference_fused_multiply_add_is_rounded_once() -> None:
    """The result is the float32 number closest to the exact one, for operands of very different sizes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-15, 15, shape, generator=generator)

    a, b, c = random(1, 16, 20, 1), random(16), random(16, 1, 1)
    result = fused(a, b, c)
    for channel in range(16):
        for row in range(20):
            exact = Fraction(float(a[0, channel, row, 0])) * Fraction(float(b[channel])) + Fraction(float(c[channel]))
            ours = np.float32(result[0, channel, row, 0])
            for direction in (-np.inf, np.inf):
                neighbour = np.nextafter(ours, np.float32(direction))
                assert abs(Fraction(float(ours)) - exact) <= abs(Fraction(float(neighbour)) - exact)


def test_reference_average_ignores_padding() -> None:
    """Border averages are over existing pixels, rounded to the nearest integer, halves up."""
    codes = torch.tensor([[1, 2, 7], [2, 1, 8], [0, 1, 255]], dtype=torch.float64)
    expected = torch.tensor([[2, 8], [1, 255]], dtype=torch.float64)
    assert torch.equal(averaged(Codes(codes[None, None], 1.0), 2).values[0, 0], expected)


@pytest.mark.parametrize(
    ("strides", "height", "width"), [((1, 2, 2, 2), 64, 64), ((2, 1, 3, 2), 45, 71), ((1, 2, 2, 2), 1, 33)]
)
def test_reference_matches_float32_within_rounding(strides: tuple[int, ...], height: int, width: int) -> None:
    """Features, logits and every stored activation, for any stride and size."""
    net = lively(create_rednet("rednet26", num_classes=5, base_channels=32, stem_channels=64, strides=strides))
    preprocess = Preprocess()
    pixels = torch.stack([torch.from_numpy(np.array(photo(seed, width, height))) for seed in range(3)]).permute(
        0, 3, 1, 2
    )
    answer = Int8Reference(net, preprocess, collect_activation_ranges(net, preprocess, pixels))(pixels)
    with torch.inference_mode():
        features = net.features(preprocess.normalise(pixels))
        logits = net.head(features)
    assert torch.cosine_similarity(answer.features, features).min() > 0.99
    torch.testing.assert_close(answer.logits, logits, rtol=0, atol=0.1 * float(logits.abs().max()))
    assert answer.codes.keys() == set(required_activations(net))
    assert all(codes.float().abs().amax() >= 126 for codes in answer.codes.values())  # the whole range is used


def test_reference_results_are_identical_in_a_batch_and_alone(tiny_path: Path) -> None:
    """All quantised values are equal."""
    checkpoint = load_checkpoint(tiny_path)
    pixels = torch.stack([torch.from_numpy(checkpoint.preprocess.pixels(photo(seed))) for seed in range(2)])
    network = Int8Reference(
        checkpoint.net, checkpoint.preprocess, collect_activation_ranges(checkpoint.net, checkpoint.preprocess, pixels)
    )
    both, alone = network(pixels).codes, network(pixels[1:]).codes
    assert all(torch.equal(both[name][1:], alone[name]) for name in both)


@needs_int8
def test_native_int8_matches_reference_for_the_embedded_checkpoint() -> None:
    """All quantised values of all stages are equal, on photos of an odd size."""
    checkpoint = load_checkpoint()
    net, preprocess, scales = checkpoint.net, checkpoint.preprocess, checkpoint.calibration
    assert scales is not None
    pixels = torch.from_numpy(np.stack([np.asarray(photo(seed, 101, 83)) for seed in range(3)])).permute(0, 3, 1, 2)
    codes = Int8Reference(net, preprocess, scales)(pixels).codes
    stages = Int8Backend(net, preprocess, scales)(pixels, range(4)).stages
    assert stages is not None
    for stage, block in zip(stages, ("layer1.0", "layer2.1", "layer3.3", "layer4.0"), strict=True):
        name = f"backbone.{block}"
        assert torch.equal((stage * (255 / scales[name])).round(), codes[name].float()), name
