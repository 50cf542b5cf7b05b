"""Hyperparameters of a training run."""

import math
from dataclasses import dataclass

from rednet.model.images.preprocess import Preprocess
from rednet.model.nn.rednet import BLOCKS
from rednet.model.training.bounds import BOUNDS

FINE_TUNING_RATE = 3e-4  # learning rate; low enough to keep what a pretrained network has learned
PRECISIONS = ("auto", "fp32", "bf16")
FIRST_SIZE, GROWN_SIZE = 0.5, 0.75  # of full size: the first crops, and the last before those of full size
SIZE_STEP = 16  # pixels by which crops grow


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101), a cosine schedule after a warm-up, weight
    decay on weight matrices only, label smoothing, mixup, random resized crops that grow from half size, and flips; if
    asked for, CutMix and TrivialAugment.

    An adaptive rate per weight suits kernels that are generated from features, as it suits attention: in three epochs
    of Imagenette at 64 pixels RedNet-26 reached 0.55 top-1 with AdamW, and 0.50 with SGD and Nesterov momentum.

    Two runs of one recipe on one machine, with the same number of threads, give the same weights.

    Raises:
        ValueError: a field has an unusable value.
    """

    depth: int = 26
    base_channels: int = 64
    epochs: int = 20
    size: int = 176  # pixels, of the last and largest training crops; the network is served at 8/7 of it or a bit more
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_epochs: float = 2.0
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    mixup: float = 0.1  # alpha: blends two photos by a weight from Beta(alpha, alpha); 0: no mixup
    cutmix: float = 0.0  # alpha: pastes a square of one photo into another; 0: no CutMix
    trivial_augment: float = 0.0  # share of the photos that TrivialAugment changes
    full_size_epochs: float = 0.2  # share of the epochs that use crops of full size
    precision: str = "auto"  # of activations; auto: bf16 where the processor computes it faster
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (minimum, maximum) in BOUNDS.items():
            value = getattr(self, name)
            if not minimum <= value <= maximum:  # true for NaN
                raise ValueError(f"{name} must be from {minimum} to {maximum}, got {value}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {self.depth}")

    @property
    def preprocess(self) -> Preprocess:
        """Preprocessing of the trained network. Random crops magnify objects, so a network is most accurate on inputs
        that are larger than its training crops (Touvron et al., 2019, https://arxiv.org/abs/1906.06423)."""
        crop = math.ceil(self.size * 8 / 7 / 32) * 32
        return Preprocess(resize=round(crop * 8 / 7), crop=crop)

    def learning_rate_at(self, epoch: float) -> float:
        """Return the rate at a (fractional) epoch: linear warm-up, then half a cosine down to zero."""
        warmup = min(self.warmup_epochs, self.epochs / 5)
        if epoch < warmup:
            return self.learning_rate * (epoch + 0.01) / (warmup + 0.01)
        done = (epoch - warmup) / (self.epochs - warmup)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2

    def size_at(self, epoch: int) -> int:
        """Return the side of an epoch's training crops: early epochs use small ones, at a fraction of the cost. The
        last epoch always has full size."""
        growing = self.epochs - max(1, round(self.full_size_epochs * self.epochs))
        if epoch >= growing:
            return self.size
        share = FIRST_SIZE + (GROWN_SIZE - FIRST_SIZE) * (epoch + 1) / growing
        return min(self.size, max(2 * SIZE_STEP, int(self.size * share) // SIZE_STEP * SIZE_STEP))
