"""Loads photos in batches, with read-ahead in threads."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rednet.model.images.errors import UNDECODED, DamagedImage, UnsupportedImage
from rednet.model.images.opening import open_photo
from rednet.model.images.preprocess import Pixels
from rednet.model.training.progress import progress

Item = TypeVar("Item")

MAX_DECODED = 20_000  # photos that `check_photos` decodes; more would delay the first step by minutes
MAX_LISTED = 8  # unreadable photos that a message lists


class PhotoError(ValueError):
    """A folder or photo cannot be used. The message names it and the reason."""


class Photo(NamedTuple):
    path: Path
    target: int  # index of its class


class Batch(NamedTuple):
    pixels: Tensor  # uint8 [B, 3, H, W]
    targets: Tensor  # int64 [B]


def load_batches(
    items: Sequence[Item],
    read: Callable[[Item], tuple[Pixels, int]],
    batch_size: int,
    workers: int,
) -> Iterator[Batch]:
    """Yield items in order, in batches that threads read ahead of time. (Pillow releases the GIL while it decodes.)"""
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
    """Open a photo lazily and return what `convert` makes of it.

    Raises:
        PhotoError: the file is missing, damaged, or in an unsupported format.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PhotoError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        with open_photo(data) as image:
            return convert(image)
    except MemoryError as error:
        raise PhotoError(f"{path} needs more memory than there is") from error
    except Exception as error:  # Pillow can raise anything for a damaged file
        reason = error if isinstance(error, UnsupportedImage | DamagedImage) else UNDECODED
        raise PhotoError(f"{path} is not a readable photo: {reason}") from error


def check_photos(photos: Sequence[Photo], workers: int = 2) -> None:
    """Read every photo once, so that damaged files are reported before training and not during it.

    Up to `MAX_DECODED` photos are decoded, JPEGs at an eighth of their size, which reads all of their data (0.3 ms each
    for photos of 160 pixels). In larger sets only the headers are read, in 0.06 ms each: a minute for a million.

    Raises:
        PhotoError: some photos cannot be read. The message names the first ones.
    """
    decode = len(photos) <= MAX_DECODED
    chunks = [photos[start : start + 256] for start in range(0, len(photos), 256)]

    def read(image: Image.Image) -> Pixels:
        if decode:
            image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
        return np.empty((3, 0, 0), np.uint8)

    def problems(chunk: Sequence[Photo]) -> list[PhotoError]:
        found = []
        for photo in chunk:
            try:
                read_photo(photo.path, read)
            except PhotoError as error:
                found.append(error)
        return found

    with ThreadPoolExecutor(workers, thread_name_prefix="photos") as pool:
        results = progress(pool.map(problems, chunks), total=len(chunks), describe="checking photos (256 each)")
        bad = [problem for chunk in results for problem in chunk]
    if bad:
        more = f"; and {len(bad) - MAX_LISTED} more" if len(bad) > MAX_LISTED else ""
        raise PhotoError("; ".join(map(str, bad[:MAX_LISTED])) + more)
