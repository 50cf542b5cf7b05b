"""What every inference form of a network takes and gives."""

from typing import NamedTuple, Protocol

from torch import Tensor

Maps = tuple[Tensor, ...]  # one for each of the four stages


class Output(NamedTuple):
    """One forward pass, float32, on the device that ran it."""

    logits: Tensor  # [B, num_classes]
    features: Tensor  # [B, feature_channels]
    stages: Maps | None = None  # each [B, C, h, w]
    kernel_sums: Maps | None = None  # each [B, G, h, w]: the stage's last kernels, summed over their K*K taps


class Form(Protocol):
    """A network ready to run."""

    backend: str  # what runs it, for people

    def __call__(self, pixels: Tensor, stages: bool, kernel_sums: bool) -> Output:
        """Forward pixels [B, 3, H, W], uint8 or normalised float32; maps are made only if asked for."""
