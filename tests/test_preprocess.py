"""Preprocessing: photos of every kind to pixels."""

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from rednet import Preprocess
from rednet.model.images.rgb import upright_rgb
from tests.conftest import encoded, photo


def test_preprocessing_equals_resize_then_centre_crop() -> None:
    """The results are equal up to the rounding of the long side."""
    image = photo(width=400, height=300)
    pixels = Preprocess(resize=72, crop=64).pixels(image)
    scaled = image.resize((96, 72), Image.Resampling.BILINEAR).crop((16, 4, 80, 68))
    assert np.abs(pixels.astype(int) - np.asarray(scaled).transpose(2, 0, 1)).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 2), (64, 64)])
def test_photo_of_any_size_is_cropped_to_a_square(size: tuple[int, int]) -> None:
    """Including single pixels and thin strips."""
    assert Preprocess(resize=72, crop=64).pixels(photo(width=size[0], height=size[1])).shape == (3, 64, 64)


def test_jpeg_scaled_while_decoding_looks_the_same() -> None:
    """The decoder's scaling, which makes large photos cheap, hardly changes the pixels."""
    image = photo(width=1600, height=1200)
    data = encoded(image, "JPEG", quality=95)
    small = Image.open(io.BytesIO(data))
    pixels = Preprocess(resize=72, crop=64).pixels(small)
    assert small.size == (200, 150)
    expected = Preprocess(resize=72, crop=64).pixels(image)
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """All eight orientations show the same picture."""
    upright = photo()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition of a camera in that orientation
    turned = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    reopened = Image.open(io.BytesIO(encoded(turned, "PNG", exif=exif)))
    assert np.array_equal(np.asarray(upright_rgb(reopened)), np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_photo_with_invalid_exif_is_read_without_rotation() -> None:
    """The damaged block is ignored."""
    image = Image.open(io.BytesIO(encoded(photo(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")))
    assert upright_rgb(image).size == photo().size


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV"]
)
def test_every_colour_mode_is_converted_to_rgb(mode: str) -> None:
    """A plain colour that the mode can represent is unchanged."""
    colour = (255, 255, 255) if mode in ("1", "L", "LA", "La") else (255, 0, 0)
    image = Image.new("RGB", (8, 8), colour)
    if mode in ("La", "RGBa"):
        image = image.convert("LA" if mode == "La" else "RGBA")
    elif mode == "PA":
        image = image.convert("P")
    pixels = np.asarray(upright_rgb(image.convert(mode)))
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels.astype(int) - colour).max() <= 2


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        (np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16), "I;16"),
        (np.array([[0, 257 * 100], [257 * 200, 65535]], np.int32), "I"),
        (np.array([[0, 100], [200, 255]], np.int32), "I"),
        (np.array([[0, 100 / 255], [200 / 255, 1]], np.float32), "F"),
        (np.array([[0, 100], [200, 255]], np.float32), "F"),
    ],
)
def test_16_and_32_bit_grey_is_scaled(values: NDArray[np.generic], mode: str) -> None:
    """Black stays black, white stays white, and values between keep their proportion; floats, too."""
    image = Image.fromarray(values)
    assert image.mode == mode
    assert np.asarray(upright_rgb(image))[..., 1].tolist() == [[0, 100], [200, 255]]


def test_16_bit_png_is_scaled() -> None:
    """As cameras and microscopes write them. Dark images stay dark."""
    values = np.full((8, 8), 257 * 40, np.uint16)
    reopened = Image.open(io.BytesIO(encoded(Image.fromarray(values))))
    assert (np.asarray(upright_rgb(reopened)) == 40).all()


def test_lab_is_converted_to_rgb() -> None:
    """By its colour profile: mid grey is mid grey."""
    image = Image.new("LAB", (4, 4), (136, 128, 128))
    assert np.abs(np.asarray(upright_rgb(image)).astype(int) - 126).max() <= 3


def test_transparent_pixels_are_white() -> None:
    """Their hidden colour has no effect, in a palette, an alpha channel and with a transparent colour."""
    clear = Image.new("RGBA", (4, 4), (0, 0, 255, 0))
    palette = Image.open(io.BytesIO(encoded(clear, "GIF")))
    single = Image.open(io.BytesIO(encoded(Image.new("RGB", (4, 4), (0, 0, 255)), "PNG", transparency=(0, 0, 255))))
    for image in (clear, palette, single):
        assert (np.asarray(upright_rgb(image)) == 255).all()


def test_normalisation_by_mean_and_standard_deviation() -> None:
    """uint8 in, float32 out, per channel."""
    preprocess = Preprocess(mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0))
    x = preprocess.normalise(torch.tensor([0, 255, 255], dtype=torch.uint8).reshape(1, 3, 1, 1))
    assert x.dtype == torch.float32
    assert x.flatten().tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "fields",
    [
        {"crop": 63.5},
        {"resize": 10**9},
        {"std": (1.0, float("inf"), 1.0)},
        {"crop": 300},
        {"crop": 0},
        {"interpolation": "nearest"},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (0.0,)},
    ],
)
def test_invalid_preprocessing_parameters_are_rejected(fields: dict[str, object]) -> None:
    """When they are read from a checkpoint, not with the first photo."""
    with pytest.raises(ValueError, match="must"):
        Preprocess(**fields)  # type: ignore[arg-type]
