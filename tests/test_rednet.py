"""The network, compared with the official code."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rednet import Checkpoint, RedNet, RedNetConfig, create_rednet, load_checkpoint, prepare, save_checkpoint
from rednet.model.nn.rednet import BLOCKS
from tests import official


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(ours - expected) / torch.linalg.norm(expected))


@pytest.mark.parametrize("depth", official.DEPTHS)
@torch.inference_mode()
def test_rednet_matches_official_outputs(depth: int) -> None:
    """Logits, features and stage maps agree within 1e-4, for a square and a wide input."""
    net = official.network(depth)
    for expected in official.outputs(depth):
        stages = net.stages(expected.images)
        assert relative_error(net(expected.images), expected.logits) < 1e-4
        assert relative_error(net.features(expected.images), expected.features) < 1e-4
        for stage, sample in zip(stages, expected.stages, strict=True):
            assert relative_error(official.sampled(stage), sample) < 1e-4


@torch.inference_mode()
def test_official_checkpoint_loads_without_options(tmp_path: Path) -> None:
    """Depth, width, classes and labels are read from the file."""
    net = create_rednet("rednet26", num_classes=12, base_channels=16, stem_channels=32).eval()
    official.save(net, tmp_path / "official.pth")
    checkpoint = load_checkpoint(tmp_path / "official.pth")
    assert checkpoint.net.config == net.config
    assert [label.name for label in checkpoint.labels] == [f"class {index}" for index in range(12)]
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(checkpoint.net(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("depth", BLOCKS)
def test_state_dict_has_the_official_names_and_shapes(depth: int) -> None:
    """Checkpoints work in both directions."""
    with torch.device("meta"):
        state = create_rednet(f"rednet{depth}").state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == official.shapes()[f"rednet{depth}"]


@pytest.mark.parametrize(("depth", "millions"), [(26, 9.23), (38, 12.39), (50, 15.54), (101, 25.65), (152, 33.98)])
def test_parameter_counts_match_the_paper(depth: int, millions: float) -> None:
    """Table 1 of the paper, to its last digit, which is truncated where it could be rounded."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in create_rednet(f"rednet{depth}").parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(("height", "width"), [(240, 300), (33, 47), (1, 1)])
