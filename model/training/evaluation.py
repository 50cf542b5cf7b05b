"""Accuracy and calibration on folders of photos."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rednet.model.images.preprocess import Pixels, Preprocess
from rednet.model.training.loader import Photo, batches, read_photo
from rednet.model.training.progress import progress
from rednet.model.training.temperature import expected_calibration_error

BATCH_SIZE = 32


class Answers(NamedTuple):
    """What a network said of photos, and what they are."""

    logits: Tensor  # float32 [N, classes]
    targets: Tensor  # int64 [N]

    def summary(self) -> dict[str, float]:
        """Number of photos; share of those whose class is the likeliest (`top1`) or among the five likeliest (`top5`);
        expected calibration error of their probabilities (`ece`)."""
        best = self.logits.topk(min(5, self.logits.shape[1]), dim=1).indices == self.targets[:, None]  # [N, 5]
        return {
            "images": len(self.targets),
            "top1": float(best[:, 0].double().mean()),
            "top5": float(best.any(dim=1).double().mean()),
            "ece": expected_calibration_error(self.logits.softmax(dim=1), self.targets),
        }

    def cooled(self, temperature: float) -> "Answers":
        """The same answers with their logits divided by a temperature."""
        return Answers(self.logits / temperature, self.targets)

    def by_class(self, names: Sequence[str]) -> list[dict[str, str | int | float]]:
        """Name, number of photos and `top1` of each class that has any."""
        confusion = self.confusion()
        rows = zip(names, confusion.diagonal().tolist(), confusion.sum(dim=1).tolist(), strict=True)
        return [{"label": name, "images": images, "top1": hits / images} for name, hits, images in rows if images]

    def confusion(self) -> Tensor:
        """How many photos of class i were taken for class j: int64 [classes, classes]."""
        classes = self.logits.shape[1]
        return torch.bincount(self.targets * classes + self.logits.argmax(dim=1), minlength=classes**2).reshape(
            classes, classes
        )


@torch.inference_mode()
def evaluate(
    logits_of: Callable[[Tensor], Tensor],
    preprocess: Preprocess,
    photos: Sequence[Photo],
    *,
    workers: int = 2,
    describe: str = "evaluating",
) -> Answers:
    """Ask a network about photos.

    Args:
        logits_of: the network, from uint8 pixels [B, 3, H, W] to logits [B, classes].
        preprocess: what it expects.
        photos: at least one.
        workers: threads that decode.
        describe: what the progress line begins with.

    Raises:
        PhotoError: a photo is damaged.
    """

    def read(photo: Photo) -> tuple[Pixels, int]:
        return read_photo(photo.path, preprocess.pixels), photo.target

    steps = -(-len(photos) // BATCH_SIZE)
    answers = [
        Answers(logits_of(batch.pixels).float().cpu(), batch.targets)
        for batch in progress(batches(photos, read, BATCH_SIZE, workers), total=steps, describe=describe)
    ]
    return Answers(*(torch.cat(column) for column in zip(*answers, strict=True)))
