"""The int8 backend: bit-identical to its definition, and close to float32."""

from typing import Any

import pytest
import torch

from rednet import create_rednet
from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.activation_ranges import collect_activation_ranges, required_activations
from rednet.model.inference.int8_backend import MAX_SUMMANDS, Int8Backend, validate_sums
from rednet.model.inference.native_backend import NativeBackend
from rednet.model.inference.preparation import prepare
from rednet.model.native import int8_builds
from tests.conftest import needs_int8
from tests.int8_reference import Int8Reference
from tests.test_native import network, photos


@needs_int8
@pytest.mark.parametrize("build", int8_builds())
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
def test_int8_activations_are_bit_identical_to_the_reference(
    name: str, size: tuple[int, int], fields: dict[str, Any], build: str
) -> None:
    """Stage maps and summed kernels are equal to the last bit, for sizes and architectures beyond the paper's."""
    net = network(name, **fields)
    pixels = photos(2, *size)
    scales = collect_activation_ranges(net, Preprocess(), pixels)
    expected = Int8Reference(net, Preprocess(), scales)(pixels)
    output = Int8Backend(net, Preprocess(), scales, threads=2, build=build)(pixels, range(4), range(4))
    assert output.stages is not None
    assert output.kernel_sums is not None
    for stage in range(4):
        last = max(key for key in scales if key.startswith(f"backbone.layer{stage + 1}.") and key.count(".") == 2)
        assert torch.equal((output.stages[stage] * (255 / scales[last])).round(), expected.codes[last].float())
        kernels = f"{last}.conv2.conv2"
        sums = expected.codes[kernels].double().unflatten(1, (-1, net.config.kernel_size**2)).sum(dim=2)
        torch.testing.assert_close(
            output.kernel_sums[stage].double(), sums * scales[kernels] / 127, rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(output.features, expected.features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)


@needs_int8
@pytest.mark.parametrize("build", int8_builds())
def test_int8_results_are_bit_identical_for_any_batch_and_threads(build: str) -> None:
    """A photo's result is the same alone, in any batch up to nine, and on any number of threads."""
    net = network()
    pixels = photos(9, 144, 160)
    scales = collect_activation_ranges(net, Preprocess(), pixels)
    alone = Int8Backend(net, Preprocess(), scales, threads=1, build=build)
    expected = torch.cat([alone(photo.unsqueeze(0)).logits for photo in pixels])
    for threads in (1, 2, 3):
        backend = Int8Backend(net, Preprocess(), scales, threads=threads, build=build)
        for batch in range(1, 10):
            assert torch.equal(backend(pixels[:batch]).logits, expected[:batch])


@needs_int8
def test_int8_features_are_close_to_float32() -> None:
    """The cosine similarity of the features is high."""
    net = network()
    pixels = photos(4, 96, 96)
    ours = Int8Backend(net, Preprocess(), collect_activation_ranges(net, Preprocess(), pixels))(pixels).features
    exact = NativeBackend(net, Preprocess())(pixels).features
    assert torch.cosine_similarity(ours, exact).min() > 0.99


@needs_int8
def test_prepare_int8_with_activation_ranges_or_photos() -> None:
    """Both give the same network. Without them, or with ranges of another network, there is a clear error."""
    net = network()
    pixels = photos(4, 64, 64)
    scales = collect_activation_ranges(net, Preprocess(), pixels)
    from_scales = prepare(net, Preprocess(), "cpu", "int8", scales)
    from_photos = prepare(net, Preprocess(), "cpu", "int8", pixels)
    assert from_scales.precision == "int8"
    assert "int8" in from_scales.backend
    assert torch.equal(from_scales(pixels).logits, from_photos(pixels).logits)
    with pytest.raises(ValueError, match="int8 needs activation ranges"):
        prepare(net, Preprocess(), "cpu", "int8")
    with pytest.raises(ValueError, match=r"backbone.stem.0 is missing"):
        prepare(net, Preprocess(), "cpu", "int8", {key: scales[key] for key in required_activations(net)[1:]})


@needs_int8
def test_auto_precision_uses_int8_only_with_accurate_ranges() -> None:
    """With ranges that clip most values, int8 fails the self-check and float32 is used."""
    net = network()
    scales = collect_activation_ranges(net, Preprocess(), photos(4, 64, 64))
    assert prepare(net, device="cpu").precision == "fp32"
    broken = prepare(net, device="cpu", calibration={name: scale / 20 for name, scale in scales.items()})
    assert broken.precision == "fp32"
    assert any("int8" in reason and "deviates" in reason for reason in broken.rejected_backends)


def test_int8_without_cpu_support_is_rejected_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An explicit int8 is an error, and auto falls back to float32."""
    net = network()
    scales = collect_activation_ranges(net, Preprocess(), photos(1, 64, 64))
    monkeypatch.setattr("rednet.model.inference.int8_backend.int8_unavailable", lambda: "no AVX2 here")
    with pytest.raises(ValueError, match="no AVX2 here"):
        prepare(net, device="cpu", precision="int8", calibration=scales)
    run = prepare(net, device="cpu", calibration=scales)
    assert run.precision == "fp32"
    assert any("no AVX2 here" in reason for reason in run.rejected_backends)


@pytest.mark.parametrize(
    ("fields", "layer"),
    [
        ({"stem_channels": 14_720}, None),
        ({"stem_channels": 14_752}, r"backbone\.stem\.4\.conv sums 66384"),
        ({"base_channels": 4_144}, None),
        ({"base_channels": 4_160}, r"backbone\.layer3\..\.conv1 sums 66560"),
    ],
)
def test_int8_is_rejected_for_layers_whose_sums_could_overflow(fields: dict[str, Any], layer: str | None) -> None:
    """The widest network whose sums fit into 32 bits is accepted. The next wider one is rejected with the layer's
    name."""
    with torch.device("meta"):
        net = create_rednet("rednet26", num_classes=2, **fields)
    if layer is None:
        validate_sums(net)
    else:
        with pytest.raises(ValueError, match=layer):
            validate_sums(net)
    assert MAX_SUMMANDS * 255 * 127 < 2**31 <= (MAX_SUMMANDS + 1) * 255 * 127
