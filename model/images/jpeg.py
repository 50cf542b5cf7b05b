"""What Pillow does not say about a JPEG file: a missing end marker, and why a variant is not read."""

END = b"\xff\xd9"
# Start-of-frame markers of processes that are not read (ITU-T T.81, table B.1).
LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
HIERARCHICAL = {0xC5, 0xC6, 0xCD, 0xCE}
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
MAX_SEGMENTS = 1000


def with_end(data: bytes) -> bytes:
    """Return the file with eight bytes after it where its end marker is missing.

    The decoder wants 57 bits before it decodes the next symbol, and waits for them: with eight more bytes it finishes a
    file from which only the marker was cut off. A file that was cut off earlier still lacks data, and is refused. (An
    end marker instead would make the decoder fill a truncated photo with grey, in silence.)
    """
    return data if data.endswith(END) else data + bytes(8)


def unsupported_variant(data: bytes) -> str | None:
    """Return the name of a file's variant, if it is one that is not read."""
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
