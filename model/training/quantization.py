"""A checkpoint with int8 scales from photos, and how far int8 then agrees with float32 on others."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.activation_ranges import collect_activation_ranges
from rednet.model.inference.preparation import SelfCheckError, prepare
from rednet.model.io.checkpoint import Checkpoint
from rednet.model.io.text import clean_text
from rednet.model.training.dataset import all_photos
from rednet.model.training.loader import PhotoError, read_photo
from rednet.model.training.progress import progress

MOST_PHOTOS = 256
FEW_PHOTOS = 32
HELD_OUT_EVERY = 4  # one in so many photos is kept from the scales, to compare on
BATCH_SIZE = 32


def quantize(checkpoint: Checkpoint, folder: Path, workers: int = 2) -> Checkpoint:
    """The same network with scales, and with what they were taken from in `provenance["int8"]`.

    `same_class` there is the share of the photos held out whose likeliest class is that of float32, `feature_cosine`
    the mean cosine between features; they are missing where int8 cannot run, and `not_compared` says why.

    Args:
        checkpoint: any; it stays as it is.
        folder: with photos like those that the network will see, at any depth; of more than `MOST_PHOTOS` some are
            taken, evenly.
        workers: threads that decode.

    Raises:
        PhotoError: there is no photo.
        ValueError: the network makes infinities or the like of these photos.
    """
    pixels = _some_photos(folder, checkpoint.preprocess, workers)
    held_out = torch.arange(len(pixels)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    seen, others = pixels[~held_out], pixels[held_out]
    if len(seen) < FEW_PHOTOS:
        _tell(
            f"int8 scales from {len(seen)} photos only: what others make of the network may go beyond them and be "
            f"cut off; {FEW_PHOTOS} or more, of all classes, are safer"
        )
    scales = collect_activation_ranges(checkpoint.net, checkpoint.preprocess, seen)
    quantised = replace(checkpoint, calibration=scales)
    report = {"photos": len(seen), **_agreement(quantised, others)}
    return replace(quantised, provenance={**checkpoint.provenance, "int8": report})


def _some_photos(folder: Path, preprocess: Preprocess, workers: int) -> Tensor:
    """uint8 [N, 3, crop, crop]; a file that is no photo is told and left out."""
    paths, left_out = all_photos(folder)
    for line in left_out.lines():
        print(line, file=sys.stderr)
    count = min(len(paths), MOST_PHOTOS)
    chosen = [paths[index * len(paths) // count] for index in range(count)]

    def read(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | PhotoError:
        try:
            return read_photo(path, preprocess.pixels)
        except PhotoError as error:
            return error

    photos = []
    with ThreadPoolExecutor(workers, thread_name_prefix="photos") as pool:
        for photo in progress(pool.map(read, chosen), total=len(chosen), describe="reading photos"):
            if isinstance(photo, PhotoError):
                _tell(f"{photo}; left out")
            else:
                photos.append(photo)
    if not photos:
        raise PhotoError(f"{folder} holds no photos")
    return torch.from_numpy(np.stack(photos))


def _agreement(quantised: Checkpoint, photos: Tensor) -> dict[str, int | float | str]:
    """Of int8 with float32, on photos that the scales were not taken from."""
    if not len(photos):
        return {"not_compared": "there were too few photos to hold some out"}
    net, preprocess, scales = quantised.net, quantised.preprocess, quantised.calibration
    try:
        forms = prepare(net, preprocess, "cpu", "fp32"), prepare(net, preprocess, "cpu", "int8", scales)
    except SelfCheckError as error:
        return {"not_compared": str(error)}
    batches = photos.split(BATCH_SIZE)
    same, cosine = 0.0, 0.0
    for batch in progress(batches, total=len(batches), describe="comparing with float32"):
        exact, ours = (form(batch) for form in forms)
        same += float((exact.logits.argmax(dim=1) == ours.logits.argmax(dim=1)).sum())
        cosine += float(torch.cosine_similarity(exact.features, ours.features).sum())
    return {"compared": len(photos), "same_class": same / len(photos), "feature_cosine": cosine / len(photos)}


def _tell(text: str) -> None:
    print(f"warning: {clean_text(text)}", file=sys.stderr)
