"""Photos of every kind to pixels."""

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from rednet import Preprocess
from rednet.model.images.rgb import upright_rgb
from tests.conftest import encoded, photo


def test_resize_and_crop_are_the_usual_two_steps_in_one() -> None:
    """Scaling the short side and cutting the middle gives the same picture, up to the rounding of the long side."""
    image = photo(width=400, height=300)
    pixels = Preprocess(resize=72, crop=64).pixels(image)
    scaled = image.resize((96, 72), Image.Resampling.BILINEAR).crop((16, 4, 80, 68))
    assert np.abs(pixels.astype(int) - np.asarray(scaled).transpose(2, 0, 1)).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 2), (64, 64)])
def test_any_size_of_photo_becomes_a_square(size: tuple[int, int]) -> None:
    """Single pixels and thin strips included."""
    assert Preprocess(resize=72, crop=64).pixels(photo(width=size[0], height=size[1])).shape == (3, 64, 64)


def test_a_large_jpeg_decoded_small_looks_the_same() -> None:
    """The decoder's own scaling, which makes large photos cheap, does not change the picture."""
    image = photo(width=1600, height=1200)
    data = encoded(image, "JPEG", quality=95)
    small = Image.open(io.BytesIO(data))
    pixels = Preprocess(resize=72, crop=64).pixels(small)
    assert small.size == (200, 150)
    expected = Preprocess(resize=72, crop=64).pixels(image)
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_the_way_their_exif_says(orientation: int) -> None:
    """All eight orientations show the same picture."""
    upright = photo()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a camera held that way applies
    turned = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    reopened = Image.open(io.BytesIO(encoded(turned, "PNG", exif=exif)))
    assert np.array_equal(np.asarray(upright_rgb(reopened)), np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_does_not_cost_the_photo() -> None:
    """It is taken as it lies."""
    image = Image.open(io.BytesIO(encoded(photo(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")))
    assert upright_rgb(image).size == photo().size


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_becomes_the_right_rgb(mode: str) -> None:
    """A plain colour that the mode can hold comes back as itself."""
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
def test_deep_grey_is_scaled_not_clipped(values: NDArray[np.generic], mode: str) -> None:
    """16 and 32 bits and floats: black stays black, white white, and what lies between keeps its place."""
    image = Image.fromarray(values)
    assert image.mode == mode
    assert np.asarray(upright_rgb(image))[..., 1].tolist() == [[0, 100], [200, 255]]


def test_a_sixteen_bit_png_survives_the_file() -> None:
    """The same through a file, as cameras and microscopes write them; dark ones stay dark."""
    values = np.full((8, 8), 257 * 40, np.uint16)
    reopened = Image.open(io.BytesIO(encoded(Image.fromarray(values))))
    assert (np.asarray(upright_rgb(reopened)) == 40).all()


def test_lab_becomes_rgb() -> None:
    """By its colour profile: mid grey is mid grey."""
    image = Image.new("LAB", (4, 4), (136, 128, 128))
    assert np.abs(np.asarray(upright_rgb(image)).astype(int) - 126).max() <= 3


def test_what_is_transparent_lies_on_white() -> None:
    """Not on whatever colour hides under it; in a palette, in an alpha channel and in a transparent colour alike."""
    clear = Image.new("RGBA", (4, 4), (0, 0, 255, 0))
    palette = Image.open(io.BytesIO(encoded(clear, "GIF")))
    single = Image.open(io.BytesIO(encoded(Image.new("RGB", (4, 4), (0, 0, 255)), "PNG", transparency=(0, 0, 255))))
    for image in (clear, palette, single):
        assert (np.asarray(upright_rgb(image)) == 255).all()


def test_normalisation_is_by_mean_and_deviation() -> None:
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
def test_numbers_that_are_no_preprocessing_are_refused(fields: dict[str, object]) -> None:
    """When they are read from a checkpoint, not when the first photo comes."""
    with pytest.raises(ValueError, match="must"):
        Preprocess(**fields)  # type: ignore[arg-type]
