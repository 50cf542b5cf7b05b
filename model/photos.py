"""Folders of photos: one sub-folder per class."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.preprocess import Pixels

Item = TypeVar("Item")

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


class PhotoError(ValueError):
    """A folder or a photo in it cannot be used; the message says which and why."""


class Photo(NamedTuple):
    path: Path
    target: int  # index of its class


class Batch(NamedTuple):
    pixels: Tensor  # uint8 [B, 3, H, W]
    targets: Tensor  # int64 [B]


def find_photos(folder: Path, classes: Sequence[str] | None = None) -> tuple[list[str], list[Photo]]:
    """The classes, sorted by folder name or as given, and the photos of `folder/<class>/`, sorted; nothing hidden.

    Raises:
        PhotoError: the folder is missing, holds a class that was not given, or holds no photo.
    """
    if not folder.is_dir():
        raise PhotoError(f"{folder} is not a folder")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes = found if classes is None else list(classes)
    if unknown := set(found) - set(classes):
        raise PhotoError(f"{folder} has a folder {min(unknown)!r} that is no class of the network")
    photos = [
        Photo(path, target)
        for target, name in enumerate(classes)
        for path in sorted((folder / name).glob("*"))
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]
    if not photos:
        raise PhotoError(f"{folder} holds no photos; expected {folder}/<class>/*.jpg")
    return classes, photos


def batches(
    items: Sequence[Item],
    read: Callable[[Item], tuple[Pixels, int]],
    batch_size: int,
    workers: int,
) -> Iterator[Batch]:
    """Items in order, read by threads a few batches ahead (Pillow lets go of the interpreter while it decodes)."""
    chunks = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    with ThreadPoolExecutor(workers, thread_name_prefix="photos") as pool:
        ahead = deque([pool.submit(read, item) for item in chunk] for chunk in chunks[:2])
        for position in range(len(chunks)):
            if position + 2 < len(chunks):
                ahead.append([pool.submit(read, item) for item in chunks[position + 2]])
            read_items = [future.result() for future in ahead.popleft()]
            yield Batch(
                torch.from_numpy(np.stack([pixels for pixels, _ in read_items])),
                torch.tensor([target for _, target in read_items]),
            )


def read_photo(path: Path, convert: Callable[[Image.Image], Pixels]) -> Pixels:
    """The photo's pixels, made by `convert` from the lazily opened file.

    Raises:
        PhotoError: it is missing, damaged or no photo.
    """
    try:
        with Image.open(path) as image:
            return convert(image)
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        raise PhotoError(f"{path} is not a readable photo: {error}") from error
