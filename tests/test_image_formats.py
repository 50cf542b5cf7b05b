"""Variants of image formats: each decodes to the reference pixels, or raises an error that names the variant. See
`docs/reference/image-formats.md`."""

import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from rednet.model.images.errors import DamagedImage, UnsupportedImage
from rednet.model.images.opening import Header, open_photo
from rednet.model.images.preprocess import Preprocess
from rednet.model.images.rgb import upright_rgb
from rednet.service.decoding.decode import decode_image
from rednet.service.errors import ServiceError
from tests.conftest import encoded, photo

Values = NDArray[np.float64]
HEIGHT, WIDTH = 24, 33


def rgb(data: bytes) -> NDArray[np.int_]:
    """Upright RGB over white, as serving and training read it."""
    with open_photo(data) as image:
        return np.asarray(upright_rgb(image)).astype(int)


def assert_same(data: bytes, expected: Values | NDArray[np.int_], tolerance: float = 2) -> None:
    assert np.abs(rgb(data) - expected).max() <= tolerance


def picture() -> Values:
    """Values from 0 to 1, [HEIGHT, WIDTH, 3]."""
    rows, columns = np.linspace(0, 1, HEIGHT)[:, None, None], np.linspace(0, 1, WIDTH)[None, :, None]
    values: Values = rows * 0.5 + columns * 0.5 * np.array([1, 0.6, 0.2])
    return values


def grey_picture() -> Values:
    values: Values = picture().mean(axis=2)
    return values


ALPHA = np.repeat(np.linspace(0, 1, WIDTH)[None], HEIGHT, 0)
SAMPLES = ("u1", "u2", "u4", "f2", "f4", "f8")


def tiff_cases() -> Iterator[tuple[str, str, str, str, str | None]]:
    """Sample types, colours, planar configuration, meaning of zero, and alpha."""
    for case in itertools.product(
        SAMPLES, ("grey", "rgb"), ("contig", "separate"), ("black", "white"), (None, "unassalpha", "assocalpha")
    ):
        _, colours, planes, zero, alpha = case
        if zero == "white" and (colours == "rgb" or alpha == "assocalpha"):
            continue
        if colours == "grey" and alpha is None and planes == "separate":
            continue
        yield case


def tiff(samples: str, colours: str, planes: str, zero: str, alpha: str | None, **options: Any) -> tuple[bytes, Values]:
    """A TIFF file and its expected pixels."""
    values = picture() if colours == "rgb" else grey_picture()[..., None]
    expected = np.broadcast_to(values, (HEIGHT, WIDTH, 3)) * 255
    stored = 1 - values if zero == "white" else values
    if alpha is not None:
        a = ALPHA[..., None]
        expected = expected * a + (1 - a) * 255
        stored = np.concatenate([stored * a if alpha == "assocalpha" else stored, a], axis=2)
    if samples[0] == "u":
        stored = np.round(stored * np.iinfo(samples).max)
    array = stored.astype(samples)
    array = array[..., 0] if array.shape[2] == 1 else array
    array = np.moveaxis(array, -1, 0) if planes == "separate" else array
    photometric = "rgb" if colours == "rgb" else {"black": "minisblack", "white": "miniswhite"}[zero]
    content = io.BytesIO()
    tifffile.imwrite(
        content,
        array,
        photometric=photometric,
        planarconfig=planes if array.ndim == 3 else None,
        extrasamples=[alpha] if alpha else None,
        metadata=None,
        **options,
    )
    return content.getvalue(), expected


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("case", [*tiff_cases()], ids=lambda case: "-".join(map(str, case)))
def test_tiff_sample_layouts_have_the_reference_pixels(case: Any, byteorder: str) -> None:
    """Integers and floats, grey and RGB, chunky and planar, white as zero or black, with and without alpha."""
    for options in ({}, {"compression": "zlib"}, {"tile": (16, 16)}, {"bigtiff": True}):
        data, expected = tiff(*case, byteorder=byteorder, **options)
        assert_same(data, expected)


