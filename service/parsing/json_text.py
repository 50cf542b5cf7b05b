"""JSON of a request to Python values, at a bounded cost."""

import json
from collections.abc import Sequence
from typing import Any

import orjson

from rednet.service.errors import MalformedRequest

# Lists and objects are what takes longest to make: for 200 kB of `[[]],` the event loop would stop for 18 ms. Rows of
# pixels are longer than this, and nothing else in a request needs many.
FREE_LISTS, BYTES_PER_LIST = 10_000, 32


def load_json(text: bytes, unique: Sequence[bytes] = ()) -> Any:
    """The value that JSON text stands for.

    Args:
        text: in UTF-8, with or without a byte order mark, UTF-16 or UTF-32.
        unique: names of fields, in quotes, that no object may have twice. The parser drops all but the last one.

    Raises:
        MalformedRequest: it is not JSON, has one of these fields twice, or has too many lists.
    """
    encoding = json.detect_encoding(text)
    if encoding != "utf-8":
        text = _recoded(text, encoding)
    if text.count(b"[") + text.count(b"{") > FREE_LISTS + len(text) // BYTES_PER_LIST:
        raise MalformedRequest("the request's JSON has more lists than images need")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the request's JSON cannot be read: {error}") from None
    for name in unique:
        first = text.find(name)
        if text.find(name, first + 1) > first:  # rare: one of the two may be a value, or in an object inside
            _check_unique(text, name)
    return value


def _recoded(text: bytes, encoding: str) -> bytes:
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
