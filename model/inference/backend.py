"""The interface of every inference backend."""

from collections.abc import Collection
from typing import NamedTuple, Protocol

from torch import Tensor

Stages = Collection[int]  # stages of the backbone, counted from 0
Maps = tuple[Tensor, ...]  # one per requested stage, in ascending order


class Output(NamedTuple):
    """The result of one forward pass: float32, on the device that ran it."""

    logits: Tensor  # [B, num_classes]
    features: Tensor  # [B, feature_channels]
    stages: Maps | None = None  # each [B, C, h, w]
    kernel_sums: Maps | None = None  # each [B, G, h, w]: the stage's last kernels, summed over their K*K taps


class InferenceBackend(Protocol):
    """A network that is ready to run."""

    name: str  # for people: what runs the network

    def __call__(self, pixels: Tensor, stages: Stages = (), kernel_sums: Stages = ()) -> Output:
        """Run a forward pass.

        Args:
            pixels: [B, 3, H, W], uint8, or normalised float32.
            stages: stages whose maps are returned.
            kernel_sums: stages whose summed kernels are returned.
        """