@pytest.mark.parametrize("samples", ["i1", "i2", "i4"])
def test_tiff_with_signed_samples_is_rejected_by_name(samples: str) -> None:
    """The values of black and white are not defined for them."""
    content = io.BytesIO()
    tifffile.imwrite(content, np.zeros((8, 8), samples), metadata=None)
    with pytest.raises(UnsupportedImage, match="signed"):
        rgb(content.getvalue())


def test_tiff_with_16_bit_cmyk_is_rejected_by_name() -> None:
    """Pillow would read it with other pixels than other decoders."""
    content = io.BytesIO()
    tifffile.imwrite(content, np.zeros((8, 8, 4), "u2"), photometric="separated", metadata=None)
    with pytest.raises(UnsupportedImage, match=r"16-bit .*CMYK"):
        rgb(content.getvalue())


@pytest.mark.parametrize(
    ("compression", "name"), [(50001, "WebP"), (32809, "ThunderScan"), (34712, "JPEG 2000"), (65000, "65000")]
)
def test_tiff_compression_that_libtiff_lacks_is_rejected_by_name(compression: int, name: str) -> None:
    """The files are valid; Pillow calls some of them damaged."""
    with pytest.raises(UnsupportedImage, match=f"TIFF with {name} compression"):
        rgb(with_short_tag(tiff("u1", "rgb", "contig", "black", None)[0], 259, compression))


def test_tiff_with_uncompressed_ycbcr_is_rejected_by_name() -> None:
    """Pillow expects three bytes per pixel, but most such files have fewer."""
    with pytest.raises(UnsupportedImage, match="uncompressed YCbCr"):
        rgb(with_short_tag(tiff("u1", "rgb", "contig", "black", None)[0], 262, 6))


def test_tiff_that_begins_with_a_thumbnail_is_rejected_by_name() -> None:
    """In camera raw files (DNG, NEF), the first image is not the photo."""
    with pytest.raises(UnsupportedImage, match="thumbnail, as in camera raw files"):
        rgb(tiff("u1", "rgb", "contig", "black", None, subfiletype=1)[0])


def with_short_tag(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian file with another value for a tag of type SHORT."""
    at = data.index(struct.pack("<HHI", tag, 3, 1))
    return data[: at + 8] + struct.pack("<H", value) + data[at + 10 :]


def test_tiff_with_lab_samples_is_rejected_by_name() -> None:
    """Pillow's conversion to RGB differs greatly from other decoders'."""
    content = io.BytesIO()
    tifffile.imwrite(content, np.zeros((8, 8, 3), "u1"), photometric="cielab", metadata=None)
    with pytest.raises(UnsupportedImage, match="CIE Lab"):
        rgb(content.getvalue())


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_tiff_orientation_is_applied_in_every_layout(orientation: int) -> None:
    """In layouts that Pillow decodes and in those that tifffile decodes."""
    turns = {1: 0, 3: 2, 6: -1}[orientation]
    for case in (("u1", "rgb", "contig", "black", None), ("u2", "rgb", "separate", "black", None)):
        data, expected = tiff(*case, extratags=[(274, 3, 1, orientation, True)])
        assert_same(data, np.rot90(expected, turns))


def test_tiff_size_is_checked_before_pixels_are_decoded() -> None:
    """In the layouts that tifffile decodes, too."""
    data, _ = tiff("u2", "rgb", "separate", "black", None)

    def refuse(header: Header) -> None:
        raise OverflowError(header.size)

    with pytest.raises(OverflowError, match=f"{WIDTH}, {HEIGHT}"):
        open_photo(data, refuse)


def test_tiff_with_wrong_tags_is_an_error() -> None:
    """Tags may point anywhere in the file, or beyond its end."""
    data, _ = tiff("u2", "rgb", "separate", "black", None)
    outcomes = set()
    for at in range(4, 200):
        for value in (0, 1, 255):
            broken = data[:at] + bytes([value]) + data[at + 1 :]
            try:
                decode_image(broken, Preprocess(resize=8, crop=8), 10_000)
            except ServiceError as error:
                outcomes.add(error.code)
            else:
                outcomes.add("read")
    assert outcomes == {"read", "unreadable_image", "unsupported_media_type", "payload_too_large"}


def chunk(kind: bytes, content: bytes, damage: int = 0) -> bytes:
    checksum = zlib.crc32(kind + content) ^ damage
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(width: int, depth: int, colour: int, row: bytes, *extra: bytes) -> bytes:
    """A PNG file of one row."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "expected"),
    [
        (1, b"\xa0", 1, [255, 0, 255]),
        (1, b"\xa0", 0, [255, 255, 255]),
        (2, b"\x1b", 1, [0, 255, 170]),  # samples 0, 1, 2
        (4, b"\x01\x20", 1, [0, 255, 34]),
        (8, b"\0\x01\x22", 1, [0, 255, 34]),
        (16, struct.pack(">3H", 0, 257, 65535), 257, [0, 255, 255]),
    ],
)
def test_png_transparent_grey_is_white_at_every_bit_depth(
    depth: int, row: bytes, transparent: int, expected: list[int]
) -> None:
    """The transparent value (tRNS) is compared at the file's bit depth."""
    data = png(3, depth, 0, row, chunk(b"tRNS", struct.pack(">H", transparent)))
    assert rgb(data)[0, :, 0].tolist() == expected


