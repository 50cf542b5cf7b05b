"""Decoding of image files, valid and malicious."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from rednet import Preprocess
from rednet.model.images.errors import UNDECODED, UNOPENED
from rednet.model.images.opening import MAX_READS
from rednet.service.decoding import decode
from rednet.service.decoding.decode import decode_image
from rednet.service.decoding.worker_handle import ERRORS
from rednet.service.errors import MalformedRequest, PayloadTooLarge, ServiceError, UnreadableImage, UnsupportedMediaType
from tests.conftest import EVERY_FORMAT, encoded, photo

PREPROCESS = Preprocess(resize=40, crop=32)
MAX_PIXELS = 1_000_000
WAV = b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0"


@pytest.mark.parametrize("file_format", EVERY_FORMAT)
def test_every_served_format_is_decoded(file_format: str) -> None:
    """The decoded pixels are close to those of the picture that was encoded."""
    pixels = decode_image(encoded(photo(), file_format), PREPROCESS, MAX_PIXELS)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == np.uint8
    difference = np.abs(pixels.astype(int) - PREPROCESS.pixels(photo()).astype(int))
    assert difference.mean() < 8


@pytest.mark.parametrize("file_format", EVERY_FORMAT)
def test_truncated_file_raises_an_image_error_or_decodes(file_format: str) -> None:
    """Most truncations raise one of two errors, in the same words for every decoder."""
    data = encoded(photo(), file_format)
    messages = []
    for length in range(16, len(data), max(1, len(data) // 60)):
        try:
            decode_image(data[:length], PREPROCESS, MAX_PIXELS)
        except UnreadableImage as error:
            messages.append(error.message)
    assert len(messages) > 20
    assert {*messages} <= {UNOPENED, UNDECODED}


@pytest.mark.parametrize("file_format", EVERY_FORMAT)
def test_damaged_file_is_described_in_our_words(file_format: str) -> None:
    """Not in those of Pillow, tifffile or a codec, such as "decoder error -2"."""
    data, generator = encoded(photo(), file_format), np.random.default_rng(0)
    messages = []
    for _ in range(100):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[generator.integers(12, len(data), 8)] ^= 1 << 5
        try:
            decode_image(damaged.tobytes(), PREPROCESS, MAX_PIXELS)
        except UnreadableImage as error:
            messages.append(error.message)
        except ServiceError:  # the damage made it too large, or another format
            pass
    assert messages
    assert [message for message in messages if not message.startswith("the image is damaged")] == []


def test_formats_that_are_not_served_are_unsupported() -> None:
    """A format that Pillow knows but the server does not serve is rejected like text."""
    for data in (
        encoded(photo(), "PPM"),
        encoded(photo(), "ICO"),
        b"hello",
        b"\x00" * 100,
        b"%!PS-Adobe-3.0 EPSF-3.0",
        WAV,
        b"BMW is a car",
    ):
        with pytest.raises(UnsupportedMediaType):
            decode_image(data, PREPROCESS, MAX_PIXELS)


def test_empty_file_is_a_malformed_request() -> None:
    """In a form, in JSON, in a tensor and on the command line, as an empty body is."""
    with pytest.raises(MalformedRequest, match="the image is empty"):
        decode_image(b"", PREPROCESS, MAX_PIXELS)


def test_every_error_of_an_image_can_be_sent_by_a_worker() -> None:
    """A code that the server does not know would leave the request waiting until its deadline."""
    names = vars(decode).values()
    errors = {each for each in names if isinstance(each, type) and issubclass(each, ServiceError)} - {ServiceError}
    assert set(ERRORS.values()) == errors


def test_too_many_pixels_are_rejected_from_the_header() -> None:
    """A file of a few bytes that claims a billion pixels costs nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    with pytest.raises(PayloadTooLarge, match="40000x40000"):
        decode_image(bomb, PREPROCESS, 50_000_000)
    assert decode_image(encoded(photo(width=100, height=100)), PREPROCESS, 10_000).shape == (3, 32, 32)
    with pytest.raises(PayloadTooLarge):
        decode_image(encoded(photo(width=100, height=101)), PREPROCESS, 10_000)


def test_png_text_bomb_is_rejected() -> None:
    """A compressed PNG text chunk that unpacks to many megabytes is not kept."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "a" * 30_000_000, zip=True)
    with pytest.raises(UnreadableImage):
        decode_image(encoded(photo(), "PNG", pnginfo=info), PREPROCESS, MAX_PIXELS)


@pytest.mark.parametrize(
    ("file_format", "marker", "filler"),
    [
        ("JPEG", 2, b"\xff"),  # fill bytes before a marker
        ("JPEG", 2, b"\xff\xe3\x00\x02"),  # empty segments
        ("PNG", 33, b"\0\0\0\0abCd" + zlib.crc32(b"abCd").to_bytes(4, "big")),
        ("GIF", 6 + 7 + 3 * 256, b"!\xfe\x01x\0"),  # comments
    ],
)
def test_file_with_millions_of_segments_is_rejected(file_format: str, marker: int, filler: bytes) -> None:
    """Pillow runs Python code for each segment, and a large file can hold millions. A few thousand are accepted."""
    whole = encoded(photo(1), file_format)
    some = whole[:marker] + filler * 2000 + whole[marker:]
    assert decode_image(some, PREPROCESS, 5_000_000).shape == (3, 32, 32)
    with pytest.raises(UnreadableImage, match="too many parts"):
        decode_image(whole[:marker] + filler * MAX_READS + whole[marker:], PREPROCESS, 5_000_000)


def test_jpeg_with_very_many_scans_is_rejected() -> None:
    """Each scan covers all pixels, so a small file could occupy a decoder for hours."""
    image = Image.fromarray(np.full((2000, 2000, 3), 200, np.uint8))
    content = io.BytesIO()
    image.save(content, "JPEG", progressive=True)
    whole = content.getvalue()
    assert decode_image(whole, PREPROCESS, 5_000_000).shape == (3, 32, 32)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    with pytest.raises(UnreadableImage, match="too many scans"):
        decode_image(whole[:-2] + 250 * last + whole[-2:], PREPROCESS, 5_000_000)


def test_motion_photo_with_an_appended_video_is_decoded() -> None:
    """About every 65 kB, the video contains the bytes of a scan marker by chance."""
    whole = encoded(photo(width=2000, height=1500), "JPEG")
    film = np.random.default_rng(0).bytes(1_000_000) + b"a film: \xff\xda" * 1000
    assert (decode_image(whole + film, PREPROCESS, 5_000_000) == decode_image(whole, PREPROCESS, 5_000_000)).all()


def test_first_frame_of_an_animation_is_decoded() -> None:
    """In GIF and WebP."""
    for file_format in ("GIF", "WEBP"):
        content = io.BytesIO()
        photo(1).save(content, file_format, save_all=True, append_images=[photo(2), photo(3)])
        pixels = decode_image(content.getvalue(), PREPROCESS, MAX_PIXELS)
        assert np.abs(pixels.astype(int) - PREPROCESS.pixels(photo(1)).astype(int)).mean() < 10


def test_error_messages_do_not_reveal_source_paths() -> None:
    """Messages describe the image only."""
    data = bytearray(encoded(photo()))
    data[60:] = bytes(len(data) - 60)
    with pytest.raises(UnreadableImage) as caught:
        decode_image(bytes(data), PREPROCESS, MAX_PIXELS)
    assert "/" not in caught.value.message
    assert Image.MAX_IMAGE_PIXELS is None
