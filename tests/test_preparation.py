"""The inference forms of a network, against the network itself."""

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
from rednet.model.inference.self_check import first_valid_backend, reference_output
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
def test_it_answers_like_the_plain_network(net: RedNet, device: str, precision: str) -> None:
    """With batch norms folded, in every precision, for any batch and any size of image, none at all included."""
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
def test_maps_come_out_of_the_same_pass(net: RedNet, native: bool) -> None:
    """Stage maps are the network's, and kernel sums those of each stage's last involution, by either form."""
    run = prepare(net)
    if not native:
        form = TorchBackend(net, Preprocess(), torch.device("cpu"), torch.float32)
        run = Prepared(form, Preprocess(), net.head.fc.weight, torch.device("cpu"), "fp32", 0.0)
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


def test_the_network_itself_stays_as_it_is(net: RedNet) -> None:
    """It can go on training; its weights are not shared with the prepared form, nor is its mode changed."""
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
def test_on_a_cpu_float32_runs_natively(net: RedNet) -> None:
    """The engine is what users get by default, after a check that it computes the same function."""
    run = prepare(net, device="cpu")
    assert run.backend.startswith("native engine")
    assert run.precision == "fp32"
    assert 0 < run.max_relative_error < 1e-5
    assert run.rejected_backends == ()


def test_what_the_engine_is_not_made_for_runs_in_torch() -> None:
    """With other than 16 channels in a group the answer is the same and the reason is told."""
    net = create_rednet("rednet26", base_channels=16, stem_channels=32, group_channels=8, num_classes=3).eval()
    run = prepare(net, Preprocess(resize=64, crop=64), device="cpu")
    assert run.backend.startswith("torch")
    expected = unavailable() or "16 channels per group, not 8"
    assert expected in run.rejected_backends[0]


def test_preparing_does_not_wait_for_torchs_compiler() -> None:
    """A second of every start, for what nobody compiles."""
    script = (
        "import sys; from rednet import load_checkpoint, prepare; checkpoint = load_checkpoint();"
        "prepare(checkpoint.net, checkpoint.preprocess, 'cpu'); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


class Deviating:
    """A backend that runs, and is wrong."""

    name = "wrong"

    def __init__(self, form: InferenceBackend) -> None:
        self._form = form

    def __call__(self, pixels: Tensor, stages: Stages = (), kernel_sums: Stages = ()) -> Output:
        output = self._form(pixels, stages, kernel_sums)
        return Output(output.logits, output.features * 1.01)


def test_a_form_that_deviates_is_passed_over(net: RedNet) -> None:
    """The next one runs, and the reason is told."""
    sound = TorchBackend(net, Preprocess(), torch.device("cpu"), torch.float32)
    yardstick = reference_output(net, Preprocess(), photos(1, 64, 64))

    def absent() -> InferenceBackend:
        raise RuntimeError("not on this machine")

    def wrong() -> InferenceBackend:
        return Deviating(sound)

    def right() -> InferenceBackend:
        return sound

    reasons: list[str] = []
    forms = [("absent", absent), ("wrong", wrong), ("right", right)]
    form, deviation = first_valid_backend(forms, yardstick, 3, 1e-4, reasons)
    assert form is sound
    assert deviation < 1e-5
    assert reasons[0] == "absent: not on this machine"
    assert reasons[1].startswith("wrong: deviates by 1.0e-02")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_precision_are_taken(net: RedNet, dtype: torch.dtype) -> None:
    """They are computed with in float32."""
    run = prepare(copy.deepcopy(net).to(dtype), device="cpu", precision="fp32")
    assert run.max_relative_error < 1e-5
    assert run.rejected_backends == prepare(net, device="cpu").rejected_backends


def test_the_callers_autocast_stays_outside(net: RedNet) -> None:
    """Neither the check nor the form computes in another precision than the one it says."""
    with torch.autocast("cpu", torch.bfloat16):
        run = prepare(net, device="cpu")
    assert run.max_relative_error < 1e-5


def test_a_network_with_broken_weights_is_refused(net: RedNet) -> None:
    """If no form answers like the network, nothing is served."""
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
def test_what_is_not_here_is_refused(net: RedNet, options: dict[str, Any], message: str) -> None:
    """By name, before anything is computed."""
    with pytest.raises(ValueError, match=message):
        prepare(net, **options)


def test_networks_that_are_not_for_photos_are_refused() -> None:
    """Pixels have three channels."""
    with pytest.raises(ValueError, match="1 input channels"):
        prepare(create_rednet("rednet26", in_channels=1, base_channels=16, stem_channels=32))


@pytest.mark.parametrize(
    "pixels", [torch.zeros(1, 3, 8, 8).double(), torch.zeros(3, 8, 8).byte(), torch.zeros(1, 3, 0, 8).byte()]
)
def test_other_than_pixels_are_refused(net: RedNet, pixels: Tensor) -> None:
    """Doubles, a single image, an image without pixels."""
    with pytest.raises(ValueError, match="pixels must be uint8 or float32"):
        prepare(net)(pixels)
