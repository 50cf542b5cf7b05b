"""Reads and checks API keys."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

MIN_KEY_CHARS = 16  # if they are random, too many to be guessed
NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63}):(.*)")
UNNAMED = "unnamed"  # the name of keys without one


class KeyFileError(ValueError):
    """The key file cannot be used. The message names the line, but never quotes it."""


class KeyFile:
    """The API keys in a file: one per line, as `key` or `name:key`. Empty lines, and lines that begin with #, are
    ignored.

    A name may have several keys, so that a key can be replaced while both are valid. Only digests of the keys are kept
    in memory.

    Args:
        path: of the file.

    Raises:
        KeyFileError: the file cannot be read or has no keys, a key is too short or not allowed in a header, or a key
            has two names.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names = _read(path)

    def __len__(self) -> int:
        return len(self._names)

    def __str__(self) -> str:
        """For the log: how many keys there are, and where."""
        return f"{len(self)} API key{'' if len(self) == 1 else 's'} in {self.path}"

    def reload(self) -> None:
        """Read the file again. If that raises `KeyFileError`, the keys stay as they are."""
        self._names = _read(self.path)

    def name_of(self, key: str) -> str | None:
        """The name of a key; None: it is not valid."""
        return self._names.get(_digest(key))


def _read(path: Path) -> Mapping[bytes, str]:
    """The names of the keys in a file, by digest."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise KeyFileError(f"the API keys in {path} cannot be read: {error.strerror}") from None
    names: dict[bytes, str] = {}
    for number, line in enumerate(lines, start=1):
        text = line.decode("latin-1").strip()
        if not text or text.startswith("#"):
            continue
        named = NAMED.fullmatch(text)
        name, key = (named[1], named[2].lstrip()) if named else (UNNAMED, text)
        if not re.fullmatch(r"[!-~]+", key):
            raise KeyFileError(f"{path}, line {number}: an API key must consist of printable ASCII without spaces")
        if len(key) < MIN_KEY_CHARS:
            raise KeyFileError(f"{path}, line {number}: an API key must have at least {MIN_KEY_CHARS} characters")
        if names.setdefault(_digest(key), name) != name:
            raise KeyFileError(f"{path}, line {number}: another line has this API key under another name")
    if not names:
        raise KeyFileError(f"{path} contains no API key")
    return names


def _digest(key: str) -> bytes:
    """A key's digest, so that the time of a look-up reveals nothing about the keys."""
    return hashlib.sha256(key.encode()).digest()
