"""Makes arbitrary text safe to print. Imports nothing slow."""

import os


def printable(value: object) -> str:
    """Escape control characters, which a terminal would obey, and bytes of file names that are not UTF-8.

    >>> printable("a\\x1b[2J\\udcff")
    'a\\\\x1b[2J\\\\xff'
    """
    if isinstance(value, OSError) and value.filename is not None:
        value = f"{os.fsdecode(value.filename)}: {value.strerror}"
    return "".join(each if each.isprintable() else _escaped(each) for each in str(value))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: a byte that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
