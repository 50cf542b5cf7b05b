"""What every inference form of a network takes and gives."""

from collections.abc import Collection
from typing import NamedTuple, Protocol

from torch import Tensor

Stages = Collection[int]  # which of the four, counted from 0
Maps = tuple[Tensor, ...]  # one for each stage that was asked for, in their order


class Output(NamedTuple):
    """One forward pass, float32, on the device that ran it."""

    logits: Tensor  # [B, num_classes]
    features: Tensor  # [B, feature_channels]
    stages: Maps | None = None  # each [B, C, h, w]
    kernel_sums: Maps | None = None  # each [B, G, h, w]: the stage's last kernels, summed over their K*K taps


class Form(Protocol):
    """A network ready to run."""

    backend: str  # what runs it, for people

    def __call__(self, pixels: Tensor, stages: Stages = (), kernel_sums: Stages = ()) -> Output:
        """Forward pixels [B, 3, H, W], uint8 or normalised float32; maps are made only of the stages asked for."""
