"""The int8 form: code for code the reference's arithmetic, and close to float32."""

from typing import Any

import pytest
import torch

from model.int8_form import Int8Form, activations
from model.native import int8_unavailable
from model.native_form import NativeForm
from model.preprocess import Preprocess
from tests.int8_reference import Reference, observed
from tests.test_native import network, photos

needs_int8 = pytest.mark.skipif(int8_unavailable() is not None, reason=str(int8_unavailable()))


@needs_int8
@pytest.mark.parametrize(
    ("name", "size", "fields"),
    [
        ("rednet26", (64, 64), {}),
        ("rednet50", (96, 65), {"base_channels": 32, "stem_channels": 64}),
        ("rednet26", (65, 97), {"kernel_size": 5, "strides": (2, 1, 3, 2), "reduction_ratio": 2}),
        ("rednet26", (33, 32), {"kernel_size": 3, "stem_kernel_size": 7, "reduction_ratio": 1, "stem_channels": 64}),
        ("rednet26", (50, 70), {"kernel_size": 1, "base_channels": 48, "stem_channels": 96, "reduction_ratio": 16}),
        ("rednet26", (320, 288), {}),
        ("rednet26", (1, 1), {}),
    ],
)
def test_every_code_is_the_references(name: str, size: tuple[int, int], fields: dict[str, Any]) -> None:
    """Stage maps, kernel sums, features and logits, for shapes the paper does and does not use.

    Only the first convolution sums floats, in another order: where a value falls between two codes it may take the
    other one, and a few later codes may follow.
    """
    net = network(name, **fields)
    pixels = photos(2, *size)
    scales = observed(net, pixels)
    maps, sums, features, logits = Reference(net, scales)(pixels)
    output = Int8Form(net, Preprocess(), scales, threads=2)(pixels, True, True)
    assert output.stages is not None
    assert output.kernel_sums is not None
    for stage in range(4):
        last = max(key for key in scales if key.startswith(f"backbone.layer{stage + 1}.") and key.count(".") == 2)
        ours = torch.round(output.stages[stage] * 255 / scales[last])
        difference = (ours - maps[stage]).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-3
        torch.testing.assert_close(output.kernel_sums[stage], sums[stage].float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(output.features, features.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output.logits, logits.float(), rtol=1e-2, atol=1e-2)


@needs_int8
def test_no_bit_depends_on_neighbours_or_threads() -> None:
    """A photo's answer is the same alone, in any batch up to nine and on any number of threads."""
    net = network()
    pixels = photos(9, 144, 160)
    scales = observed(net, pixels)
    alone = Int8Form(net, Preprocess(), scales, threads=1)
    expected = torch.cat([alone(photo.unsqueeze(0), False, False).logits for photo in pixels])
    for threads in (1, 2, 3):
        form = Int8Form(net, Preprocess(), scales, threads=threads)
        for batch in range(1, 10):
            assert torch.equal(form(pixels[:batch], False, False).logits, expected[:batch])


@needs_int8
def test_it_stays_close_to_float32() -> None:
    """Features point where those of float32 do."""
    net = network()
    pixels = photos(4, 96, 96)
    ours = Int8Form(net, Preprocess(), observed(net, pixels))(pixels, False, False).features
    exact = NativeForm(net, Preprocess())(pixels, False, False).features
    assert torch.cosine_similarity(ours, exact).min() > 0.99


@needs_int8
@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_none_are_refused(wrong: float) -> None:
    """A missing, unknown or impossible scale is named in the error."""
    net = network()
    scales = dict.fromkeys(activations(net), 1.0)
    with pytest.raises(ValueError, match=r"must be positive and finite"):
        Int8Form(net, Preprocess(), scales | {"backbone.stem.0": wrong})
    with pytest.raises(ValueError, match=r"lacks 'backbone.stem.0'"):
        Int8Form(net, Preprocess(), {key: value for key, value in scales.items() if key != "backbone.stem.0"})
    with pytest.raises(ValueError, match="the network has not, 'other'"):
        Int8Form(net, Preprocess(), scales | {"other": 1.0})
