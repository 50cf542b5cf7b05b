"""Checks the checksums of a PNG file's chunks (PNG, third edition, section 5)."""

import zlib

from rednet.model.images.errors import DamagedImage

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 100_000
# Ancillary chunks that change the pixels; without them the prediction would be wrong.
REQUIRED_CHUNKS = {b"tRNS", b"eXIf"}


def without_damaged_chunks(data: bytes) -> bytes:
    """Return the file without ancillary chunks whose checksum is wrong. Pillow would refuse the whole file.

    Pillow does not verify the checksums of image data, so this function does.

    Raises:
        DamagedImage: a chunk that affects the pixels has a wrong checksum, or there are too many chunks.
    """
    at, bad = len(SIGNATURE), []
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(data):
            break
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            break  # truncated: Pillow raises, or has all that it needs
        checksum = zlib.crc32(memoryview(data)[at + 4 : end - 4])
        if checksum != int.from_bytes(data[end - 4 : end], "big"):
            if not kind[:1].islower() or kind in REQUIRED_CHUNKS:  # a capital letter: critical
                raise DamagedImage(f"the image is damaged: a PNG chunk {kind.decode('latin-1')!r} has a wrong checksum")
            bad.append((at, end))
        at = end
        if kind == b"IEND":
            break
    else:
        raise DamagedImage(f"the image consists of too many parts: more than {MAX_CHUNKS} PNG chunks")
    for start, end in reversed(bad):
        data = data[:start] + data[end:]
    return data
