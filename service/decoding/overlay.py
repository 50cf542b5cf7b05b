"""Draws heat maps over photos."""

import io

import numpy as np
from PIL import Image

from rednet.model.images.preprocess import Preprocess
from rednet.model.images.rgb import upright_rgb
from rednet.service.types import Floats

MAX_SIDE = 1024  # pixels
# Viridis, by Nathaniel Smith and Stéfan van der Walt (2015, public domain), at nine even steps. Its lightness rises
# evenly, so that it looks the same to colour-blind readers, and in greyscale.
COLOURS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
OPACITY = (0.25, 0.8)  # of the colour over the photo, at the lowest and the highest value of the map
CLIPPED_PERCENT = 2  # of the values at either end; otherwise a few outliers would take up most of the colours
OUTSIDE_BRIGHTNESS = 0.5  # of the photo outside the map
PNG_COMPRESSION = 1  # higher levels take several times as long and save a tenth


def _palette() -> Floats:
    """256 RGB colours, [256, 3]."""
    steps = np.array([list(bytes.fromhex(colour)) for colour in COLOURS], np.float32)
    at, every = np.linspace(0, 1, len(COLOURS)), np.linspace(0, 1, 256)
    return np.stack([np.interp(every, at, channel) for channel in steps.T], axis=-1).astype(np.float32)


_PALETTE = _palette()


def draw_overlay(image: Image.Image, grid: Floats, preprocess: Preprocess) -> bytes:
    """Draw a heat map over the upright photo in greyscale, as a PNG with at most 1024 pixels on its longer side.

    Colours run from the lowest value of the grid to the highest, with outliers clipped. The photo is darkened outside
    the part that the network sees.

    Args:
        image: the photo. Its pixels are decoded here, if they have not been before.
        grid: the map [h, w], of the part of the photo that the network sees.
        preprocess: determines that part.

    Raises:
        OSError, ValueError, SyntaxError and other errors of Pillow: the file is damaged.
    """
    scale = MAX_SIDE / max(image.size)
    if scale < 1:  # decode a JPEG at no more than twice the size that is needed
        image.draft(None, (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    photo = upright_rgb(image)
    photo.thumbnail((MAX_SIDE, MAX_SIDE))
    grey = np.asarray(photo.convert("L"), np.float32)[..., None]  # [H, W, 1]
    drawn = np.asarray(photo, np.float32) * OUTSIDE_BRIGHTNESS  # [H, W, 3]
    left, top, right, bottom = (round(edge) for edge in preprocess.box(*photo.size))
    seen = np.s_[top : max(bottom, top + 1), left : max(right, left + 1)]
    height, width = drawn[seen].shape[:2]
    heat = _smooth(grid, width, height)
    opacity = (OPACITY[0] + (OPACITY[1] - OPACITY[0]) * heat)[..., None]
    drawn[seen] = grey[seen] * (1 - opacity) + _PALETTE[(heat * 255).round().astype(np.uint8)] * opacity
    content = io.BytesIO()
    Image.fromarray(drawn.round().astype(np.uint8)).save(content, "PNG", compress_level=PNG_COMPRESSION)
    return content.getvalue()


def _smooth(grid: Floats, width: int, height: int) -> Floats:
    """The grid scaled to 0..1 and resized to [height, width], interpolated between the centres of its cells."""
    low, high = np.percentile(grid, (CLIPPED_PERCENT, 100 - CLIPPED_PERCENT))
    unit = ((grid - low) / max(high - low, 1e-12)).clip(0, 1)
    scaled = Image.fromarray(unit.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(scaled).clip(0, 1)
