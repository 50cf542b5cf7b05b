"""Handles what Pillow does not report about JPEG files: missing end markers and unsupported variants."""

END = b"\xff\xd9"
# Start-of-frame markers of unsupported coding processes (ITU-T T.81, table B.1).
LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
HIERARCHICAL = {0xC5, 0xC6, 0xCD, 0xCE}
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
MAX_SEGMENTS = 1000  # in front of the frame header


def with_end(data: bytes) -> bytes:
    """Return the file with eight bytes appended if its end marker is missing.

    The decoder waits for 57 bits before it decodes the next symbol. Eight more bytes let it finish a file that lacks
    only the marker; a file that was truncated earlier still lacks data and is refused. (With an end marker instead, the
    decoder would silently fill the missing part of a photo with grey.)
    """
    return data if data.endswith(END) else data + bytes(8)


def unsupported_variant(data: bytes) -> str | None:
    """Return the name of the file's variant if it is not supported."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] == b"\xff":  # fill bytes
            at += 1
        if data[at : at + 1] != b"\xff" or len(data) < at + 5:
            return None
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in FRAMES:
            if marker in LOSSLESS:
                return "lossless JPEG"
            if marker in HIERARCHICAL:
                return "hierarchical JPEG"
            return f"JPEG with {data[at + 4]} bits per sample" if data[at + 4] != 8 else None
        at += 2 + length
    return None
