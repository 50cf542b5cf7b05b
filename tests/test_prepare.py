"""The inference form of a network, against the network itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model import RedNet, create_rednet, load_checkpoint, prepare
from model.prepare import DTYPES

TOLERANCE = {"fp32": 1e-5, "fp16": 2e-2, "bf16": 1e-1}  # relative, for a network of random weights
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
)


@pytest.fixture(scope="module")
def net(tiny_path: Path) -> RedNet:
    return load_checkpoint(tiny_path).net


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("precision", DTYPES)
def test_it_answers_like_the_plain_network(net: RedNet, device: str, precision: str) -> None:
    """With batch norms folded, in every precision, for any batch and any size of image, none at all included."""
    run = prepare(net, device=device, precision=precision)
    assert (run.device.type, run.precision) == (device, precision)
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in ((1, 64, 64), (3, 70, 50), (0, 64, 64)):
        pixels = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
        with torch.inference_mode():
            features = net.features(run.preprocess.normalise(pixels))
            logits = net.head(features)
        output = run(pixels)
        for ours, exact in ((output.logits, logits), (output.features, features)):
            assert (ours.dtype, ours.shape) == (torch.float32, exact.shape)
            assert torch.linalg.norm(ours.cpu() - exact) <= TOLERANCE[precision] * torch.linalg.norm(exact)


def test_the_network_itself_stays_as_it_is(net: RedNet) -> None:
    """It can go on training; its weights are not shared with the prepared form."""
    before = {key: value.clone() for key, value in net.state_dict().items()}
    run = prepare(net)
    for parameter in run.net.parameters():
        parameter.zero_()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


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
