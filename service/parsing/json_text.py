"""Parses the JSON of a request at a bounded cost."""

import json
from collections.abc import Sequence
from typing import Any

import orjson

from rednet.service.errors import MalformedRequest

# Lists and objects take longest to create: 200 kB of `[[]],` would block the event loop for 18 ms. Rows of pixels are
# longer than BYTES_PER_LIST, and nothing else in a request needs many lists.
FREE_LISTS, BYTES_PER_LIST = 10_000, 32


def load_json(text: bytes, unique: Sequence[bytes] = ()) -> Any:
    """Parse JSON text.

    Args:
        text: in UTF-8, with or without a byte order mark, UTF-16 or UTF-32.
        unique: quoted names of fields that must not occur twice in one object: the parser would keep only the last one.

    Raises:
        MalformedRequest: the text is not JSON, repeats one of these fields, or has too many lists.
    """
    encoding = json.detect_encoding(text)
    if encoding != "utf-8":
        text = _to_utf8(text, encoding)
    lists, allowed = text.count(b"[") + text.count(b"{"), FREE_LISTS + len(text) // BYTES_PER_LIST
    if lists > allowed:
        raise MalformedRequest(f"the request's JSON has {lists} lists and objects; at most {allowed} are allowed")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the request's JSON cannot be read: {error}") from None
    for name in unique:
        first = text.find(name)
        if text.find(name, first + 1) > first:  # rare: one of the two may be a value, or in a nested object
            _check_unique(text, name)
    return value


def _to_utf8(text: bytes, encoding: str) -> bytes:
    try:
        return text.decode(encoding).encode()
    except UnicodeError:
        raise MalformedRequest(f"the request's JSON cannot be read: it is not {encoding}") from None


def _check_unique(text: bytes, quoted: bytes) -> None:
    name = quoted.decode().strip('"')

    def check(pairs: list[tuple[str, Any]]) -> None:
        if sum(key == name for key, _ in pairs) > 1:
            raise MalformedRequest(f"the request's JSON has the field {name!r} twice in one object")

    try:
        json.loads(text, object_pairs_hook=check)
    except RecursionError:
        raise MalformedRequest("the request's JSON is nested too deeply") from None
