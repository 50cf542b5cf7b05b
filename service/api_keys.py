"""Reads and checks API keys."""

import hashlib
import hmac
import re
from collections.abc import Sequence
from pathlib import Path

MIN_KEY_CHARS = 16  # if they are random, too many to be guessed


class KeyFileError(ValueError):
    """The key file cannot be used. The message names the line, but never quotes it."""


class Keys:
    """A set of API keys. Only their digests are kept in memory.

    Args:
        keys: at least one.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def accept(self, key: str) -> bool:
        """Whether the key is valid. Takes the same time for all keys, so that timing reveals nothing."""
        given = _digest(key)
        return any([hmac.compare_digest(given, digest) for digest in self._digests])  # noqa: C419  (compares all)


def read_keys(path: Path) -> Keys:
    """Read a file with one key per line. Empty lines and lines that begin with # are ignored.

    Raises:
        KeyFileError: the file cannot be read or has no keys, or a key is too short or not allowed in a header.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise KeyFileError(f"the API keys in {path} cannot be read: {error.strerror}") from None
    keys = []
    for number, line in enumerate(lines, start=1):
        key = line.decode("latin-1").strip()
        if not key or key.startswith("#"):
            continue
        if not re.fullmatch(r"[!-~]+", key):
            raise KeyFileError(f"{path}, line {number}: an API key must consist of printable ASCII without spaces")
        if len(key) < MIN_KEY_CHARS:
            raise KeyFileError(f"{path}, line {number}: an API key must have at least {MIN_KEY_CHARS} characters")
        keys.append(key)
    if not keys:
        raise KeyFileError(f"{path} contains no API key")
    return Keys(keys)


def _digest(key: str) -> bytes:
    """A digest has the same length for all keys, so that comparing digests does not reveal the length of a key."""
    return hashlib.sha256(key.encode()).digest()
