"""A heat-map lies where the network looked."""

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
    """The picture, [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(draw_overlay(image, grid, PREPROCESS))), np.float32)


def hottest(picture: Floats) -> tuple[float, float]:
    """The middle of what is yellow, as shares of the height and the width."""
    yellow = picture[..., 0] + picture[..., 1] - 2 * picture[..., 2]
    rows, columns = np.nonzero(yellow > 0.9 * yellow.max())
    return float(rows.mean() + 0.5) / picture.shape[0], float(columns.mean() + 0.5) / picture.shape[1]


def spot(row: int, column: int) -> Floats:
    grid = np.zeros((7, 7), np.float32)
    grid[row, column] = 1
    return grid


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 400), (3000, 2000), (120, 120)])
def test_a_cell_lies_where_its_pixels_come_from(width: int, height: int) -> None:
    """In the middle square of the photo, whatever its shape, and however much the picture is smaller."""
    row, column = hottest(drawn(Image.new("RGB", (width, height), "grey"), spot(1, 5)))
    side = min(width, height) * 224 / 256
    assert row * height == pytest.approx((height - side) / 2 + side * 1.5 / 7, abs=0.01 * side)
    assert column * width == pytest.approx((width - side) / 2 + side * 5.5 / 7, abs=0.01 * side)


def test_a_turned_photo_is_shown_upright() -> None:
    """By its EXIF tag, as the network sees it: the map is of the upright photo."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = encoded(Image.new("RGB", (400, 300), "grey"), "JPEG", exif=exif)
    picture = drawn(Image.open(io.BytesIO(data)), spot(1, 3))
    assert picture.shape == (400, 300, 3)
    row, column = hottest(picture)
    assert row * 400 == pytest.approx(68.75 + 262.5 * 1.5 / 7, abs=3)
    assert column * 300 == pytest.approx(150, abs=3)


def test_outside_of_what_the_network_sees_is_only_the_photo() -> None:
    """Darker, in its colours."""
    picture = drawn(photo(width=400, height=300), np.random.default_rng(0).random((7, 7), np.float32))
    expected = np.asarray(photo(width=400, height=300), np.float32) / 2
    left, top = 68, 18  # the square of 262.5 pixels begins at 68.75 and 18.75
    np.testing.assert_allclose(picture[:, :left], expected[:, :left], atol=0.5)
    np.testing.assert_allclose(picture[:top], expected[:top], atol=0.5)
    inside = np.s_[top + 2 : -top - 2, left + 2 : -left - 2]
    assert np.abs(picture[inside] - expected[inside]).mean() > 20


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (5000, 3), (2500, 2500)])
def test_pictures_are_bounded_whatever_the_photo(size: tuple[int, int]) -> None:
    """Also very thin and very small ones are drawn."""
    picture = drawn(Image.new("RGB", size), spot(3, 3))
    assert max(picture.shape) <= MAX_SIDE


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "I;16", "RGBA", "1"])
def test_photos_of_every_mode_are_drawn(mode: str) -> None:
    """As they are classified."""
    image = Image.new(mode, (50, 40)) if mode == "I;16" else photo(width=50, height=40).convert(mode)
    assert drawn(image, spot(3, 3)).shape == (40, 50, 3)


def test_a_map_without_differences_is_even() -> None:
    """No division by nothing."""
    picture = drawn(Image.new("RGB", (64, 64), "grey"), np.full((7, 7), 3.5, np.float32))
    inside = picture[5:-5, 5:-5].reshape(-1, 3)
    assert (inside == inside[0]).all()


def test_colours_grow_lighter_from_low_to_high() -> None:
    """So that they can be read in grey, and by whoever sees other colours."""
    lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(bytes.fromhex, COLOURS)]
    assert lightness == sorted(lightness)
