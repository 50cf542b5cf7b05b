"""Folders of photos: finds the photos and their classes.

Every file that is skipped is counted in `Skipped`, so that commands can report it.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rednet.model.images.iso_media import MAX_HEAD_BYTES, enabled_formats
from rednet.model.images.signatures import has_supported_signature
from rednet.model.io.text import clean_text
from rednet.model.training.loader import Photo, PhotoError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}  # trusted, which saves opening files
MEDIA_SUFFIXES = {".avif": "AVIF", ".heic": "HEIC", ".heif": "HEIC"}  # trusted where their format can be decoded
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}  # of Windows and macOS, in any folder
MAX_LISTED = 8  # folders or classes that a message lists


class Skipped:
    """Counts files that are not photos, or are not where photos are expected."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, Path] = {}
        self.empty: list[str] = []  # class folders without photos

    def add(self, what: str, path: Path) -> None:
        self._counts[what] += 1
        self._first.setdefault(what, path)

    def update(self, other: "Skipped") -> None:
        """Add what another one has counted."""
        self._counts.update(other._counts)
        self._first = other._first | self._first
        self.empty += other.empty

    def lines(self) -> list[str]:
        """Return one line per kind of file, for people."""
        lines = [
            f"skipped: {count} {what}, the first is {clean_text(str(self._first[what]))}"
            for what, count in sorted(self._counts.items())
        ]
        if self.empty:
            more = f" and {len(self.empty) - MAX_LISTED} more" if len(self.empty) > MAX_LISTED else ""
            lines.append(f"skipped: folders without photos: {', '.join(self.empty[:MAX_LISTED])}{more}")
        return lines


class Folder(NamedTuple):
    """The content of a folder of class folders."""

    classes: list[str]
    photos: list[Photo]  # sorted by class
    skipped: Skipped


def read_folder(folder: Path, classes: Sequence[str] | None = None) -> Folder:
    """Find the photos `folder/<class>/*`, sorted by name within each class, without hidden files.

    Folder names pass through `clean_text`, so that the NFC and the NFD form of a name are one class. A folder without
    photos is not a class.

    Args:
        folder: a folder of class folders.
        classes: class ids in the order of a network's logits; None: those found, sorted.

    Raises:
        PhotoError: the folder cannot be read, has no photos, or has a class folder that is not in `classes`.
    """
    _check_is_folder(folder, f"; expected {folder}/<class>/*.jpg")
    skipped, found = Skipped(), dict[str, list[Path]]()
    for entry in _entries(folder):
        name, path = clean_text(entry.name), Path(entry.path)
        if not _is_folder(entry):
            skipped.add("files outside class folders", path)
        elif paths := _photos_in(path, skipped):
            found.setdefault(name, []).extend(paths)
        else:
            skipped.empty.append(name)
    if not found:
        hint = "".join(f"; {line}" for line in skipped.lines())
        raise PhotoError(f"{folder} has no photos; expected {folder}/<class>/*.jpg{hint}")
    _refuse_case_variants(folder, [*(classes or ()), *found])
    classes = sorted(found) if classes is None else list(classes)
    targets = {name: target for target, name in enumerate(classes)}
    for name in sorted(found):
        if name not in targets:
            ids = ", ".join(classes[:MAX_LISTED]) + (", ..." if len(classes) > MAX_LISTED else "")
            raise PhotoError(f"{folder} has a folder {name!r}, which is not the id of a class of this network: {ids}")
        if classes.count(name) > 1:
            raise PhotoError(f"{folder} has a folder {name!r}, and the network has several classes with this id")
    photos = [Photo(path, targets[name]) for name in sorted(found, key=targets.__getitem__) for path in found[name]]
    return Folder(classes, photos, skipped)


def _check_is_folder(folder: Path, hint: str = "") -> None:
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise PhotoError(f"{folder} {problem}{hint}")


def find_photos(folder: Path) -> tuple[list[Path], Skipped]:
    """Find all photos below a folder, at any depth, sorted, without hidden files.

    Links to folders are followed, and no folder is read twice, so loops end.

    Raises:
        PhotoError: the folder cannot be read.
    """
    _check_is_folder(folder)
    skipped, found, seen, pending = Skipped(), list[Path](), set[str](), [folder]
    while pending:
        current = pending.pop()
        if (real := os.path.realpath(current)) in seen:
            continue
        seen.add(real)
        for entry in _entries(current):
            path = Path(entry.path)
            if _is_folder(entry):
                pending.append(path)
            elif _is_photo(entry, path):
                found.append(path)
            else:
                skipped.add(_kind(path), path)
    return sorted(found), skipped


def _photos_in(folder: Path, skipped: Skipped) -> list[Path]:
    found = []
    for entry in _entries(folder):
        path = Path(entry.path)
        if _is_folder(entry):
            deeper, _ = find_photos(path)
            for each in deeper:
                skipped.add("photos in subfolders of class folders", each)
        elif _is_photo(entry, path):
            found.append(path)
        else:
            skipped.add(_kind(path), path)
    return found


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name, without hidden and system files."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise PhotoError(f"{folder} cannot be read: {error.strerror or error}") from error
    return (entry for entry in listed if not entry.name.startswith(".") and entry.name.lower() not in SYSTEM_FILES)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link that leads to itself, or into a folder without read permission
        return False


def _is_photo(entry: os.DirEntry[str], path: Path) -> bool:
    """Decide by the file's name, else by its first bytes. Only regular files are opened: a pipe would block."""
    suffix = path.suffix.lower()
    known = suffix in SUFFIXES or MEDIA_SUFFIXES.get(suffix) in enabled_formats()
    try:
        regular = entry.is_file()
    except OSError:  # a symbolic link that leads to itself
        regular = False
    if known or not regular:
        return known and (regular or entry.is_symlink())  # a broken link counts as a photo: reading it reports the name
    try:
        with path.open("rb") as file:
            start = file.read(MAX_HEAD_BYTES)
    except OSError as error:
        raise PhotoError(f"{path} cannot be read: {error.strerror or error}") from error
    return has_supported_signature(start)


def _kind(path: Path) -> str:
    suffix = clean_text(path.suffix.lower())
    return f"{suffix} files" if suffix else "files without an extension that are not images"


def _refuse_case_variants(folder: Path, names: Sequence[str]) -> None:
    """Refuse names like Cat and cat, which are one folder on some systems and two on others."""
    by_fold: dict[str, str] = {}
    for name in names:
        other = by_fold.setdefault(name.casefold(), name)
        if other != name:
            raise PhotoError(
                f"{folder} and the class names contain {other!r} and {name!r}, which differ only in case; rename one"
            )
