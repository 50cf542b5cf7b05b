"""Opens image files, for serving and for training."""

import io
from collections.abc import Callable, Sequence
from typing import Protocol

from PIL import Image, UnidentifiedImageError

from rednet.model.images import iso_media, jpeg, png, tiff
from rednet.model.images.errors import UNOPENED, DamagedImage, UnsupportedImage
from rednet.model.images.first_frame import note_first_frame
from rednet.model.images.signatures import REMEDY, foreign_format, has_supported_signature

# The only formats that are opened, whatever the file's name, with those of `iso_media`. Pillow supports many more, and
# for some of them it starts other programs, such as Ghostscript for EPS.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Pillow reads the segments of a JPEG one by one in Python, and 32 MB have room for eight million of them.
MAX_READS = 200_000

# Pillow's own limit only warns. `open_photo` instead calls a check before pixels are decoded.
Image.MAX_IMAGE_PIXELS = None


class Header(Protocol):
    """An image whose pixels are not decoded yet: a `PIL.Image.Image` or a `tiff.Layout`."""

    @property
    def format(self) -> str | None: ...

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...


def accept(header: Header) -> None:
    """Accept every image; the check for trusted files."""


def open_photo(data: bytes, check: Callable[[Header], None] = accept) -> Image.Image:
    """Open an encoded photo and read its header. The pixels are decoded when they are needed.

    Args:
        data: the content of the file.
        check: called with the header before pixels are decoded; may raise.

    Raises:
        UnsupportedImage: it is not an image, or its format or variant is not supported.
        DamagedImage: the header is damaged.
        OSError, ValueError, SyntaxError and others of Pillow's: the file is damaged.
    """
    formats = FORMATS
    if data.startswith(TIFF_STARTS):
        layout = tiff.read_layout(data)
        check(layout)
        if layout.unsupported:
            raise UnsupportedImage(f"{layout.unsupported} is not supported; {REMEDY}")
        if not layout.read_by_pillow:
            return tiff.decode(data, layout)
    elif data.startswith(b"\xff\xd8"):
        if variant := jpeg.unsupported_variant(data):
            raise UnsupportedImage(f"{variant} is not supported; {REMEDY}")
        data = jpeg.with_end(data)
    elif data.startswith(png.SIGNATURE):
        data = png.without_damaged_chunks(data)
    elif decoders := iso_media.decoders_of(iso_media.media_format(data) or ""):
        formats = _loaded(decoders)
    try:
        image = Image.open(_CountedReads(data), formats=formats)
    except OSError as error:
        raise (_reason(data, error) or error) from None
    try:
        check(image)
    except BaseException:
        image.close()
        raise
    note_first_frame(image, data)
    return image


def _loaded(decoders: Sequence[str]) -> tuple[str, ...]:
    """Load decoders of `iso_media`; returns Pillow's names of their formats.

    Raises:
        UnsupportedImage: none of them is installed.
    """
    enabled = [name for name in decoders if name in iso_media.enabled_formats()]
    if not enabled:
        name = decoders[-1]
        raise UnsupportedImage(f"{name} is not enabled: {iso_media.DECODERS[name].remedy}, or {REMEDY}")
    return tuple(iso_media.load_decoder(name) for name in enabled)


def _reason(data: bytes, error: OSError) -> UnsupportedImage | DamagedImage | None:
    """Return a more specific error than the one that Pillow raised for a file, or None."""
    if not isinstance(error, UnidentifiedImageError):
        kind, _, variant = str(error).partition(" ")
        return UnsupportedImage(f"{variant} is not supported; {REMEDY}") if kind == "Unsupported" else None
    if data.startswith(TIFF_STARTS):
        return UnsupportedImage(f"{tiff.read_layout(data)} is not supported; {REMEDY}")
    if has_supported_signature(data):
        return DamagedImage(UNOPENED)
    if name := foreign_format(data):
        return UnsupportedImage(f"this is {name}; {_supported()} are supported: {REMEDY}")
    return UnsupportedImage(f"the data is in no known image format; {_supported()} are supported")


def _supported() -> str:
    return ", ".join((*FORMATS, *iso_media.enabled_formats()))


class _CountedReads(io.BytesIO):
    """A file with a limited number of reads, because each of them costs Pillow time in Python."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise DamagedImage(f"the image consists of too many parts: more than {MAX_READS} reads")
        return super().read(size)
