"""Finds the part of the canvas that an animation's first frame covers; the rest of the canvas is empty."""

from PIL import ImageFile

KEY = "first_frame"  # in `Image.info`: left, top, right, bottom, unless the frame covers the whole canvas
Box = tuple[int, int, int, int]


def note_first_frame(image: ImageFile.ImageFile, data: bytes) -> None:
    """Store the box of the first frame in `image.info` if it is smaller than the canvas."""
    box = None
    if image.format == "GIF" and image.tile:
        box = image.tile[0].extents
    elif image.format == "WEBP":
        box = _webp_frame(data)
    if box is not None and box != (0, 0, *image.size):
        image.info[KEY] = box


def _webp_frame(data: bytes) -> Box | None:
    """Return the box of the first animation frame (WebP container specification, chunk ANMF)."""
    at = 12
    while (kind := data[at : at + 4]) in (b"VP8X", b"ANIM", b"ICCP"):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + length + length % 2
    if kind != b"ANMF":
        return None
    left, top, width, height = (int.from_bytes(data[at + 8 + n : at + 11 + n], "little") for n in (0, 3, 6, 9))
    return 2 * left, 2 * top, 2 * left + width + 1, 2 * top + height + 1
