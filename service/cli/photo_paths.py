"""The photos that a command line names: files, folders, and lists on standard input."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from rednet.model.training.dataset import Skipped, find_photos

STANDARD_INPUT = Path("-")


def find_all(paths: Sequence[Path], listing: BinaryIO) -> tuple[list[str], Skipped]:
    """Find all photos that paths name, in their order: folders are searched at any depth, and sorted.

    A path that does not exist is returned, too: reading it reports the error in its place.

    Args:
        paths: files and folders; `-` stands for those in `listing`.
        listing: paths, one a line, or separated by NUL characters as `find -print0` prints them.

    Raises:
        PhotoError: a folder cannot be read.
    """
    found, skipped = list[str](), Skipped()
    for path in paths:
        for each in _listed(listing) if path == STANDARD_INPUT else [path]:
            if each.is_dir():
                photos, left_out = find_photos(each)
                found.extend(map(str, photos))  # a fifth of the memory that a million `Path`s take
                skipped.update(left_out)
            else:
                found.append(str(each))
    return found, skipped


def _listed(listing: BinaryIO) -> list[Path]:
    content = listing.read()
    separator = b"\0" if b"\0" in content else b"\n"
    return [Path(os.fsdecode(line)) for line in content.split(separator) if line]
