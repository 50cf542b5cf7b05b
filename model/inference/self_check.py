"""Compares inference backends with the network that they were made from."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.backend import InferenceBackend
from rednet.model.inference.tf32 import ieee_float32
from rednet.model.nn.rednet import RedNet
from rednet.model.ops import use


class DeviationError(RuntimeError):
    """A backend's output differs from the network's own by more than rounding."""


class ReferenceOutput(NamedTuple):
    """The network's own output for a few photos."""

    pixels: Tensor  # [N, 3, H, W]
    logits: Tensor  # [N, num_classes]
    features: Tensor  # [N, feature_channels]
    logit_scale: Tensor  # [N], that errors are relative to; logits of few classes can all be near zero by chance


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
        expected = torch.linalg.norm(weight) * torch.linalg.norm(features, dim=1) / features.shape[1] ** 0.5
        scale = torch.maximum(expected + torch.linalg.norm(bias), torch.linalg.norm(logits, dim=1))
        return ReferenceOutput(pixels, *(each.float().cpu() for each in (logits, features, scale)))


class SelfCheck(NamedTuple):
    """Compares batches of a backend with the network's own output.

    Attributes:
        reference: the network's own output for a few photos.
        tolerance: largest accepted relative error.
    """

    reference: ReferenceOutput
    tolerance: float

    def run(self, network: Callable[[Tensor], tuple[Any, ...]], size: int) -> float:
        """Run a batch of `size` images, and return the largest relative error of a row.

        Args:
            network: from pixels to logits, features, and anything else.
            size: of the batch. Its photos are in an order without a period (the Thue-Morse sequence), so that rows that
                are shifted or exchanged differ from the reference, too.

        Raises:
            DeviationError: the error is larger than the tolerance, or a value is not a number.
        """
        order = [row.bit_count() % len(self.reference.pixels) for row in range(size)]
        expected = ReferenceOutput(*(each[order] for each in self.reference))
        logits, features, *_ = network(expected.pixels)
        worst = max(
            relative_error(logits, expected.logits, expected.logit_scale),
            relative_error(features, expected.features, torch.linalg.norm(expected.features, dim=1)),
        )
        if worst <= self.tolerance:  # false for NaN
            return worst
        raise DeviationError(
            f"deviates by {worst:.1e} from the plain network in a batch of {size}; the limit is {self.tolerance:g}"
        )


def first_valid_backend(
    candidates: Iterable[tuple[str, Callable[[], InferenceBackend]]],
    check: SelfCheck,
    copies: int,
    rejected: list[str],
) -> tuple[InferenceBackend | None, float]:
    """Return the first backend that agrees with the network, and its largest relative error.

    Args:
        candidates: names of backends and functions that make them, best first.
        check: compares them with the network.
        copies: size of the compared batch.
        rejected: a line with the reason is appended for each rejected backend.

    Returns:
        (None, NaN) where no backend agrees.
    """
    for name, make in candidates:
        try:
            backend = make()
            return backend, check.run(backend, copies)
        except Exception as error:  # noqa: BLE001  (compilers and drivers raise anything; a slower backend still serves)
            rejected.append(f"{name}: {error or type(error).__name__}")
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


def relative_error(output: Tensor, reference: Tensor, scale: Tensor) -> float:
    """Return the largest distance of a row from the reference's, relative to the row's `scale`; NaN for NaN values."""
    if output.shape != reference.shape:
        return math.nan
    return float((torch.linalg.norm(output.cpu() - reference, dim=1) / scale.clamp_min(1e-12)).max())
