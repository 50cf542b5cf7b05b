"""Reads the sample layout of TIFF files (TIFF 6.0), and the pixels of layouts that Pillow misreads.

Pillow chooses among about a hundred layouts by some of the tags, and misreads others as one of these: 16-bit samples in
separate planes, white as zero in 16 bits, signed and 32-bit samples. So this module reads the tags first.
"""

import io
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rednet.model.images.errors import UNDECODED, UNOPENED, DamagedImage, UnsupportedImage
from rednet.model.images.signatures import REMEDY

MAX_TAGS = 512
ORIENTATION = 274  # tag
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # SampleFormat
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2  # PhotometricInterpretation
LAB = {8: "CIE Lab", 9: "ICC Lab", 10: "ITU Lab"}  # Pillow's conversion to RGB is up to 45 of 255 off
CONTIGUOUS, SEPARATE = 1, 2  # PlanarConfiguration
ASSOCIATED, UNASSOCIATED = 1, 2  # ExtraSamples: alpha, multiplied into the colours or not
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4, 13: 4, 16: 8, 17: 8, 18: 8}  # bytes of integer field types
YCBCR = 6
UNCOMPRESSED = 1
# What Pillow's libtiff is built for: CCITT, LZW, JPEG, Deflate, PackBits, LZMA, Zstandard.
COMPRESSIONS = {UNCOMPRESSED, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32946, 34925, 50000}
COMPRESSION_NAMES = {32809: "ThunderScan", 33003: "JPEG 2000", 34712: "JPEG 2000", 34887: "LERC", 50001: "WebP"}
SAMPLE_FORMATS = {SIGNED: "signed ", FLOAT: "floating-point "}


@dataclass(frozen=True)
class Layout:
    """How a TIFF file's first image stores its samples."""

    width: int
    height: int
    bits: tuple[int, ...]  # per sample
    photometric: int
    samples: int
    planar: int
    sample_format: int
    extra: tuple[int, ...]
    orientation: int
    compression: int
    thumbnail: bool  # the first image is a smaller version of another one
    big_endian_bigtiff: bool

    format = "TIFF"

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    @property
    def bytes_per_pixel(self) -> int:
        """Memory that `decode` takes: the samples, one row of them as floats, and two copies of the resulting RGB."""
        return self.samples * max(self.bits) // 8 + 8

    @property
    def read_by_pillow(self) -> bool:
        """Whether Pillow decodes this layout correctly. The tests compare it with tifffile."""
        if self.big_endian_bigtiff or self.sample_format != UNSIGNED or len(set(self.bits)) != 1:
            return False
        if self.photometric in LAB:
            return False
        bits, planar = self.bits[0], self.planar == SEPARATE and self.samples > 1
        if bits <= 8:
            if planar:
                return bits == 8 and self.photometric == RGB and (self.samples == 3 or self.extra == (UNASSOCIATED,))
            return not (self.photometric == WHITE_IS_ZERO and self.samples > 1)
        grey = self.photometric == BLACK_IS_ZERO and self.samples == 1
        return bits == 16 and not planar and (grey or (self.photometric == RGB and self.samples in (3, 4)))

    @property
    def unsupported(self) -> str | None:
        """The feature of this layout that neither Pillow nor tifffile supports, if there is one."""
        if self.thumbnail:
            return "TIFF whose first image is a thumbnail, as in camera raw files (DNG, NEF),"
        if self.compression not in COMPRESSIONS:
            return f"TIFF with {COMPRESSION_NAMES.get(self.compression, self.compression)} compression"
        if self.compression == UNCOMPRESSED and self.photometric == YCBCR:
            return "TIFF with uncompressed YCbCr samples"
        return None

    def __str__(self) -> str:
        bits = "/".join(map(str, sorted(set(self.bits))))
        colours = {
            WHITE_IS_ZERO: "grey, white as zero",
            BLACK_IS_ZERO: "grey",
            RGB: "RGB",
            3: "palette",
            5: "CMYK",
        } | LAB
        kind = colours.get(self.photometric, f"photometric interpretation {self.photometric}")
        planes = ", in separate planes" if self.planar == SEPARATE and self.samples > 1 else ""
        alpha = ", with alpha" if {ASSOCIATED, UNASSOCIATED} & set(self.extra) else ""
        return f"TIFF with {bits}-bit {SAMPLE_FORMATS.get(self.sample_format, '')}samples ({kind}{planes}{alpha})"


