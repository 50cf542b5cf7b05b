"""Scales of the int8 network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rednet import Preprocess, RedNet, create_rednet, load_checkpoint
from rednet.model.inference.activation_ranges import (
    MAX_RANGE,
    MIN_RANGE,
    collect_activation_ranges,
    required_activations,
    validate_ranges,
)
from rednet.model.nn.rednet import Bottleneck
from rednet.model.ops import use
from tests.conftest import photo

PREPROCESS = Preprocess(resize=72, crop=64)


@pytest.fixture
def net(tiny_path: Path) -> RedNet:
    return load_checkpoint(tiny_path).net


def photos(count: int) -> Tensor:
    return torch.from_numpy(np.stack([PREPROCESS.pixels(photo(seed)) for seed in range(count)]))


def test_every_activation_that_is_stored_has_a_name(net: RedNet) -> None:
    """Five in the stem, five in a block, one more where a convolution leads around it; whatever the shape."""
    blocks = [module for module in net.modules() if isinstance(module, Bottleneck)]
    around = [block for block in blocks if block.downsample is not None]
    assert len(required_activations(net)) == len(set(required_activations(net))) == 5 + 5 * len(blocks) + len(around)
    assert set(required_activations(net)) <= {name for name, _ in net.named_modules()}
    straight = create_rednet("rednet26", base_channels=16, stem_channels=64)  # as wide as its first stage
    assert "backbone.layer1.0.downsample" not in required_activations(straight)


def test_a_scale_holds_all_of_nine_photos_in_ten(net: RedNet) -> None:
    """Of more photos than one batch, in what the first block computes by hand, batch norms and ReLUs done."""
    pixels = photos(21)
    scales = collect_activation_ranges(net, PREPROCESS, pixels)
    validate_ranges(net, scales)
    assert list(scales) == required_activations(net)
    block = net.backbone.get_submodule("layer1.0")
    assert isinstance(block, Bottleneck)
    with torch.inference_mode(), use("reference"):
        x = net.backbone.maxpool(net.backbone.stem(PREPROCESS.normalise(pixels)))
        middle = block.bn1(block.conv1(x)).relu()
        kernels = block.conv2.conv2(block.conv2.conv1(middle))
        after = block.bn2(block.conv2(middle)).relu()
        expected = {
            ".conv1": middle,
            ".conv2.conv1": block.conv2.conv1(middle),
            ".conv2.conv2": kernels,
            ".conv2": after,
            ".downsample": block.get_submodule("downsample")(x),
            "": block(x),
        }
    for name, values in expected.items():
        largest = values.abs().flatten(1).amax(dim=1).sort().values  # of each photo
        assert scales["backbone.layer1.0" + name] == pytest.approx(float(largest[18]), rel=1e-4), name


def test_the_network_stays_as_it_is(net: RedNet) -> None:
    """Its weights, its mode, and nothing hooked into it."""
    net.train()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    collect_activation_ranges(net, PREPROCESS, photos(2))
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())


def test_what_never_fires_has_a_scale(net: RedNet) -> None:
    """A dead layer: its zeros are zeros on any scale."""
    for parameter in net.backbone.get_submodule("layer1.0.bn2").parameters():
        torch.nn.init.zeros_(parameter)
    assert collect_activation_ranges(net, PREPROCESS, photos(1))["backbone.layer1.0.conv2"] == 1.0


def test_a_network_without_bounds_is_refused(net: RedNet) -> None:
    """By the name of the layer where the numbers end."""
    for parameter in net.backbone.get_submodule("layer2.0.bn1").parameters():
        torch.nn.init.constant_(parameter, 1e38)
    with pytest.raises(ValueError, match=r"backbone\.layer2\.0.*beyond any int8 range"):
        collect_activation_ranges(net, PREPROCESS, photos(1))


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (1, 1, 64, 64), (3, 64, 64), (1, 3, 0, 64)])
def test_what_are_no_photos_is_refused(net: RedNet, shape: tuple[int, ...]) -> None:
    """And so are pixels that are normalised already."""
    with pytest.raises(ValueError, match="must be uint8"):
        collect_activation_ranges(net, PREPROCESS, torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="must be uint8"):
        collect_activation_ranges(net, PREPROCESS, torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    "value", [0.0, -1.0, float("nan"), float("inf"), MIN_RANGE / 2, MAX_RANGE * 2, 10**400, True, "1"]
)
def test_a_scale_that_is_none_is_named(net: RedNet, value: float) -> None:
    """Whatever a file may hold."""
    scales = dict.fromkeys(required_activations(net), 1.0)
    validate_ranges(net, scales)
    with pytest.raises(ValueError, match=r"do not fit rednet26: backbone.stem.1.conv2 is .*, not a number between"):
        validate_ranges(net, scales | {"backbone.stem.1.conv2": value})
    with pytest.raises(ValueError, match=r"'backbone\.stem\.2' is unknown"):
        validate_ranges(net, scales | {"backbone.stem.2": 1.0})
    del scales["backbone.stem.4"]
    with pytest.raises(ValueError, match=r"backbone\.stem\.4 is missing"):
        validate_ranges(net, scales)
