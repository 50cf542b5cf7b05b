"""Activation ranges of the int8 network."""

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


def test_required_activations_for_any_architecture(net: RedNet) -> None:
    """Five activations in the stem, five in each block, and one more in each block with a downsampling convolution."""
    blocks = [module for module in net.modules() if isinstance(module, Bottleneck)]
    downsampling = [block for block in blocks if block.downsample is not None]
    assert (
        len(required_activations(net)) == len(set(required_activations(net))) == 5 + 5 * len(blocks) + len(downsampling)
    )
    assert set(required_activations(net)) <= {name for name, _ in net.named_modules()}
    straight = create_rednet("rednet26", base_channels=16, stem_channels=64)  # as wide as its first stage
    assert "backbone.layer1.0.downsample" not in required_activations(straight)


def test_activation_range_covers_nine_photos_in_ten(net: RedNet) -> None:
    """The range is the 90th percentile of the photos' maxima, over several batches, after batch norm and ReLU."""
    pixels = photos(21)
    ranges = collect_activation_ranges(net, PREPROCESS, pixels)
    validate_ranges(net, ranges)
    assert list(ranges) == required_activations(net)
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
        maxima = values.abs().flatten(1).amax(dim=1).sort().values  # of each photo
        assert ranges["backbone.layer1.0" + name] == pytest.approx(float(maxima[18]), rel=1e-4), name


def test_collecting_activation_ranges_leaves_the_network_unchanged(net: RedNet) -> None:
    """Weights and mode stay, and no hooks are left behind."""
    net.train()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    collect_activation_ranges(net, PREPROCESS, photos(2))
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())


def test_activation_range_of_a_dead_layer_is_one(net: RedNet) -> None:
    """Zeros are represented exactly by any range."""
    for parameter in net.backbone.get_submodule("layer1.0.bn2").parameters():
        torch.nn.init.zeros_(parameter)
    assert collect_activation_ranges(net, PREPROCESS, photos(1))["backbone.layer1.0.conv2"] == 1.0


def test_activation_ranges_with_infinite_values_are_rejected(net: RedNet) -> None:
    """The error names the layer in which values become infinite."""
    for parameter in net.backbone.get_submodule("layer2.0.bn1").parameters():
        torch.nn.init.constant_(parameter, 1e38)
    with pytest.raises(ValueError, match=r"backbone\.layer2\.0.*beyond any int8 range"):
        collect_activation_ranges(net, PREPROCESS, photos(1))


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (1, 1, 64, 64), (3, 64, 64), (1, 3, 0, 64)])
def test_collecting_activation_ranges_rejects_other_input_than_uint8_photos(
    net: RedNet, shape: tuple[int, ...]
) -> None:
    """Wrong shapes and normalised pixels are rejected."""
    with pytest.raises(ValueError, match="must be uint8"):
        collect_activation_ranges(net, PREPROCESS, torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="must be uint8"):
        collect_activation_ranges(net, PREPROCESS, torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    "value", [0.0, -1.0, float("nan"), float("inf"), MIN_RANGE / 2, MAX_RANGE * 2, 10**400, True, "1"]
)
def test_invalid_activation_range_is_rejected_by_name(net: RedNet, value: float) -> None:
    """Invalid, missing and unknown ranges in a file are named in the error."""
    ranges = dict.fromkeys(required_activations(net), 1.0)
    validate_ranges(net, ranges)
    with pytest.raises(ValueError, match=r"do not fit rednet26: backbone.stem.1.conv2 is .*, not a number between"):
        validate_ranges(net, ranges | {"backbone.stem.1.conv2": value})
    with pytest.raises(ValueError, match=r"'backbone\.stem\.2' is unknown"):
        validate_ranges(net, ranges | {"backbone.stem.2": 1.0})
    del ranges["backbone.stem.4"]
    with pytest.raises(ValueError, match=r"backbone\.stem\.4 is missing"):
        validate_ranges(net, ranges)