@torch.inference_mode()
def test_rednet_with_any_input_size(height: int, width: int) -> None:
    """Sizes at which the official code fails give finite maps of ceil(size / stride)."""
    torch.manual_seed(0)
    net = create_rednet("rednet26", num_classes=3, base_channels=16, stem_channels=32).eval()
    stages = net.stages(torch.randn(1, 3, height, width))
    for stage, stride in zip(stages, (4, 8, 16, 32), strict=True):
        assert stage.shape[2:] == (-(-height // stride), -(-width // stride))
        assert stage.isfinite().all()


@torch.inference_mode()
def test_logits_are_the_head_of_the_features() -> None:
    """One forward pass gives all outputs."""
    torch.manual_seed(0)
    net = create_rednet("rednet26", num_classes=3, base_channels=16, stem_channels=32).eval()
    x = torch.randn(2, 3, 64, 64)
    features = net.features(x)
    assert features.shape == (2, net.config.feature_channels) == (2, 512)
    torch.testing.assert_close(net(x), net.head(features))
    torch.testing.assert_close(features, net.stages(x)[-1].mean(dim=(2, 3)))


@pytest.fixture
def small() -> RedNet:
    torch.manual_seed(0)
    return create_rednet("rednet26", num_classes=3, base_channels=16, stem_channels=32).eval()


@torch.inference_mode()
def test_timm_forward_features_is_the_last_stage_map(small: RedNet) -> None:
    """[B, num_features, ceil(H / 32), ceil(W / 32)], not pooled."""
    x = torch.randn(2, 3, 64, 97)
    last_map = small.forward_features(x)
    assert last_map.shape == (2, small.num_features, 2, 4) == (2, 512, 2, 4)
    torch.testing.assert_close(last_map, small.stages(x)[-1], rtol=0, atol=0)


@torch.inference_mode()
def test_timm_forward_head_pools_and_classifies(small: RedNet) -> None:
    """`forward` is both parts together. With `pre_logits` the result is that of `features`."""
    x = torch.randn(2, 3, 64, 64)
    last_map = small.forward_features(x)
    torch.testing.assert_close(small.forward_head(last_map), small(x), rtol=0, atol=0)
    torch.testing.assert_close(small.forward_head(last_map, pre_logits=True), small.features(x), rtol=0, atol=0)
    torch.testing.assert_close(small.features(x), last_map.mean(dim=(2, 3)), rtol=0, atol=0)


def test_timm_num_features_and_num_classes() -> None:
    """Those of RedNet-50 equal those of ResNet-50."""
    with torch.device("meta"):
        net = create_rednet("rednet50")
    assert (net.num_features, net.num_classes) == (2048, 1000)
    assert net.get_classifier() is net.head.fc


def test_timm_reset_classifier_replaces_the_last_layer(small: RedNet) -> None:
    """The new weights have the new size, the old dtype and the official names. The backbone is unchanged."""
    before = {key: tensor.clone() for key, tensor in small.double().state_dict().items()}
    small.reset_classifier(7)
    after = small.state_dict()
    assert list(after) == list(before)
    assert after["head.fc.weight"].shape == (7, 512)
    assert after["head.fc.weight"].dtype == torch.float64
    assert after["head.fc.weight"].std().item() == pytest.approx(0.01, rel=0.1)
    assert after["head.fc.bias"].tolist() == [0] * 7
    assert all(torch.equal(after[key], before[key]) for key in before if not key.startswith("head."))
    assert (small.num_classes, small.config.num_classes) == (7, 7)
    assert not small.head.training
    assert small(torch.zeros(1, 3, 32, 32, dtype=torch.float64)).shape == (1, 7)


def test_timm_reset_classifier_to_zero_gives_features(small: RedNet, tmp_path: Path) -> None:
    """As in timm. Such a network cannot be served or saved, with a clear error. A classifier can be added later."""
    x = torch.randn(1, 3, 32, 32)
    features = small.features(x)
    small.reset_classifier(0)
    assert small.num_classes == 0
    torch.testing.assert_close(small(x), features, rtol=0, atol=0)
    with pytest.raises(ValueError, match="reset_classifier"):
        prepare(small, device="cpu")
    with pytest.raises(ValueError, match="reset_classifier"):
        save_checkpoint(tmp_path / "net.safetensors", Checkpoint(net=small, labels=[], name="small"))
    small.reset_classifier(2)
    assert small(x).shape == (1, 2)


def test_timm_reset_classifier_rejects_a_negative_number(small: RedNet) -> None:
    """The network is unchanged."""
    with pytest.raises(ValueError, match="at least 1"):
        small.reset_classifier(-1)
    assert small.num_classes == small.head.fc.out_features == 3


def test_every_config_field_affects_the_network() -> None:
    """Kernel sizes, reduction, group width, strides and input channels are not constants in the code."""
    torch.manual_seed(0)
    net = create_rednet(
        "rednet26",
        num_classes=3,
        in_channels=1,
        stem_channels=48,
        base_channels=24,
        strides=(1, 2, 1, 2),
        kernel_size=5,
        stem_kernel_size=5,
        reduction_ratio=2,
        group_channels=8,
    ).eval()
    assert net.state_dict()["backbone.layer1.0.conv2.conv2.conv.weight"].shape == (3 * 25, 12, 1, 1)
    assert net.state_dict()["backbone.stem.1.conv2.conv.weight"].shape == (3 * 25, 12, 1, 1)
    with torch.inference_mode():
        stages = net.stages(torch.randn(1, 1, 64, 64))
    assert [stage.shape[2] for stage in stages] == [16, 8, 8, 4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 34}, "depth must be one of 26, 38, 50, 101, 152"),
        ({"base_channels": 40}, "base_channels"),
        ({"stem_channels": 48}, "stem_channels"),
        ({"num_classes": 0}, "at least 1"),
        ({"strides": (1, 2, 2)}, "four stages"),
        ({"kernel_size": 4}, "odd"),
        ({"reduction_ratio": 0}, "reduction_ratio"),
        ({"base_channels": 48, "stem_channels": 32, "reduction_ratio": 3}, "half of stem_channels"),
        ({"kernel_size": 7.0}, "integer"),
        ({"num_classes": 10**9}, "at most"),
    ],
)
def test_invalid_config_is_rejected(fields: dict[str, object], message: str) -> None:
    """The constructor raises an error that names the field."""
    with pytest.raises(ValueError, match=message):
        RedNetConfig(**fields)  # type: ignore[arg-type]


def test_create_rednet_with_an_unknown_name_is_rejected() -> None:
    """The message lists the five names."""
    with pytest.raises(ValueError, match="rednet26, rednet38"):
        create_rednet("resnet50")
