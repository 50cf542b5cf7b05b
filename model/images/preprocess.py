"""Converts photos to a network's inputs: one implementation for training, evaluation and serving."""

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rednet.model.images.rgb import upright_rgb

if TYPE_CHECKING:  # decoding processes must not import PyTorch
    from torch import Tensor

Pixels = NDArray[np.uint8]  # [3, H, W], RGB
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of a photo

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_RESIZE = 4096  # pixels of a photo's short side after scaling
MAX_CROP = 1024  # pixels of the input's side; preparing RedNet-26 takes 1.1 GB for it, and 12 GB for 4096
MIN_STD = 1e-6  # quotients are still normal float32 numbers
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}  # both antialias when they shrink


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How photos become network inputs. Stored with the weights, because the weights were trained for it.

    Attributes:
        resize: length of the photo's short side after scaling, in pixels.
        crop: side of the square that is cut from the middle, in pixels.
        interpolation: the resampling filter, with antialiasing.
        mean, std: of RGB values in 0..1. The network's input is (value - mean) / std.

    Raises:
        ValueError: the fields do not describe a crop and a normalisation.

    Example:
        >>> preprocess = Preprocess(resize=256, crop=224)
        >>> pixels = preprocess.pixels(Image.new("RGB", (640, 480)))
        >>> pixels.shape, pixels.dtype
        ((3, 224, 224), dtype('uint8'))
        >>> import torch
        >>> preprocess.normalise(torch.from_numpy(pixels)[None]).dtype
        torch.float32
    """

    resize: int = 256
    crop: int = 224
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not (isinstance(self.crop, int) and isinstance(self.resize, int)):
            raise ValueError(f"crop and resize must be integers, got {self.crop} and {self.resize}")
        if not 1 <= self.crop <= self.resize <= MAX_RESIZE:
            raise ValueError(f"1 <= crop <= resize <= {MAX_RESIZE} must hold, got {self.crop} and {self.resize}")
        if self.crop > MAX_CROP:
            raise ValueError(f"crop must be at most {MAX_CROP}, got {self.crop}")
        if self.interpolation not in FILTERS:
            raise ValueError(f"interpolation must be one of {', '.join(FILTERS)}, got {self.interpolation!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(isfinite, (*self.mean, *self.std))):
            raise ValueError(f"mean and std must be three finite numbers each, got {self.mean} and {self.std}")
        if min(self.std) < MIN_STD or max(map(abs, (*self.mean, *self.std))) > 1 / MIN_STD:
            raise ValueError(f"std must be above 0, and no value extreme, got mean {self.mean}, std {self.std}")

    def pixels(self, image: Image.Image) -> Pixels:
        """Return a photo upright, scaled and cropped, [3, crop, crop]. Decodes a lazily opened file.

        Raises:
            OSError, ValueError, SyntaxError and others of Pillow's: the file is damaged.
        """
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, at a correspondingly lower cost. The decoded photo is at
        # least twice the needed size, so that the antialiasing filter hides the difference.
        scale = 2 * self.resize / min(image.size)
        if scale < 1:
            image.draft(None, (int(image.width * scale), int(image.height * scale)))
        return self.square(upright_rgb(image))

    def square(self, image: Image.Image) -> Pixels:
        """Crop and scale the middle of an upright RGB photo in one step, which computes only the pixels that remain."""
        return scaled_box(image, self.box(*image.size), self.crop, self.interpolation)

    def box(self, width: int, height: int) -> Box:
        """Return the part of an upright photo of that size that the network sees."""
        side = min(width, height) * self.crop / self.resize
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def normalise(self, pixels: "Tensor") -> "Tensor":
        """Return the network's input, float32, for uint8 pixels [B, 3, H, W] on any device."""
        values = pixels.float() / 255
        mean, std = (values.new_tensor(each).reshape(3, 1, 1) for each in (self.mean, self.std))
        return (values - mean) / std


def scaled_box(image: Image.Image, box: Box, side: int, interpolation: str = "bilinear") -> Pixels:
    """Scale the part of an RGB photo inside `box` to [3, side, side]."""
    scaled = image.resize((side, side), FILTERS[interpolation], box=box)
    return np.ascontiguousarray(np.asarray(scaled).transpose(2, 0, 1))
