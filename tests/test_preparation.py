"""The backends that `prepare` chooses, compared with the network."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rednet import RedNet, SelfCheckError, create_rednet, load_checkpoint, prepare
from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.backend import InferenceBackend, Output, Stages
from rednet.model.inference.preparation import DTYPES, Prepared
from rednet.model.inference.self_check import SelfCheck, first_valid_backend, reference_output
from rednet.model.inference.torch_backend import TorchBackend
from rednet.model.native import unavailable
from tests.shared import needs_native

TOLERANCE = {"fp32": 1e-5, "fp16": 2e-2, "bf16": 1e-1}  # relative, for a network of random weights
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
)


@pytest.fixture(scope="module")
def net(tiny_path: Path) -> RedNet:
    return load_checkpoint(tiny_path).net


def photos(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def assert_close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    assert (ours.dtype, ours.shape) == (torch.float32, exact.shape)
    assert torch.linalg.norm(ours.cpu() - exact) <= tolerance * torch.linalg.norm(exact)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("precision", DTYPES)
def test_prepared_network_matches_the_network(net: RedNet, device: str, precision: str) -> None:
    """In every precision, for any batch and image size, including an empty batch."""
    run = prepare(net, device=device, precision=precision)
    assert (run.device.type, run.precision) == (device, precision)
    for batch, height, width in ((1, 64, 64), (3, 70, 50), (0, 64, 64)):
        pixels = photos(batch, height, width)
        with torch.inference_mode():
            features = net.features(run.preprocess.normalise(pixels))
            logits = net.head(features)
        output = run(pixels)
        assert_close(output.logits, logits, TOLERANCE[precision])
        assert_close(output.features, features, TOLERANCE[precision])
        assert output.stages is output.kernel_sums is None
        assert_close(run(run.preprocess.normalise(pixels)).logits, logits, TOLERANCE[precision])


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
def test_stage_maps_and_kernel_sums_match_the_network(net: RedNet, native: bool) -> None:
    """Stage maps and the kernel sums of each stage's last involution come from the same forward pass, in both
    backends."""
    run = prepare(net)
    if not native:
        backend = TorchBackend(net, Preprocess(), torch.device("cpu"), torch.float32)
        run = Prepared(backend, Preprocess(), net.head.fc.weight, torch.device("cpu"), "fp32", 0.0)
    pixels = photos(3, 70, 50)
    kernels: list[Tensor] = []
    for stage in range(4):
        generator = net.backbone.get_submodule(f"layer{stage + 1}")[-1].conv2.conv2  # type: ignore[index]
        generator.register_forward_hook(lambda _, __, out: kernels.append(out))
    with torch.inference_mode():
        stages = net.stages(run.preprocess.normalise(pixels))
    output = run(pixels, stages=True, kernel_sums=True)
    assert output.stages is not None
    assert output.kernel_sums is not None
    for ours, exact in zip(output.stages, stages, strict=True):
        assert_close(ours, exact, 1e-5)
    for sums, kernel in zip(output.kernel_sums, kernels, strict=True):
        assert_close(sums, kernel.unflatten(1, (-1, 49)).sum(dim=2), 1e-5)


def test_prepare_does_not_change_the_network(net: RedNet) -> None:
    """Its mode stays, its weights are not shared with the backend, and its training can continue."""
    run = prepare(net)
    expected = run(photos(1, 64, 64)).logits
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.train()
    prepare(net)
    assert all(module.training for module in net.modules())
    net.eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        torch.testing.assert_close(run(photos(1, 64, 64)).logits, expected, rtol=0, atol=0)
        net.load_state_dict(before)


@needs_native
def test_prepare_selects_the_native_backend_for_float32_on_cpu(net: RedNet) -> None:
    """It is used after a check that its results match the network's."""
    run = prepare(net, device="cpu")
    assert run.backend.startswith("native engine")
    assert run.precision == "fp32"
    assert 0 < run.max_relative_error < 1e-5
    assert run.rejected_backends == ()


def test_architecture_unsupported_by_the_native_backend_runs_in_torch() -> None:
    """With a group width other than 16, results are the same and the reason is reported."""
    net = create_rednet("rednet26", base_channels=16, stem_channels=32, group_channels=8, num_classes=3).eval()
    run = prepare(net, Preprocess(resize=64, crop=64), device="cpu")
    assert run.backend.startswith("torch")
    expected = unavailable() or "16 channels per group, not 8"
    assert expected in run.rejected_backends[0]


