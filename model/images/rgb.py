"""Converts opened images to upright 8-bit RGB."""

from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from rednet.model.images import first_frame
from rednet.model.images.errors import UnsupportedImage
from rednet.model.images.signatures import REMEDY

ORIENTATION = 274  # EXIF tag
GREY_BITS = {"L;2": 2, "L;4": 4}  # raw modes of PNG files whose samples Pillow scales to 8 bits


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image as 8-bit RGB, rotated by its EXIF orientation, with transparent pixels over white.

    Args:
        image: opened by `open_photo`; its pixels are decoded here unless they have been.

    Raises:
        UnsupportedImage: Pillow's conversion has lost which pixels are transparent.
        OSError, ValueError, SyntaxError and others of Pillow's: the pixels are damaged.
    """
    raw_mode = None
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.format == "PNG":
        raw_mode = image.tile[0].args
    image.load()
    if box := image.info.get(first_frame.KEY):
        image = _on_canvas(image, box)
    with suppress(Exception):  # a broken EXIF block can raise anything, but the photo is usable without it
        ImageOps.exif_transpose(image, in_place=True)
    return _rgb(image, raw_mode)


def _on_canvas(image: Image.Image, box: first_frame.Box) -> Image.Image:
    """Return a frame of an animation on a white canvas. Pillow fills the rest with black or another colour."""
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(_rgb(image, None).crop(box), box)
    with suppress(Exception):  # as above
        canvas.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    return canvas


def _rgb(image: Image.Image, raw_mode: object) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        grey = _eight_bits(values)
        if (transparent := image.info.get("transparency")) is not None:
            grey = Image.fromarray(np.where(values == transparent, np.uint8(255), np.asarray(grey)))
        return grey.convert("RGB")
    if image.has_transparency_data:
        return _over_white(image, raw_mode)
    return image.convert("RGB")


def _over_white(image: Image.Image, raw_mode: object) -> Image.Image:
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        # Pillow has reduced the pixels to 8 bits, so those of exactly this colour can no longer be found.
        raise UnsupportedImage(f"PNG with 16-bit RGB samples and a transparent colour is not supported; {REMEDY}")
    if bits := GREY_BITS.get(str(raw_mode)):  # in units of the file's bit depth, unlike Pillow's pixels
        image.info["transparency"] = int(transparent or 0) * 255 // (2**bits - 1)
    if image.format == "BMP" and image.getchannel("A").getextrema() == (0, 0):  # an unused alpha channel
        return image.convert("RGB")
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # La has no direct conversion
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _eight_bits(values: NDArray[np.generic]) -> Image.Image:
    """Return 8-bit grey. White is the smallest standard maximum (1, 255, 65535) not below the largest sample."""
    largest = float(np.max(values, where=np.isfinite(values), initial=0))
    if values.dtype.itemsize == 2:
        scales = [65535.0]
    else:
        scales = [1.0, 255.0, 65535.0] if values.dtype.kind == "f" else [255.0, 65535.0]
    factor = 255 / next((scale for scale in scales if largest <= scale), largest)
    grey = np.empty(values.shape, np.uint8)
    for row, line in enumerate(values):  # row by row: a large photo as floats would take hundreds of megabytes
        finite = np.nan_to_num(line.astype(np.float32), posinf=largest, neginf=0.0)
        grey[row] = (finite * factor).round().clip(0, 255)
    return Image.fromarray(grey)
