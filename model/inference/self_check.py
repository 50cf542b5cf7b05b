"""Compares inference backends with the network that they were made from."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.backend import InferenceBackend
from rednet.model.inference.tf32 import ieee_float32
from rednet.model.nn.rednet import RedNet
from rednet.model.ops import use


class ReferenceOutput(NamedTuple):
    """The network's own output for one photo."""

    pixels: Tensor  # [1, 3, H, W]
    logits: Tensor  # [1, num_classes]
    features: Tensor  # [1, feature_channels]
    logit_scale: float  # the norm that errors are relative to; logits of few classes can all be near zero by chance


def reference_output(net: RedNet, preprocess: Preprocess, pixels: Tensor) -> ReferenceOutput:
    """Run the unchanged network with PyTorch's operations, on the device of its weights, in float32 or better."""
    if net.head.fc.weight.dtype.itemsize < 4:
        net = copy.deepcopy(net).float()
    weight, bias = net.head.fc.weight, net.head.fc.bias
    no_autocast = torch.autocast(weight.device.type, enabled=False)
    with _evaluating(net), use("torch"), torch.inference_mode(), no_autocast, ieee_float32():
        features = net.features(preprocess.normalise(pixels.to(weight.device)).to(weight.dtype))
        logits = net.head(features)
        # Typical logits if weights and features had random directions in D dimensions.
        expected = torch.linalg.norm(weight) * torch.linalg.norm(features) / features.shape[1] ** 0.5
        scale = torch.maximum(expected + torch.linalg.norm(bias), torch.linalg.norm(logits))
        return ReferenceOutput(pixels, logits.float().cpu(), features.float().cpu(), float(scale))


def first_valid_backend(
    candidates: Iterable[tuple[str, Callable[[], InferenceBackend]]],
    reference: ReferenceOutput,
    copies: int,
    tolerance: float,
    rejected: list[str],
) -> tuple[InferenceBackend | None, float]:
    """Return the first backend that agrees with the network, and its largest relative error.

    Args:
        candidates: names of backends and functions that make them, best first.
        reference: the network's own output for one photo.
        copies: number of copies of the photo in the compared batch.
        tolerance: largest accepted relative error.
        rejected: a line with the reason is appended for each rejected backend.

    Returns:
        (None, NaN) where no backend agrees.
    """
    batch = reference.pixels.expand(copies, -1, -1, -1)
    for name, make in candidates:
        try:
            backend = make()
            output = backend(batch)
        except Exception as error:  # noqa: BLE001  (compilers and drivers raise anything; a slower backend still serves)
            rejected.append(f"{name}: {error or type(error).__name__}")
            continue
        worst = max(
            _relative_error(output.logits, reference.logits, reference.logit_scale),
            _relative_error(output.features, reference.features, float(torch.linalg.norm(reference.features))),
        )
        if worst <= tolerance:  # false for NaN
            return backend, worst
        rejected.append(f"{name}: deviates by {worst:.1e} from the plain network")
    return None, math.nan


@contextmanager
def _evaluating(net: RedNet) -> Iterator[None]:
    """Switch to evaluation mode inside the block, and restore every module's mode afterwards."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _relative_error(output: Tensor, reference: Tensor, scale: float) -> float:
    """Return the largest distance of a row from the reference's only row, relative to `scale`; NaN for NaN values."""
    return float((torch.linalg.norm(output.cpu() - reference, dim=1) / max(scale, 1e-12)).max())
