"""Measures accuracy and calibration error on labelled photos."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from rednet.model.images.preprocess import Pixels, Preprocess
from rednet.model.training.loader import Photo, load_batches, read_photo
from rednet.model.training.progress import progress
from rednet.model.training.temperature import expected_calibration_error

BATCH_SIZE = 32


def confidence_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a share that was measured on `count` photos.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927. It stays within 0 and 1, and
    holds for few photos.

    Example:
        >>> [round(bound, 3) for bound in confidence_interval(0.9, 60)]
        [0.799, 0.953]
    """
    z = 1.959964  # 97.5% of a normal distribution is below it
    center, spread = share + z**2 / (2 * count), z * math.sqrt((share * (1 - share) + z**2 / (4 * count)) / count)
    scale = 1 + z**2 / count
    return (center - spread) / scale, (center + spread) / scale


class Predictions(NamedTuple):
    """A network's logits for photos, and their true classes."""

    logits: Tensor  # float32 [N, classes]
    targets: Tensor  # int64 [N]

    def summary(self) -> dict[str, Any]:
        """Return the number of photos, the top-1 accuracy and its 95% confidence interval, the top-5 accuracy, and the
        expected calibration error (`ece`)."""
        best = self.logits.topk(min(5, self.logits.shape[1]), dim=1).indices == self.targets[:, None]  # [N, 5]
        top1 = float(best[:, 0].double().mean())
        return {
            "images": len(self.targets),
            "top1": top1,
            "top1_interval": confidence_interval(top1, len(self.targets)),
            "top5": float(best.any(dim=1).double().mean()),
            "ece": expected_calibration_error(self.logits.softmax(dim=1), self.targets),
        }

    def __str__(self) -> str:
        """The summary for people."""
        summary = self.summary()
        low, high = summary["top1_interval"]
        top5 = f"top-5 {summary['top5']:.4f}, " if self.logits.shape[1] > 5 else ""  # with fewer classes it is 1
        return (
            f"top-1 {summary['top1']:.4f} (95% confidence interval {low:.4f} to {high:.4f}), {top5}"
            f"expected calibration error {summary['ece']:.4f}"
        )

    def with_temperature(self, temperature: float) -> "Predictions":
        """Return these predictions with the logits divided by a temperature."""
        return Predictions(self.logits / temperature, self.targets)

    def by_class(self, names: Sequence[str]) -> list[dict[str, str | int | float]]:
        """Return name, number of photos and top-1 accuracy of each class that has photos."""
        confusion = self.confusion()
        rows = zip(names, confusion.diagonal().tolist(), confusion.sum(dim=1).tolist(), strict=True)
        return [{"label": name, "images": images, "top1": hits / images} for name, hits, images in rows if images]

    def confusion(self) -> Tensor:
        """Return the confusion matrix, int64 [classes, classes]: photos of class i that were predicted as class j."""
        classes = self.logits.shape[1]
        return torch.bincount(self.targets * classes + self.logits.argmax(dim=1), minlength=classes**2).reshape(
            classes, classes
        )


@torch.inference_mode()
def evaluate(
    network: Callable[[Tensor], Tensor],
    preprocess: Preprocess,
    photos: Sequence[Photo],
    *,
    workers: int = 2,
    describe: str = "evaluating",
) -> Predictions:
    """Run a network on labelled photos.

    Args:
        network: a function from uint8 pixels [B, 3, H, W] to logits [B, classes].
        preprocess: the network's preprocessing.
        photos: at least one.
        workers: number of decoding threads.
        describe: label of the progress line.

    Raises:
        PhotoError: a photo is damaged.
    """

    def read(photo: Photo) -> tuple[Pixels, int]:
        return read_photo(photo.path, preprocess.pixels), photo.target

    steps = -(-len(photos) // BATCH_SIZE)
    predictions = [
        Predictions(network(batch.pixels).float().cpu(), batch.targets)
        for batch in progress(load_batches(photos, read, BATCH_SIZE, workers), total=steps, describe=describe)
    ]
    return Predictions(*(torch.cat(column) for column in zip(*predictions, strict=True)))


def auroc(known: ArrayLike, foreign: ArrayLike) -> float:
    """Return the probability that a score tells two photos apart: that of a known one is higher than that of a foreign
    one (the area under the receiver operating characteristic). Of two equal scores, either may be the higher one.

    Args:
        known: scores of photos of the network's classes, [N].
        foreign: scores of photos of other things, [M].
    """
    ascending, others = np.sort(known), np.asarray(foreign)
    below = (np.searchsorted(ascending, others, "left") + np.searchsorted(ascending, others, "right")) / 2
    return float(1 - below.mean() / len(ascending))
