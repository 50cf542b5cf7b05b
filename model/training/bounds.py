"""The accepted values of hyperparameters. PyTorch is not imported here, because `rednet train --help` prints them."""

from collections.abc import Mapping

# Minimum and maximum. Values outside are mistakes, or exhaust the memory before they fail. A network trained at 896
# pixels is served at 1024, the largest crop of `Preprocess`. Batch norm needs two photos.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "base_channels": (16, 512),
    "epochs": (1, 100_000),
    "size": (1, 896),
    "batch_size": (2, 8192),
    "learning_rate": (1e-9, 10),
    "warmup_epochs": (0, 100_000),
    "weight_decay": (0, 10),
    "label_smoothing": (0, 0.99),
    "mixup": (0, 100),
    "cutmix": (0, 100),
    "trivial_augment": (0, 1),
    "full_size_epochs": (0, 1),
    "seed": (0, 2**63 - 1),
}