def test_png_with_16_bit_rgb_and_a_transparent_colour_is_rejected_by_name() -> None:
    """Pillow keeps eight bits, which cannot distinguish the colour from its neighbours."""
    data = png(1, 16, 2, bytes(6), chunk(b"tRNS", struct.pack(">3H", 1000, 2000, 3000)))
    with pytest.raises(UnsupportedImage, match="16-bit RGB"):
        rgb(data)


def test_png_with_a_wrong_checksum_in_text_is_read() -> None:
    """Chunks that are not needed for the pixels are ignored."""
    data = png(3, 8, 0, b"\0\x05\xff", chunk(b"tEXt", b"a\0b", damage=1), chunk(b"zTXt", b"a\0\0b", damage=1))
    assert rgb(data)[0, :, 0].tolist() == [0, 5, 255]


@pytest.mark.parametrize("kind", [b"IDAT", b"IHDR", b"tRNS"])
def test_png_with_a_wrong_checksum_in_its_pixels_is_damaged(kind: bytes) -> None:
    """Image data, header and transparency; Pillow alone would not check the first."""
    data = png(3, 8, 0, b"\0\x05\xff", chunk(b"tRNS", struct.pack(">H", 5)))
    at = data.index(kind)
    length = int.from_bytes(data[at - 4 : at], "big")
    broken = bytearray(data)
    broken[at + 4 + length] ^= 1
    with pytest.raises(DamagedImage, match="checksum"):
        rgb(bytes(broken))


