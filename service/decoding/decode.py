"""Bytes to pixels: the only place that meets hostile images.

What a file claims of itself is checked from its header; pixels are decoded only for what passed.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

from PIL import Image

from rednet.model.images.errors import DamagedImage, UnsupportedImage
from rednet.model.images.opening import Header, open_photo
from rednet.model.images.preprocess import Preprocess
from rednet.service.decoding.limits import Cost, max_scanned_pixels
from rednet.service.decoding.overlay import draw_overlay
from rednet.service.errors import PayloadTooLarge, ServiceError, UnreadableImage, UnsupportedMediaType
from rednet.service.types import Floats, Pixels

# What begins a scan: a marker, the length of what follows, and the number of components, from which that length comes
# (ITU-T T.81, B.2.3). The marker alone is by chance in what phones append to photos, a film of the moment, say.
SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")

Check = Callable[[Header], None]  # may raise a ServiceError or TooCostly


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
    """Open an encoded photo: its header has been read and checked, its pixels have not been decoded.

    Errors inside the block are translated, too: Pillow's decoders raise nearly anything for damaged data.

    Raises:
        UnsupportedMediaType: it is not an image, or of a format or variant that is not served.
        PayloadTooLarge: its header claims more than max_pixels.
        UnreadableImage: the format is known, the data is broken.
        TooCostly: `check` says so.
    """

    def check_header(header: Header) -> None:
        count = header.width * header.height
        if count > max_pixels:
            raise PayloadTooLarge(
                f"the image has {header.width}x{header.height} pixels; at most {max_pixels} are allowed"
            )
        if data.startswith(b"\xff\xd8") and _has_scans(data, max_scanned_pixels(max_pixels) // count + 1):
            raise UnreadableImage("the JPEG file goes over its pixels too many times")
        if check:
            check(header)

    try:
        with open_photo(data, check_header) as image:
            yield image
    except (ServiceError, TooCostly):
        raise
    except UnsupportedImage as error:
        raise UnsupportedMediaType(str(error)) from None
    except DamagedImage as error:
        raise UnreadableImage(str(error)) from None
    except MemoryError:
        raise PayloadTooLarge("the image needs more memory than there is") from None
    except Exception as error:
        raise UnreadableImage(f"the image is damaged: {str(error)[:100]}") from error


def _has_scans(jpeg: bytes, least: int) -> bool:
    return next(islice(SCAN.finditer(jpeg), least - 1, None), None) is not None
