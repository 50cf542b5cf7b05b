"""Text for a terminal or a pipe, from names and messages of any characters. Imports nothing that takes time."""

import os


def printable(value: object) -> str:
    """Text with everything escaped that a terminal would obey, or that is not UTF-8 in the name of a file.

    >>> printable("a\\x1b[2J\\udcff")
    'a\\\\x1b[2J\\\\xff'
    """
    if isinstance(value, OSError) and value.filename is not None:
        value = f"{os.fsdecode(value.filename)}: {value.strerror}"
    return "".join(each if each.isprintable() else _escaped(each) for each in str(value))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python holds it in names of files
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
