"""Folders of photos: which files in them are photos, which class they belong to, and what is left out.

Nothing is left out without a word: `left_out` says what and where.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rednet.model.images.signatures import claims
from rednet.model.io.text import clean_text
from rednet.model.training.loader import Photo, PhotoError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}  # believed, so that no file is opened
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}  # which Windows and macOS put into any folder
MAX_NAMED = 8  # folders without photos that a message lists


class LeftOut:
    """Counts files that are no photos, or lie where none are looked for."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, Path] = {}
        self.empty: list[str] = []  # class folders without photos

    def add(self, what: str, path: Path) -> None:
        self._counts[what] += 1
        self._first.setdefault(what, path)

    def lines(self) -> list[str]:
        """What is left out, for people."""
        lines = [
            f"left out: {count} {what}, the first is {clean_text(str(self._first[what]))}"
            for what, count in sorted(self._counts.items())
        ]
        if self.empty:
            more = f" and {len(self.empty) - MAX_NAMED} more" if len(self.empty) > MAX_NAMED else ""
            lines.append(f"left out: folders without photos: {', '.join(self.empty[:MAX_NAMED])}{more}")
        return lines


class Folder(NamedTuple):
    """A folder of class folders."""

    classes: list[str]
    photos: list[Photo]  # class by class
    left_out: LeftOut


def read_folder(folder: Path, classes: Sequence[str] | None = None) -> Folder:
    """The photos of `folder/<class>/`, sorted by name within each class; nothing hidden.

    Names are compared as `clean_text` makes them, so that a name in NFC and in NFD is one class. A folder without
    photos is no class.

    Args:
        folder: the folder.
        classes: the classes in the order of the network, where it has one; None: those found, sorted.

    Raises:
        PhotoError: the folder cannot be read, holds no photo, or a class folder that is none of the classes.
    """
    if not folder.is_dir():
        raise PhotoError(f"{folder} is not a folder")
    left_out, found = LeftOut(), dict[str, list[Path]]()
    for entry in _entries(folder):
        name, path = clean_text(entry.name), Path(entry.path)
        if not _is_folder(entry):
            left_out.add("files beside the class folders", path)
        elif paths := _photos_in(path, left_out):
            found.setdefault(name, []).extend(paths)
        else:
            left_out.empty.append(name)
    if not found:
        hint = "".join(f"; {line}" for line in left_out.lines())
        raise PhotoError(f"{folder} holds no photos; expected {folder}/<class>/*.jpg{hint}")
    _refuse_case_variants(folder, [*(classes or ()), *found])
    classes = sorted(found) if classes is None else list(classes)
    targets = {name: target for target, name in enumerate(classes)}
    for name in sorted(found):
        if name not in targets:
            raise PhotoError(f"{folder} has a folder {name!r} that is no class of the network")
        if classes.count(name) > 1:
            raise PhotoError(f"{folder} has a folder {name!r}, and the network several classes of this id")
    photos = [Photo(path, targets[name]) for name in sorted(found, key=targets.__getitem__) for path in found[name]]
    return Folder(classes, photos, left_out)


def all_photos(folder: Path) -> tuple[list[Path], LeftOut]:
    """Every photo below a folder, at any depth, sorted; nothing hidden. Links to folders are followed once.

    Raises:
        PhotoError: the folder cannot be read.
    """
    if not folder.is_dir():
        raise PhotoError(f"{folder} is not a folder")
    left_out, found, seen, waiting = LeftOut(), list[Path](), set[str](), [folder]
    while waiting:
        place = waiting.pop()
        if (real := os.path.realpath(place)) in seen:
            continue
        seen.add(real)
        for entry in _entries(place):
            path = Path(entry.path)
            if _is_folder(entry):
                waiting.append(path)
            elif _is_photo(entry, path):
                found.append(path)
            else:
                left_out.add(_kind(path), path)
    return sorted(found), left_out


def _photos_in(folder: Path, left_out: LeftOut) -> list[Path]:
    found = []
    for entry in _entries(folder):
        path = Path(entry.path)
        if _is_folder(entry):
            deeper, _ = all_photos(path)
            for each in deeper:
                left_out.add("photos deeper than in class folders", each)
        elif _is_photo(entry, path):
            found.append(path)
        else:
            left_out.add(_kind(path), path)
    return found


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What is in a folder, sorted by name, without what is hidden and what systems put there."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise PhotoError(f"{folder} cannot be read: {error.strerror or error}") from error
    return (entry for entry in listed if not entry.name.startswith(".") and entry.name.lower() not in SYSTEM_FILES)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be read
        return False


def _is_photo(entry: os.DirEntry[str], path: Path) -> bool:
    """By its name, or by how the file begins. What is no regular file, a pipe, say, is not opened."""
    known = path.suffix.lower() in SUFFIXES
    try:
        regular = entry.is_file()
    except OSError:  # a link to itself
        regular = False
    if known or not regular:
        return known and (regular or entry.is_symlink())  # a broken link is a missing photo, which reading it names
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise PhotoError(f"{path} cannot be read: {error.strerror or error}") from error
    return claims(start)


def _kind(path: Path) -> str:
    suffix = clean_text(path.suffix.lower())
    return f"{suffix} files" if suffix else "files without an extension that are not images"


def _refuse_case_variants(folder: Path, names: Sequence[str]) -> None:
    """Cat and cat are one folder on some systems and two on others."""
    by_fold: dict[str, str] = {}
    for name in names:
        other = by_fold.setdefault(name.casefold(), name)
        if other != name:
            raise PhotoError(
                f"{folder} and the classes have {other!r} and {name!r}, which differ only in case; rename one"
            )
