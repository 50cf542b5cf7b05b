"""Random changes to training photos: crops, flips and TrivialAugment.

TrivialAugment is Müller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021,
https://arxiv.org/abs/2103.10158, with the narrower of the paper's two sets of ranges ("RA"): the wide ones push much of
a small crop out of the frame. torchvision has it as well, but would be a dependency for these few lines alone.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from rednet.model.images.preprocess import IMAGENET_MEAN, Pixels, scaled_box

MIN_CROP_AREA = 0.35  # relative to the photo's area
MAX_SHEAR = 0.3
MAX_SHIFT = 0.3  # share of the side
MAX_ROTATION = 30.0  # degrees
MAX_ENHANCEMENT = 0.9  # added to or subtracted from 1, which leaves the image as it is
FILL = tuple(round(255 * mean) for mean in IMAGENET_MEAN)  # colour of the border that an operation leaves

Operation = Callable[[Image.Image, float], Image.Image]  # the strength is from -1 to 1


def random_resized_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Pixels:
    """Return a crop of an upright RGB photo, of random area and aspect ratio, mirrored with probability 1/2."""
    width, height = image.size
    area = width * height * rng.uniform(MIN_CROP_AREA, 1)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    pixels = scaled_box(image, (left, top, left + w, top + h), size)
    return pixels[:, :, ::-1].copy() if rng.random() < 0.5 else pixels


def trivial_augment(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Return a crop [3, side, side] after one random operation of random strength."""
    operation = OPERATIONS[int(rng.integers(len(OPERATIONS)))]
    changed = operation(Image.fromarray(pixels.transpose(1, 2, 0)), float(rng.uniform(-1, 1)))
    return np.ascontiguousarray(np.asarray(changed).transpose(2, 0, 1))


def _rotate(image: Image.Image, strength: float) -> Image.Image:
    return image.rotate(MAX_ROTATION * strength, Image.Resampling.BILINEAR, fillcolor=FILL)


def _shear(image: Image.Image, strength: float, *, axis: int) -> Image.Image:
    """Shift each row (axis 0) or column (axis 1) by its distance from the middle, times a factor."""
    factor = MAX_SHEAR * strength
    offset = -factor * image.width / 2
    return _affine(image, (1, factor, offset, 0, 1, 0) if axis == 0 else (1, 0, 0, factor, 1, offset))


def _shift(image: Image.Image, strength: float, *, axis: int) -> Image.Image:
    distance = MAX_SHIFT * strength * image.width
    return _affine(image, (1, 0, distance, 0, 1, 0) if axis == 0 else (1, 0, 0, 0, 1, distance))


def _affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=FILL)


def _enhance(
    image: Image.Image, strength: float, *, kind: Callable[[Image.Image], ImageEnhance._Enhance]
) -> Image.Image:
    return kind(image).enhance(1 + MAX_ENHANCEMENT * strength)


OPERATIONS: tuple[Operation, ...] = (
    lambda image, _: image,
    lambda image, _: ImageOps.autocontrast(image),
    lambda image, _: ImageOps.equalize(image),
    _rotate,
    lambda image, strength: ImageOps.solarize(image, round(255 * (1 - abs(strength)))),
    lambda image, strength: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    partial(_shift, axis=0),
    partial(_shear, axis=0),
    partial(_shift, axis=1),
    partial(_shear, axis=1),
    partial(_enhance, kind=ImageEnhance.Color),
    partial(_enhance, kind=ImageEnhance.Contrast),
    partial(_enhance, kind=ImageEnhance.Brightness),
    partial(_enhance, kind=ImageEnhance.Sharpness),
)
