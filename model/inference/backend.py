"""The interface of every inference backend."""

from collections.abc import Collection
from typing import NamedTuple, Protocol

from torch import Tensor

Stages = Collection[int]  # stages of the backbone, counted from 0
Maps = tuple[Tensor, ...]  # one per requested stage, in ascending order


class Output(NamedTuple):
    """The result of one forward pass: float32, on the device that ran it.

    Attributes:
        logits: [B, num_classes].
        features: [B, num_features].
        stages: the maps of the requested stages, [B, C, h, w] each; None: not requested.
        kernel_sums: the kernels of each requested stage's last involution, summed over their K*K taps, [B, G, h, w]
            each; None: not requested.

    Example:
        >>> import torch
        >>> Output(logits=torch.zeros(2, 10), features=torch.zeros(2, 2048)).stages is None
        True
    """

    logits: Tensor
    features: Tensor
    stages: Maps | None = None
    kernel_sums: Maps | None = None


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
