"""What a training run follows, and nothing that changes while it runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rednet.model.images.preprocess import Preprocess
from rednet.model.nn.rednet import BLOCKS

FINE_TUNING_RATE = 3e-4  # a learning rate that keeps what a network has learned
PRECISIONS = ("auto", "fp32", "bf16")
GROWING = 0.8  # of the epochs; the rest is trained at full size
SIZE_UNIT = 16  # crops grow in steps of so many pixels
# What may be asked for: beyond it a run could not be meant, or would take all memory before it fails. A size of 896
# is served at 1024, the largest crop of `Preprocess`; batch norm needs two photos.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "base_channels": (1, 512),
    "epochs": (1, 100_000),
    "size": (1, 896),
    "batch_size": (2, 8192),
    "learning_rate": (1e-9, 10),
    "warmup_epochs": (0, 100_000),
    "weight_decay": (0, 10),
    "label_smoothing": (0, 0.99),
    "mixup": (0, 100),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101), a cosine schedule after a warm-up, weight
    decay on weight matrices only, label smoothing, mixup (Zhang et al., 2018, https://arxiv.org/abs/1710.09412), random
    resized crops that grow from half size, and flips.

    A rate for each weight suits kernels that are made from features, as it does attention: in three epochs of
    Imagenette at 64 pixels RedNet-26 came to 0.55 top-1 so, and to 0.50 by SGD with Nesterov momentum.

    Two runs of one recipe on one machine, with the same number of threads, end with the same weights.

    Raises:
        ValueError: it cannot be followed.
    """

    depth: int = 26
    base_channels: int = 64
    epochs: int = 20
    size: int = 176  # pixels of the last, largest training crops; served at 8/7 of it or a little more
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_epochs: float = 2.0
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    mixup: float = 0.1  # how much of one photo is blended into another: Beta(mixup, mixup); 0: none
    precision: str = "auto"  # of the activations; auto: bf16 where the processor multiplies it faster
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most:  # not so for NaN
                raise ValueError(f"{name} must be from {least} to {most}, got {value}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {self.depth}")

    @property
    def preprocess(self) -> Preprocess:
        """What the trained network is served with. Random crops enlarge what is in a photo, so that a network is best
        on larger inputs than it was trained on (Touvron et al., 2019, https://arxiv.org/abs/1906.06423)."""
        crop = math.ceil(self.size * 8 / 7 / 32) * 32
        return Preprocess(resize=round(crop * 8 / 7), crop=crop)

    def learning_rate_at(self, epoch: float) -> float:
        """Linear warm-up, then half a cosine down to zero, at a (fractional) epoch."""
        warmup = min(self.warmup_epochs, self.epochs / 5)
        if epoch < warmup:
            return self.learning_rate * (epoch + 0.01) / (warmup + 0.01)
        done = (epoch - warmup) / (self.epochs - warmup)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2

    def size_at(self, epoch: int) -> int:
        """Side of the training crops: early epochs learn from small ones, at a quarter of the cost."""
        grown = min(1.0, (epoch + 1) / (GROWING * self.epochs))
        side = int(self.size * (1 + grown) / 2)
        return side if grown == 1 else min(self.size, max(2 * SIZE_UNIT, side // SIZE_UNIT * SIZE_UNIT))