def test_prepare_does_not_import_the_torch_compiler() -> None:
    """The import would add a second to every start."""
    script = (
        "import sys; from rednet import load_checkpoint, prepare; checkpoint = load_checkpoint();"
        "prepare(checkpoint.net, checkpoint.preprocess, 'cpu'); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


class Deviating:
    """A backend with wrong results."""

    name = "wrong"

    def __init__(self, backend: InferenceBackend) -> None:
        self._backend = backend

    def __call__(self, pixels: Tensor, stages: Stages = (), kernel_sums: Stages = ()) -> Output:
        output = self._backend(pixels, stages, kernel_sums)
        return Output(output.logits, output.features * 1.01)


def test_backend_with_wrong_results_is_rejected(net: RedNet) -> None:
    """The next backend is used, and the reasons are reported."""
    valid = TorchBackend(net, Preprocess(), torch.device("cpu"), torch.float32)
    reference = reference_output(net, Preprocess(), photos(1, 64, 64))

    def absent() -> InferenceBackend:
        raise RuntimeError("not on this machine")

    def wrong() -> InferenceBackend:
        return Deviating(valid)

    def right() -> InferenceBackend:
        return valid

    reasons: list[str] = []
    candidates = [("absent", absent), ("wrong", wrong), ("right", right)]
    backend, deviation = first_valid_backend(candidates, SelfCheck(reference, 1e-4), 3, reasons)
    assert backend is valid
    assert deviation < 1e-5
    assert reasons[0] == "absent: not on this machine"
    assert reasons[1].startswith("wrong: deviates by 1.0e-02")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_prepare_accepts_weights_of_any_precision(net: RedNet, dtype: torch.dtype) -> None:
    """They are converted to float32."""
    run = prepare(copy.deepcopy(net).to(dtype), device="cpu", precision="fp32")
    assert run.max_relative_error < 1e-5
    assert run.rejected_backends == prepare(net, device="cpu").rejected_backends


def test_prepare_and_results_ignore_autocast_of_the_caller(net: RedNet) -> None:
    """Self-check and backend compute in the chosen precision."""
    with torch.autocast("cpu", torch.bfloat16):
        run = prepare(net, device="cpu")
    assert run.max_relative_error < 1e-5


def test_network_with_nan_weights_is_rejected(net: RedNet) -> None:
    """No backend matches the network, so none is used."""
    broken = create_rednet("rednet26", base_channels=16, stem_channels=32, num_classes=5)
    broken.load_state_dict(net.state_dict())
    with torch.no_grad():
        broken.backbone.get_submodule("layer2.0.conv1").weight[0, 0] = torch.nan  # type: ignore[operator]
    with pytest.raises(SelfCheckError, match="deviates by nan"):
        prepare(broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be auto, cpu, cuda"),
        ({"device": "meta"}, "device must be auto, cpu, cuda"),
        ({"device": "cuda:99"}, "there is no cuda:99 here"),
        ({"precision": "fp8"}, "precision must be auto, fp32"),
    ],
)
def test_unavailable_device_or_precision_is_rejected_by_name(
    net: RedNet, options: dict[str, Any], message: str
) -> None:
    """Before anything is computed."""
    with pytest.raises(ValueError, match=message):
        prepare(net, **options)


def test_network_without_three_input_channels_is_rejected() -> None:
    """Photos have three channels."""
    with pytest.raises(ValueError, match="1 input channels"):
        prepare(create_rednet("rednet26", in_channels=1, base_channels=16, stem_channels=32))


@pytest.mark.parametrize(
    "pixels", [torch.zeros(1, 3, 8, 8).double(), torch.zeros(3, 8, 8).byte(), torch.zeros(1, 3, 0, 8).byte()]
)
def test_prepared_network_rejects_other_input_than_uint8_batches(net: RedNet, pixels: Tensor) -> None:
    """Doubles, a single image, and an image without pixels."""
    with pytest.raises(ValueError, match="pixels must be uint8 or float32"):
        prepare(net)(pixels)
