"""AVIF and HEIC: the variants that phones write, what is refused, and real servers."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rednet import Preprocess
from rednet.model.images import iso_media
from rednet.model.images.errors import DamagedImage, UnsupportedImage
from rednet.model.images.opening import Header, open_photo
from rednet.model.images.rgb import ORIENTATION, upright_rgb
from rednet.model.training.dataset import MEDIA_SUFFIXES, find_photos
from rednet.service.decoding.decode import decode_image
from rednet.service.errors import PayloadTooLarge
from tests.conftest import EVERY_FORMAT, encoded, photo
from tests.http_helpers import assert_error, classes, predict
from tests.servers import ServerProcess

MEDIA = [each for each in ("AVIF", "HEIF") if each in EVERY_FORMAT]
pytestmark = pytest.mark.skipif(not MEDIA, reason="Pillow was built without AVIF, and pillow-heif is not installed")
every_format = pytest.mark.parametrize("file_format", MEDIA)
TOLERANCE = 6  # mean difference to the picture that was encoded


def rgb(data: bytes) -> NDArray[np.int_]:
    with open_photo(data) as image:
        return np.asarray(upright_rgb(image)).astype(int)


def difference(data: bytes, expected: Image.Image) -> float:
    found, wanted = rgb(data), np.asarray(expected).astype(int)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).mean())


def with_brand(data: bytes, brand: bytes) -> bytes:
    return data[:8] + brand + data[12:]


def claiming(data: bytes, side: int) -> bytes:
    """The file with another size in its container (the boxes `ispe`)."""
    parts = data.split(b"ispe")
    return parts[0] + b"".join(b"ispe" + each[:4] + struct.pack(">II", side, side) + each[12:] for each in parts[1:])


@every_format
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_the_jpeg(file_format: str, orientation: int) -> None:
    """Encoders write it into the container, as phones do."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture = photo(2, 90, 70)
    with Image.open(io.BytesIO(encoded(picture, "JPEG", exif=exif, quality=95))) as jpeg:
        upright = ImageOps.exif_transpose(jpeg)
    data = encoded(picture, file_format, exif=exif.tobytes(), quality=95)
    assert (b"irot" in data or b"imir" in data) is (orientation > 1)
    assert difference(data, upright) < TOLERANCE


@every_format
def test_transparency_is_blended_over_white(file_format: str) -> None:
    picture = photo(3, 90, 70)
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    expected = Image.new("RGB", picture.size, "white")
    expected.paste(picture, mask=picture.getchannel("A"))
    assert difference(encoded(picture, file_format, quality=95), expected) < TOLERANCE


@every_format
def test_grey_is_converted_to_rgb(file_format: str) -> None:
    picture = photo(4, 90, 70).convert("L")
    assert difference(encoded(picture, file_format, quality=95), picture.convert("RGB")) < TOLERANCE


@every_format
def test_of_several_images_the_primary_one_is_decoded(file_format: str) -> None:
    """Of an animation in AVIF, that is the first frame."""
    options: dict[str, object] = {} if file_format == "AVIF" else {"primary_index": 1}
    pictures = [photo(1, 90, 70), photo(2, 90, 70)]
    data = encoded(pictures[0], file_format, save_all=True, append_images=pictures[1:], quality=95, **options)
    assert difference(data, pictures[file_format == "HEIF"]) < TOLERANCE


@pytest.mark.skipif("HEIF" not in MEDIA, reason="pillow-heif is not installed")
def test_photo_in_a_grid_of_tiles_is_decoded_whole() -> None:
    """As Apple's cameras write it, with a thumbnail, which is not decoded in place of the photo."""
    picture = photo(5, 600, 500)
    data = encoded(picture, "HEIF", tile_size=256, quality=95, thumbnails=[128])
    assert difference(data, picture) < TOLERANCE
    pixels = Preprocess(resize=40, crop=32).pixels(open_photo(data))
    assert np.abs(pixels.astype(int) - Preprocess(resize=40, crop=32).pixels(picture)).mean() < TOLERANCE


