"""Accuracy on folders of photos."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.photos import Photo, batches, read_photo
from model.preprocess import Pixels, Preprocess
from model.progress import progress

BATCH_SIZE = 32


@torch.inference_mode()
def evaluate(
    logits_of: Callable[[Tensor], Tensor],
    preprocess: Preprocess,
    photos: Sequence[Photo],
    *,
    workers: int = 2,
    describe: str = "evaluating",
) -> dict[str, float]:
    """Share of photos whose class is the likeliest (`top1`) or among the five likeliest (`top5`).

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

    hits1 = hits5 = 0
    steps = -(-len(photos) // BATCH_SIZE)
    for batch in progress(batches(photos, read, BATCH_SIZE, workers), total=steps, describe=describe):
        logits = logits_of(batch.pixels).cpu()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.targets[:, None]  # [B, 5]
        hits1 += int(best[:, 0].sum())
        hits5 += int(best.any(dim=1).sum())
    return {"images": len(photos), "top1": hits1 / len(photos), "top5": hits5 / len(photos)}
