"""A photo with a heat-map over it."""

import io

import numpy as np
from PIL import Image

from rednet.model.images.preprocess import Preprocess
from rednet.model.images.rgb import upright_rgb
from rednet.service.types import Floats

LONGEST = 1024  # pixels of a picture's longer side
# Viridis, by Nathaniel Smith and Stéfan van der Walt (2015, public domain), at nine even steps. Its lightness rises
# evenly, so that it reads the same for the colour-blind, and in grey.
COLOURS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
COVER = (0.25, 0.8)  # how much of the photo the colour hides: where the map is lowest, and where it is highest
TAIL = 2  # percent of the values at either end that colours do not tell apart: a few would take them all
OUTSIDE = 0.5  # brightness of the photo where there is no map
COMPRESSION = 1  # of the PNG: more would take several times as long, and save a tenth


def _palette() -> Floats:
    """256 colours, [256, 3]."""
    steps = np.array([list(bytes.fromhex(colour)) for colour in COLOURS], np.float32)
    at, every = np.linspace(0, 1, len(COLOURS)), np.linspace(0, 1, 256)
    return np.stack([np.interp(every, at, channel) for channel in steps.T], axis=-1).astype(np.float32)


_PALETTE = _palette()


def draw_overlay(image: Image.Image, grid: Floats, preprocess: Preprocess) -> bytes:
    """The upright photo, in grey under its map: a PNG, its longer side at most 1024 pixels.

    Colours run from the lowest value of the grid to its highest, a few outermost ones left out. Outside of what the
    network sees there is no map, and the photo is darker.

    Args:
        image: the photo; its pixels are read here, if they have not been.
        grid: [h, w], over the part of the photo that the network sees.
        preprocess: says which part that is.

    Raises:
        OSError, ValueError, SyntaxError and others of Pillow's: the file is damaged.
    """
    scale = LONGEST / max(image.size)
    if scale < 1:  # a JPEG is decoded at no more than twice the size that is needed
        image.draft(None, (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    photo = upright_rgb(image)
    photo.thumbnail((LONGEST, LONGEST))
    grey = np.asarray(photo.convert("L"), np.float32)[..., None]  # [H, W, 1]
    drawn = np.asarray(photo, np.float32) * OUTSIDE  # [H, W, 3]
    left, top, right, bottom = (round(edge) for edge in preprocess.box(*photo.size))
    seen = np.s_[top : max(bottom, top + 1), left : max(right, left + 1)]
    height, width = drawn[seen].shape[:2]
    heat = _smooth(grid, width, height)
    cover = (COVER[0] + (COVER[1] - COVER[0]) * heat)[..., None]
    drawn[seen] = grey[seen] * (1 - cover) + _PALETTE[(heat * 255).round().astype(np.uint8)] * cover
    content = io.BytesIO()
    Image.fromarray(drawn.round().astype(np.uint8)).save(content, "PNG", compress_level=COMPRESSION)
    return content.getvalue()


def _smooth(grid: Floats, width: int, height: int) -> Floats:
    """The grid from 0 to 1, [height, width]: smooth between the middles of its cells."""
    low, high = np.percentile(grid, (TAIL, 100 - TAIL))
    unit = ((grid - low) / max(high - low, 1e-12)).clip(0, 1)
    scaled = Image.fromarray(unit.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(scaled).clip(0, 1)