def test_jpeg_without_its_end_marker_is_read() -> None:
    """The pixels are those of the whole file. A file that lacks more is rejected."""
    data = encoded(photo(3, 200, 150), "JPEG", quality=95)
    assert_same(data[:-2], rgb(data), 0)
    assert_same(data[:-1], rgb(data), 0)
    with pytest.raises(OSError, match="truncated"):
        rgb(data[: len(data) // 2])


@pytest.mark.parametrize(("marker", "name"), [(0xC3, "lossless"), (0xC5, "hierarchical"), (0xCB, "lossless")])
def test_jpeg_of_another_coding_process_is_rejected_by_name(marker: int, name: str) -> None:
    """Lossless and hierarchical JPEG are valid but rare, so they are not called damaged."""
    data = encoded(photo(), "JPEG")
    at = data.index(b"\xff\xc0")
    with pytest.raises(UnsupportedImage, match=f"{name} JPEG"):
        rgb(data[: at + 1] + bytes([marker]) + data[at + 2 :])


def test_jpeg_with_12_bits_is_rejected_by_name() -> None:
    """Medical devices write such files."""
    data = encoded(photo(), "JPEG")
    at = data.index(b"\xff\xc0")
    with pytest.raises(UnsupportedImage, match="12 bits per sample"):
        rgb(data[: at + 4] + b"\x0c" + data[at + 5 :])


def test_gif_is_white_outside_its_first_frame() -> None:
    """A frame may be smaller than the canvas."""
    data = bytearray(encoded(photo(0, 40, 30).convert("P"), "GIF"))
    frame = rgb(bytes(data))
    data[6:10] = struct.pack("<HH", 60, 50)
    expected = np.full((50, 60, 3), 255)
    expected[:30, :40] = frame
    assert_same(bytes(data), expected, 0)


def test_webp_animation_is_white_outside_its_first_frame() -> None:
    """Pillow would make it black."""
    frames = [Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")]
    data = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    data[24:30] = (59).to_bytes(3, "little") + (49).to_bytes(3, "little")
    expected = np.full((50, 60, 3), 255)
    expected[:30, :40] = (255, 0, 0)
    assert_same(bytes(data), expected, 0)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF"])
def test_animation_is_decoded_as_its_first_frame(file_format: str) -> None:
    """Later frames have no effect."""
    frames = [photo(1, 40, 30), photo(2, 40, 30)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    still = rgb(encoded(frames[0], file_format, **options))
    assert_same(data, still, 40 if file_format == "GIF" else 0)  # GIF has one palette for both frames


def bmp(alpha: tuple[int, int]) -> bytes:
    """A 2x1 BMP file with an alpha mask (BITMAPV4HEADER)."""
    pixels = bytes([10, 20, 30, alpha[0], 40, 50, 60, alpha[1]])
    header = struct.pack("<IiiHHIIiiII", 108, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    return b"BM" + struct.pack("<IHHI", 14 + 108 + 8, 0, 0, 14 + 108) + header + masks + pixels


def test_bmp_whose_alpha_is_all_zero_is_opaque() -> None:
    """Programs without support for alpha leave it at zero."""
    assert rgb(bmp((0, 0)))[0].tolist() == [[30, 20, 10], [60, 50, 40]]
    assert rgb(bmp((0, 255)))[0].tolist() == [[255, 255, 255], [60, 50, 40]]


@pytest.mark.parametrize(
    ("at", "value", "name"),
    [
        (28, struct.pack("<H", 2), "BMP pixel depth"),
        (30, struct.pack("<I", 4), "BMP compression"),
        (54, struct.pack("<4I", 0xF00, 0xF0, 0xF, 0), "BMP bitfields"),
    ],
)
def test_bmp_variant_that_pillow_lacks_is_rejected_by_name(at: int, value: bytes, name: str) -> None:
    """Two bits per pixel, embedded JPEG, and four bits per colour are valid but rare."""
    data = bmp((255, 255))
    with pytest.raises(UnsupportedImage, match=name):
        rgb(data[:at] + value + data[at + len(value) :])


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x14ftypisom\0\0\0\0mp42", "MP4"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "QuickTime"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\1", "PSD"),
        (b"%PDF-1.7", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "EPS"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (b"  <svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b'{"images": []}', "JSON"),
        (b"data:image/png;base64,iVBO", "data URL"),
        (b"\0\0\1\0\1\0", "ICO"),
        (b"P6\n1 1\n255\nabc", "Netpbm"),
    ],
)
def test_known_format_that_is_not_supported_is_named(data: bytes, name: str) -> None:
    """The message does not say "no known image format"."""
    with pytest.raises(UnsupportedImage, match=name) as error:
        rgb(data)
    assert "no known image format" not in str(error.value)
