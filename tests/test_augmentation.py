"""Random changes to training photos: crops, flips and TrivialAugment."""

import numpy as np
import pytest
from PIL import Image

from rednet.model.images.preprocess import Pixels
from rednet.model.training.augmentation import FILL, OPERATIONS, random_resized_crop, trivial_augment
from tests.conftest import photo

IDENTITY, AUTOCONTRAST, EQUALIZE, ROTATE, SOLARIZE, POSTERIZE, SHIFT_X, SHEAR_X, SHIFT_Y, SHEAR_Y, *ENHANCE = OPERATIONS


def changed(operation: object, strength: float, image: Image.Image) -> Pixels:
    """Return [height, width, 3]."""
    assert callable(operation)
    result = np.asarray(operation(image, strength))
    assert result.shape == (image.height, image.width, 3)
    assert result.dtype == np.uint8
    return result


@pytest.fixture
def square() -> Image.Image:
    """A photo of low contrast, so that stretching it shows."""
    return photo(width=40, height=40).point(lambda value: 50 + value // 2)


def test_random_crop_has_the_requested_size() -> None:
    """It depends on the generator only, and half of the crops are mirrored. Thin photos work, too."""
    image = photo(width=90, height=20)
    crops = [random_resized_crop(image, 16, np.random.default_rng(seed)) for seed in range(20)]
    assert {crop.shape for crop in crops} == {(3, 16, 16)}
    assert np.array_equal(crops[3], random_resized_crop(image, 16, np.random.default_rng(3)))
    assert not np.array_equal(crops[3], crops[4])


@pytest.mark.parametrize("number", range(len(OPERATIONS)))
def test_trivial_augment_operation_keeps_the_size(number: int, square: Image.Image) -> None:
    """At the ends of its range as well, where every operation but the identity changes a photo."""
    for strength in (-1.0, 1.0):
        result = changed(OPERATIONS[number], strength, square)
        assert np.array_equal(result, np.asarray(square)) == (OPERATIONS[number] is IDENTITY)


def test_trivial_augment_geometry_without_strength_is_the_identity(square: Image.Image) -> None:
    for operation in (ROTATE, SHIFT_X, SHEAR_X, SHIFT_Y, SHEAR_Y, *ENHANCE):
        assert np.array_equal(changed(operation, 0.0, square), np.asarray(square))


def test_trivial_augment_shifts_by_up_to_three_tenths_of_the_side(square: Image.Image) -> None:
    """What is shifted in from outside has the mean colour of ImageNet."""
    original, distance = np.asarray(square), 12
    right = changed(SHIFT_X, 1.0, square)
    assert np.array_equal(right[:, :-distance], original[:, distance:])
    assert (right[:, -distance:] == FILL).all()
    down = changed(SHIFT_Y, -1.0, square)
    assert np.array_equal(down[distance:], original[:-distance])
    assert (down[:distance] == FILL).all()


def test_trivial_augment_shears_around_the_middle(square: Image.Image) -> None:
    """The row in the middle hardly moves. The top row moves by three tenths of half the side."""
    line = Image.new("RGB", (41, 41), "black")
    line.paste("white", (20, 0, 21, 41))
    columns = changed(SHEAR_X, 1.0, line)[:, :, 0].argmax(axis=1)
    assert abs(columns[20] - 20) <= 1
    assert abs(columns[0] - 20) == pytest.approx(0.3 * 20, abs=1)
    assert abs(columns[40] - 20) == pytest.approx(0.3 * 20, abs=1)
    rows = changed(SHEAR_Y, 1.0, line.transpose(Image.Transpose.TRANSPOSE))[:, :, 0].argmax(axis=0)
    assert np.array_equal(rows, columns)


def test_trivial_augment_rotates_by_up_to_thirty_degrees() -> None:
    line = Image.new("RGB", (101, 101), "black")
    line.paste("white", (50, 0, 51, 101))
    y, x = np.argwhere(changed(ROTATE, 1.0, line)[:, :, 0] > 128).T
    slope = abs(np.polyfit(y, x, 1)[0])
    assert np.degrees(np.arctan(slope)) == pytest.approx(30, abs=1)


def test_trivial_augment_depends_on_the_generator_only() -> None:
    """Over many photos it uses every operation."""
    crop = np.ascontiguousarray(np.asarray(photo(width=24, height=24)).transpose(2, 0, 1))
    results = [trivial_augment(crop, np.random.default_rng(seed)) for seed in range(60)]
    assert {result.shape for result in results} == {crop.shape}
    assert np.array_equal(results[7], trivial_augment(crop, np.random.default_rng(7)))
    assert 45 <= len({result.tobytes() for result in results}) < 60  # one operation in 14 is the identity
