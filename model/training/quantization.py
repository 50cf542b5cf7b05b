"""Post-training int8 quantisation: collects activation ranges and compares int8 with float32 on held-out photos."""

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
from rednet.model.training.dataset import find_photos
from rednet.model.training.loader import PhotoError, read_photo
from rednet.model.training.progress import progress

MAX_PHOTOS = 256
RECOMMENDED_PHOTOS = 32  # fewer give a warning
HELD_OUT_EVERY = 4  # one photo in four is held out for the comparison
BATCH_SIZE = 32


def quantize(checkpoint: Checkpoint, folder: Path, workers: int = 2) -> Checkpoint:
    """Add activation ranges for int8 to a checkpoint, and a report to its `provenance["int8"]`.

    The report's `same_class` is the share of held-out photos whose top-1 class is that of float32, `feature_cosine` the
    mean cosine similarity of features. Where int8 cannot run, both are missing and `not_compared` has the reason.

    Args:
        checkpoint: the checkpoint; it is not changed.
        folder: photos like those that the network will see, at any depth. Of more than `MAX_PHOTOS` an evenly spaced
            selection is used.
        workers: number of decoding threads.

    Returns:
        A copy of the checkpoint with `calibration` and the report.

    Raises:
        PhotoError: the folder has no readable photo.
        ValueError: the network's activations overflow or are not finite on these photos.
    """
    pixels = _read_photos(folder, checkpoint.preprocess, workers)
    held_out = torch.arange(len(pixels)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    seen, others = pixels[~held_out], pixels[held_out]
    if len(seen) < RECOMMENDED_PHOTOS:
        _warn(
            f"int8 ranges come from only {len(seen)} photos, and activations of other photos may be clipped; "
            f"{RECOMMENDED_PHOTOS} or more, of all classes, are safer"
        )
    ranges = collect_activation_ranges(checkpoint.net, checkpoint.preprocess, seen)
    quantised = replace(checkpoint, calibration=ranges)
    report = {"photos": len(seen), **_compare_with_float32(quantised, others)}
    return replace(quantised, provenance={**checkpoint.provenance, "int8": report})


def _read_photos(folder: Path, preprocess: Preprocess, workers: int) -> Tensor:
    """Return photos as uint8 [N, 3, crop, crop]. Unreadable ones are skipped with a warning."""
    paths, skipped = find_photos(folder)
    for line in skipped.lines():
        print(line, file=sys.stderr)
    count = min(len(paths), MAX_PHOTOS)
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
                _warn(f"{photo}; skipped")
            else:
                photos.append(photo)
    if not photos:
        raise PhotoError(f"{folder} has no photos")
    return torch.from_numpy(np.stack(photos))


def _compare_with_float32(quantised: Checkpoint, photos: Tensor) -> dict[str, int | float | str]:
    """Compare int8 with float32 on photos that the ranges do not come from."""
    if not len(photos):
        return {"not_compared": "too few photos to hold some out"}
    net, preprocess, ranges = quantised.net, quantised.preprocess, quantised.calibration
    try:
        networks = prepare(net, preprocess, "cpu", "fp32"), prepare(net, preprocess, "cpu", "int8", ranges)
    except SelfCheckError as error:
        return {"not_compared": str(error)}
    batches = photos.split(BATCH_SIZE)
    same, cosine = 0.0, 0.0
    for batch in progress(batches, total=len(batches), describe="comparing with float32"):
        float32, int8 = (network(batch) for network in networks)
        same += float((float32.logits.argmax(dim=1) == int8.logits.argmax(dim=1)).sum())
        cosine += float(torch.cosine_similarity(float32.features, int8.features).sum())
    return {"compared": len(photos), "same_class": same / len(photos), "feature_cosine": cosine / len(photos)}


def _warn(text: str) -> None:
    print(f"warning: {clean_text(text)}", file=sys.stderr)
