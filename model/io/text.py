"""Makes text from outside safe to print and log: names of files, folders and classes, and metadata of checkpoints."""

import math
import re
import unicodedata
from typing import Any

# Control characters, which terminals execute and which break log lines; surrogates, which represent bytes that are not
# UTF-8 and cannot be encoded; line and paragraph separators; and characters that reverse the direction of text.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_DEPTH = 20  # nested lists and objects; JSON encoders and viewers fail at some hundreds
MAX_INTEGER = 2**63  # many JSON encoders and parsers fail beyond 64 bits


def clean_text(text: str) -> str:
    """Return text that is safe to print, log, encode and compare: unsafe characters escaped, the rest in NFC.

    macOS decomposes accented letters in file names (NFD), other systems do not. In NFC, equal names are equal text.

    Example:
        >>> clean_text("cafe\\u0301\\x1b[2J")
        'café\\\\x1b[2J'
    """
    return UNSAFE.sub(_escape, unicodedata.normalize("NFC", text))


def clean_json(value: Any, depth: int = 0) -> Any:
    """Return a value as JSON can represent it: all text cleaned, non-finite numbers as null.

    Raises:
        ValueError: it is nested too deeply, or contains an integer of more than 64 bits.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    match value:
        case str():
            return clean_text(value)
        case float():
            return value if math.isfinite(value) else None
        case int() if not -MAX_INTEGER <= value < MAX_INTEGER:
            raise ValueError("it contains an integer of more than 64 bits")
        case list():
            return [clean_json(each, depth + 1) for each in value]
        case dict():
            return {clean_text(str(key)): clean_json(each, depth + 1) for key, each in value.items()}
    return value


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8, as Python's surrogateescape represents it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
