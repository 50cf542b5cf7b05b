"""The heat map drawn over a photo is in the right position."""

import io

import numpy as np
import pytest
from PIL import Image

from rednet import Preprocess
from rednet.service.decoding.overlay import COLOURS, MAX_SIDE, draw_overlay
from rednet.service.types import Floats
from tests.conftest import encoded, photo

PREPROCESS = Preprocess(resize=256, crop=224)


def drawn(image: Image.Image, grid: Floats) -> Floats:
    """The picture as an array [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(draw_overlay(image, grid, PREPROCESS))), np.float32)


def hottest(picture: Floats) -> tuple[float, float]:
    """The centre of the yellow area, as fractions of the height and the width."""
    yellow = picture[..., 0] + picture[..., 1] - 2 * picture[..., 2]
    rows, columns = np.nonzero(yellow > 0.9 * yellow.max())
    return float(rows.mean() + 0.5) / picture.shape[0], float(columns.mean() + 0.5) / picture.shape[1]


def spot(row: int, column: int) -> Floats:
    grid = np.zeros((7, 7), np.float32)
    grid[row, column] = 1
    return grid


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 400), (3000, 2000), (120, 120)])
def test_heat_map_cell_is_drawn_over_its_pixels(width: int, height: int) -> None:
    """Within the centre crop of the photo, for any aspect ratio and any scaling of the picture."""
    row, column = hottest(drawn(Image.new("RGB", (width, height), "grey"), spot(1, 5)))
    side = min(width, height) * 224 / 256
    assert row * height == pytest.approx((height - side) / 2 + side * 1.5 / 7, abs=0.01 * side)
    assert column * width == pytest.approx((width - side) / 2 + side * 5.5 / 7, abs=0.01 * side)


def test_rotated_photo_is_drawn_upright() -> None:
    """The EXIF orientation is applied, as for the network, so the map fits the upright photo."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    data = encoded(Image.new("RGB", (400, 300), "grey"), "JPEG", exif=exif)
    picture = drawn(Image.open(io.BytesIO(data)), spot(1, 3))
    assert picture.shape == (400, 300, 3)
    row, column = hottest(picture)
    assert row * 400 == pytest.approx(68.75 + 262.5 * 1.5 / 7, abs=3)
    assert column * 300 == pytest.approx(150, abs=3)


def test_outside_of_the_crop_is_the_darkened_photo() -> None:
    """The network does not see that part."""
    picture = drawn(photo(width=400, height=300), np.random.default_rng(0).random((7, 7), np.float32))
    expected = np.asarray(photo(width=400, height=300), np.float32) / 2
    left, top = 68, 18  # the crop of 262.5 pixels begins at 68.75 and 18.75
    np.testing.assert_allclose(picture[:, :left], expected[:, :left], atol=0.5)
    np.testing.assert_allclose(picture[:top], expected[:top], atol=0.5)
    inside = np.s_[top + 2 : -top - 2, left + 2 : -left - 2]
    assert np.abs(picture[inside] - expected[inside]).mean() > 20


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (5000, 3), (2500, 2500)])
def test_picture_size_is_bounded_for_any_photo(size: tuple[int, int]) -> None:
    """Very thin and very small photos are drawn, too."""
    picture = drawn(Image.new("RGB", size), spot(3, 3))
    assert max(picture.shape) <= MAX_SIDE


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "I;16", "RGBA", "1"])
def test_photos_of_every_mode_are_drawn(mode: str) -> None:
    """Their colours are converted as for classification."""
    image = Image.new(mode, (50, 40)) if mode == "I;16" else photo(width=50, height=40).convert(mode)
    assert drawn(image, spot(3, 3)).shape == (40, 50, 3)


def test_constant_heat_map_is_drawn_in_one_colour() -> None:
    """There is no division by zero."""
    picture = drawn(Image.new("RGB", (64, 64), "grey"), np.full((7, 7), 3.5, np.float32))
    inside = picture[5:-5, 5:-5].reshape(-1, 3)
    assert (inside == inside[0]).all()


def test_colour_map_lightness_increases() -> None:
    """The map is readable in greyscale and with colour blindness."""
    lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(bytes.fromhex, COLOURS)]
    assert lightness == sorted(lightness)
