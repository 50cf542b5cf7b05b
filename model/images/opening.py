"""Opens image files: the one way in, for serving and for training."""

import io
from collections.abc import Callable
from typing import Protocol

from PIL import Image, UnidentifiedImageError

from rednet.model.images import jpeg, png, tiff
from rednet.model.images.errors import DamagedImage, UnsupportedImage
from rednet.model.images.first_frame import note_first_frame
from rednet.model.images.signatures import REMEDY, foreign_format, has_supported_signature

# The only formats that are ever opened, whatever a file is called. Pillow knows many more, and for some of them starts
# other programs: for an EPS file, Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Of 32 MB, a JPEG can make eight million segments, which Pillow reads one after the other in Python.
MAX_READS = 200_000

# Pillow's own limit only warns. `open_photo` takes a check instead, which it calls before pixels are decoded.
Image.MAX_IMAGE_PIXELS = None


class Header(Protocol):
    """What is known of an image before its pixels are decoded: a `PIL.Image.Image`, or a `tiff.Layout`."""

    @property
    def format(self) -> str | None: ...

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...


def accept(header: Header) -> None:
    """Accept every image: for files of one's own."""


def open_photo(data: bytes, check: Callable[[Header], None] = accept) -> Image.Image:
    """Open an encoded photo. Its header has been read; its pixels are read when they are needed.

    Args:
        data: the file.
        check: called before pixels are decoded; may raise.

    Raises:
        UnsupportedImage: it is not an image, or of a format or variant that is not read.
        DamagedImage: the header is damaged.
        OSError, ValueError, SyntaxError and others of Pillow's: the file is damaged.
    """
    if data.startswith(TIFF_STARTS):
        layout = tiff.read_layout(data)
        check(layout)
        if layout.unsupported:
            raise UnsupportedImage(f"{layout.unsupported} is not read; {REMEDY}")
        if not layout.read_by_pillow:
            return tiff.decode(data, layout)
    elif data.startswith(b"\xff\xd8"):
        if variant := jpeg.unsupported_variant(data):
            raise UnsupportedImage(f"{variant} is not read; {REMEDY}")
        data = jpeg.with_end(data)
    elif data.startswith(png.SIGNATURE):
        data = png.without_damaged_chunks(data)
    try:
        image = Image.open(_CountedReads(data), formats=FORMATS)
    except OSError as error:
        raise (_reason(data, error) or error) from None
    try:
        check(image)
    except BaseException:
        image.close()
        raise
    note_first_frame(image, data)
    return image


def _reason(data: bytes, error: OSError) -> UnsupportedImage | DamagedImage | None:
    """Why Pillow did not open a file, if more can be said than its error says."""
    if not isinstance(error, UnidentifiedImageError):
        kind, _, variant = str(error).partition(" ")
        return UnsupportedImage(f"{variant} is not read; {REMEDY}") if kind == "Unsupported" else None
    if data.startswith(TIFF_STARTS):
        return UnsupportedImage(f"{tiff.read_layout(data)} is not read; {REMEDY}")
    if has_supported_signature(data):
        return DamagedImage("the image's header is damaged")
    if name := foreign_format(data):
        return UnsupportedImage(f"this is {name}; {', '.join(FORMATS)} are read: {REMEDY}")
    return UnsupportedImage(f"the data is in no known image format; {', '.join(FORMATS)} are read")


class _CountedReads(io.BytesIO):
    """A file that may be read a limited number of times: each read means that Pillow does something in Python."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise DamagedImage("the image consists of too many parts")
        return super().read(size)
