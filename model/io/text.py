"""Text from outside: names of files, folders and classes, and whatever a checkpoint says of itself."""

import math
import re
import unicodedata
from typing import Any

# Control characters, which terminals obey and which break lines of a log; surrogates, which stand for bytes that are
# not UTF-8 and cannot be encoded; line and paragraph separators; and what reverses the direction of the text after it.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_DEPTH = 20  # of nested lists and objects; JSON encoders and viewers give up at some hundreds
MAX_INTEGER = 2**63  # encoders of JSON, and its readers, go no further


def clean_text(text: str) -> str:
    """The text as it can be printed, logged, encoded and compared: unsafe characters escaped, the rest in NFC.

    macOS decomposes accented letters in file names (NFD), others do not: after this the same name is the same text.

    >>> clean_text("cafe\\u0301\\x1b[2J")
    'café\\\\x1b[2J'
    """
    return UNSAFE.sub(_escape, unicodedata.normalize("NFC", text))


def clean_json(value: Any, depth: int = 0) -> Any:
    """A value that JSON can hold, with every text in it cleaned; numbers that are not finite become null.

    Raises:
        ValueError: it is nested too deeply, or holds an integer that few readers of JSON can take.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    match value:
        case str():
            return clean_text(value)
        case float():
            return value if math.isfinite(value) else None
        case int() if not -MAX_INTEGER <= value < MAX_INTEGER:
            raise ValueError("it holds an integer of more than 64 bits")
        case list():
            return [clean_json(each, depth + 1) for each in value]
        case dict():
            return {clean_text(str(key)): clean_json(each, depth + 1) for key, each in value.items()}
    return value


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8, as Python's surrogateescape holds it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