@every_format
def test_brand_that_leaves_the_codec_open_is_decoded(file_format: str) -> None:
    """`mif1` alone says that it is HEIF; the codec is found inside."""
    data = encoded(photo(), file_format)
    neutral = with_brand(data, b"mif1")
    assert rgb(neutral).tolist() == rgb(data).tolist()


@every_format
def test_size_is_checked_before_pixels_are_decoded(file_format: str) -> None:
    data = encoded(photo(0, 300, 200), file_format)

    def refuse(header: Header) -> None:
        raise OverflowError(header.size)

    with pytest.raises(OverflowError, match="300, 200"):
        open_photo(data, refuse)
    with pytest.raises(PayloadTooLarge, match="300x200"):
        decode_image(data, Preprocess(resize=40, crop=32), 59_999)


@every_format
def test_damaged_header_is_an_error_of_the_image(file_format: str) -> None:
    """With the format's first bytes and nothing that fits behind them."""
    with pytest.raises(DamagedImage, match="damaged or incomplete"):
        rgb(encoded(photo(), file_format)[:40] + bytes(200))


@pytest.mark.parametrize(
    ("brand", "message"),
    [
        (b"avif", r"AVIF is not enabled: install a build of Pillow .*, or convert it to JPEG or PNG"),
        (b"heic", r"HEIC is not enabled: install rednet-serve\[heif\], or convert it to JPEG or PNG"),
        (b"mif1", r"HEIC is not enabled: install rednet-serve\[heif\], or convert it to JPEG or PNG"),
    ],
)
def test_format_that_is_not_enabled_is_unsupported(monkeypatch: pytest.MonkeyPatch, brand: bytes, message: str) -> None:
    """The message names the format and the remedy."""
    monkeypatch.setattr(iso_media, "enabled_formats", list)
    with pytest.raises(UnsupportedImage, match=message):
        rgb(b"\0\0\0\x18ftyp" + brand + bytes(12))


@every_format
def test_photos_in_folders_are_found_by_name_and_by_content(file_format: str, tmp_path: Path) -> None:
    """For training and evaluation."""
    suffix = next(suffix for suffix, name in MEDIA_SUFFIXES.items() if name.startswith(file_format[:2]))
    for name in (f"a{suffix}", f"b{suffix.upper()}", "c.img", "d"):
        (tmp_path / name).write_bytes(with_brand(encoded(photo(), file_format), b"mif1"))
    photos, _ = find_photos(tmp_path)
    assert len(photos) == 4


@every_format
def test_server_predicts_what_it_predicts_for_the_jpeg(server: ServerProcess, file_format: str) -> None:
    """As a small image, and as one that is decoded in the pool for large ones."""
    for width in (300, 3000):
        picture = photo(6, 300, 200).resize((width, width * 2 // 3))  # smooth: x265 would take a minute for noise
        expected = classes(predict(server.client, encoded(picture, "JPEG", quality=95)))
        found = classes(predict(server.client, encoded(picture, file_format, quality=95)))
        assert [each["index"] for each in found[:2]] == [each["index"] for each in expected[:2]]
        assert found[0]["probability"] == pytest.approx(expected[0]["probability"], abs=0.05)


@pytest.mark.skipif("AVIF" not in MEDIA, reason="Pillow was built without AVIF")
def test_frame_that_is_larger_than_the_container_says_is_rejected(server: ServerProcess) -> None:
    """It would take memory that is not accounted for."""
    data = encoded(Image.new("L", (9000, 9000), 90), "AVIF", speed=10)
    assert_error(predict(server.client, data), 413, "payload_too_large")
    assert_error(predict(server.client, claiming(data, 64)), 422, "unreadable_image")
    assert predict(server.client, encoded(photo(), "AVIF")).status_code == 200
