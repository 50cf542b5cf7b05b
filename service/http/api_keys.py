"""API keys: who may ask."""

import hashlib
import hmac
import re
from collections.abc import Sequence
from pathlib import Path

SHORTEST = 16  # characters; of random ones, more than anybody can try


class KeyFileError(ValueError):
    """The file of keys cannot be used. The message names the line, never what it says."""


class Keys:
    """A set of keys, of which only digests are kept.

    Args:
        keys: at least one.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def accept(self, key: str) -> bool:
        """Whether it is one of them; how long that takes tells nothing about them."""
        given = _digest(key)
        return any([hmac.compare_digest(given, digest) for digest in self._digests])  # noqa: C419  (all are compared)


def read_keys(path: Path) -> Keys:
    """The keys of a file: one a line; empty lines and those that begin with # are passed over.

    Raises:
        KeyFileError: it cannot be read or has no keys, or one that is too short or unfit for a header.
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
            raise KeyFileError(f"{path}, line {number}: an API key has printable ASCII characters only, and no spaces")
        if len(key) < SHORTEST:
            raise KeyFileError(f"{path}, line {number}: an API key has at least {SHORTEST} characters")
        keys.append(key)
    if not keys:
        raise KeyFileError(f"{path} holds no API key")
    return Keys(keys)


def _digest(key: str) -> bytes:
    """Of one length whatever the key's: comparing it does not tell that either."""
    return hashlib.sha256(key.encode()).digest()
