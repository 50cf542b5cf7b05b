"""Bytes to pixels: the only place that meets hostile images.

What a file claims of itself is checked from its header; pixels are decoded only for what passed.
"""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

from PIL import Image, UnidentifiedImageError

from model.preprocess import FORMATS, Preprocess, has_signature
from service.decode_limits import Cost, max_scanned_pixels
from service.errors import PayloadTooLarge, ServiceError, UnreadableImage, UnsupportedMediaType
from service.overlay import draw_overlay
from service.types import Floats, Pixels

# What a file may make a decoder do. Of 32 MB, a JPEG can make eight million segments, which Pillow reads one after the
# other in Python, or 400,000 passes over all of its pixels, which take hours.
MOST_READS = 200_000
# What begins a scan: a marker, the length of what follows, and the number of components, from which that length comes
# (ITU-T T.81, B.2.3). The marker alone is by chance in what phones append to photos, a film of the moment, say.
SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")

# Our own limit, checked on every image before its pixels are decoded, takes the place of Pillow's, which only warns.
Image.MAX_IMAGE_PIXELS = None


Check = Callable[[Image.Image], None]  # of an image whose header has been read; may raise a ServiceError or TooCostly


class TooCostly(Exception):
    """The image takes more than it may where it was to be decoded.

    Attributes:
        cost: what it is expected to take.
    """

    def __init__(self, cost: Cost) -> None:
        super().__init__(cost)
        self.cost = cost


def decode_image(data: bytes, preprocess: Preprocess, max_pixels: int, check: Check | None = None) -> Pixels:
    """An encoded photo as the network's uint8 pixels [3, crop, crop]; raises what `opened` does."""
    with opened(data, max_pixels, check) as image:
        return preprocess.pixels(image)


def draw_image(data: bytes, grid: Floats, preprocess: Preprocess, max_pixels: int, check: Check | None = None) -> bytes:
    """An encoded photo with a map over it, as `draw_overlay` makes it; raises what `opened` does."""
    with opened(data, max_pixels, check) as image:
        return draw_overlay(image, grid, preprocess)


@contextmanager
def opened(data: bytes, max_pixels: int, check: Check | None = None) -> Iterator[Image.Image]:
    """An encoded photo, its header read and its pixels not yet; also what is done with it raises no other errors.

    Raises:
        UnsupportedMediaType: it is no image, or of a format that is not served.
        PayloadTooLarge: it claims more than max_pixels.
        UnreadableImage: the format is known, the data is broken.
        TooCostly: `check` says so.
    """
    try:
        with Image.open(_CountedReads(data), formats=FORMATS) as image:
            count = image.width * image.height
            if count > max_pixels:
                raise PayloadTooLarge(
                    f"the image has {image.width}x{image.height} pixels; at most {max_pixels} are allowed"
                )
            if data.startswith(b"\xff\xd8") and _has_scans(data, max_scanned_pixels(max_pixels) // count + 1):
                raise UnreadableImage("the JPEG file goes over its pixels too many times")
            if check:
                check(image)
            yield image
    except (ServiceError, TooCostly):
        raise
    except UnidentifiedImageError:
        if has_signature(data):
            raise UnreadableImage("the image's header is damaged") from None
        raise UnsupportedMediaType(f"not an image; {', '.join(FORMATS)} are served") from None
    except MemoryError:
        raise PayloadTooLarge("the image needs more memory than there is") from None
    except Exception as error:  # Pillow's decoders raise nearly anything for damaged data
        raise UnreadableImage(f"the image is damaged: {str(error)[:100]}") from error


def _has_scans(jpeg: bytes, least: int) -> bool:
    return next(islice(SCAN.finditer(jpeg), least - 1, None), None) is not None


class _CountedReads(io.BytesIO):
    """A file that may be read so many times: each time means that Pillow does something in Python."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = MOST_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise UnreadableImage("the image consists of too many parts")
        return super().read(size)