def read_layout(data: bytes) -> Layout:
    """Return the layout of the first image.

    Raises:
        DamagedImage: the tags cannot be read.
    """
    try:
        tags = _tags(data)
        width, height = tags[256][0], tags[257][0]
    except (struct.error, KeyError, IndexError) as error:
        raise DamagedImage(UNOPENED) from error
    samples = tags.get(277, (1,))[0]
    bits = tags.get(258, (1,))
    return Layout(
        width=width,
        height=height,
        bits=bits,
        photometric=tags.get(262, (BLACK_IS_ZERO,))[0],
        samples=samples,
        planar=tags.get(284, (CONTIGUOUS,))[0],
        sample_format=max(tags.get(339, (UNSIGNED,)), default=UNSIGNED),
        extra=tags.get(338, ()),
        orientation=tags.get(ORIENTATION, (1,))[0],
        compression=tags.get(259, (UNCOMPRESSED,))[0],
        thumbnail=bool(tags.get(254, (0,))[0] & 1),
        big_endian_bigtiff=data[:4] == b"MM\0+",
    )


def decode(data: bytes, layout: Layout) -> Image.Image:
    """Decode a layout that Pillow does not support, to 8-bit RGB with transparent pixels over white.

    Raises:
        UnsupportedImage: this function does not support the layout either.
        DamagedImage: the pixels cannot be read.
    """
    import tifffile  # noqa: PLC0415  (30 ms, for rare files)

    readable = layout.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB) and layout.sample_format in (UNSIGNED, FLOAT)
    if not readable or layout.samples > 5:
        raise UnsupportedImage(f"{layout} is not supported; {REMEDY}")
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            values = file.pages[0].asarray()
    except MemoryError:
        raise
    except Exception as error:
        if "imagecodecs" in str(error):  # a compression or packing that tifffile has no code for
            raise UnsupportedImage(f"{layout} in this packing or compression is not supported; {REMEDY}") from error
        raise DamagedImage(UNDECODED) from error
    image = Image.fromarray(_to_rgb(values, layout))
    image.getexif()[ORIENTATION] = layout.orientation
    return image


def _to_rgb(values: NDArray[np.generic], layout: Layout) -> NDArray[np.uint8]:
    """Convert samples [H, W], [H, W, S] or, in separate planes, [S, H, W] to uint8 [H, W, 3]."""
    if values.ndim == 2:
        values = values[..., None]
    elif layout.planar == SEPARATE:
        values = np.moveaxis(values, 0, -1)
    colours = 3 if layout.photometric == RGB else 1
    if values.ndim != 3 or values.shape != (layout.height, layout.width, layout.samples) or colours > layout.samples:
        raise DamagedImage("the image is damaged: its data contradicts its header")
    rgb = np.empty((layout.height, layout.width, 3), np.uint8)
    scale = _full_scale(values, layout)
    alpha_kind = layout.extra[0] if layout.extra else None
    for row, line in enumerate(values):  # row by row: a large photo as floats would take hundreds of megabytes
        unit = np.nan_to_num(line.astype(np.float32) / np.float32(scale), posinf=1.0, neginf=0.0).clip(0, 1)
        colour = 1 - unit[:, :colours] if layout.photometric == WHITE_IS_ZERO else unit[:, :colours]
        if alpha_kind in (ASSOCIATED, UNASSOCIATED) and layout.samples > colours:
            alpha = unit[:, colours : colours + 1]
            colour = (colour if alpha_kind == ASSOCIATED else colour * alpha) + (1 - alpha)
        rgb[row] = (colour * 255).round().clip(0, 255)
    return rgb


def _full_scale(values: NDArray[np.generic], layout: Layout) -> float:
    """Return the value of white; for floats, the smallest usual maximum that is not exceeded."""
    if layout.sample_format == UNSIGNED:
        return float(2 ** layout.bits[0] - 1)
    largest = float(np.max(values, where=np.isfinite(values), initial=0))
    return next((scale for scale in (1.0, 255.0, 65535.0) if largest <= scale), largest)


def _tags(data: bytes) -> dict[int, tuple[int, ...]]:
    """Return the integer tags of the first directory, in classic TIFF or BigTIFF."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    offset = struct.unpack_from(f"{order}Q" if big else f"{order}I", data, 8 if big else 4)[0]
    (count,) = struct.unpack_from(f"{order}Q" if big else f"{order}H", data, offset)
    entry, start = (20, offset + 8) if big else (12, offset + 2)
    tags = {}
    for index in range(min(count, MAX_TAGS)):
        at = start + index * entry
        tag, kind, values = struct.unpack_from(f"{order}HHQ" if big else f"{order}HHI", data, at)
        size = SIZES.get(kind)
        if size is None or not 1 <= values <= 8:  # no relevant tag has more values
            continue
        at += 12 if big else 8
        if size * values > (8 if big else 4):
            at = struct.unpack_from(f"{order}Q" if big else f"{order}I", data, at)[0]
        codes = {1: "B", 2: "H", 4: "I", 8: "Q"}
        tags[tag] = struct.unpack_from(f"{order}{values}{codes[size]}", data, at)
    return tags
