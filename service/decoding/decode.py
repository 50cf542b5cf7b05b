"""Decodes encoded images to pixels. The only code that handles hostile images.

The header is checked first; pixels are decoded only if it passes.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

from PIL import Image

from rednet.model.images.errors import UNDECODED, DamagedImage, UnsupportedImage
from rednet.model.images.opening import Header, open_photo
from rednet.model.images.preprocess import Preprocess
from rednet.service.decoding.limits import Cost, max_scanned_pixels
from rednet.service.decoding.overlay import draw_overlay
from rednet.service.errors import MalformedRequest, PayloadTooLarge, ServiceError, UnreadableImage, UnsupportedMediaType
from rednet.service.types import Floats, Pixels

# Start of a scan (ITU-T T.81, B.2.3): the marker, the length of the scan header, and the number of components, which
# implies that length. The marker alone also occurs by chance in data that phones append to photos, such as videos.
SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")

Check = Callable[[Header], None]  # may raise a ServiceError or TooCostly


class TooCostly(Exception):
    """Decoding the image would cost more than this worker allows.

    Attributes:
        cost: the estimate.
    """

    def __init__(self, cost: Cost) -> None:
        super().__init__(cost)
        self.cost = cost


def decode_image(data: bytes, preprocess: Preprocess, max_pixels: int, check: Check | None = None) -> Pixels:
    """Decode an image to the network's uint8 pixels [3, crop, crop]; raises what `open_checked` raises."""
    with open_checked(data, max_pixels, check) as image:
        return preprocess.pixels(image)


def draw_image(data: bytes, grid: Floats, preprocess: Preprocess, max_pixels: int, check: Check | None = None) -> bytes:
    """Draw a map over an image with `draw_overlay`, as a PNG; raises what `open_checked` raises."""
    with open_checked(data, max_pixels, check) as image:
        return draw_overlay(image, grid, preprocess)


@contextmanager
def open_checked(data: bytes, max_pixels: int, check: Check | None = None) -> Iterator[Image.Image]:
    """Open an encoded image and check its header, without decoding its pixels.

    Errors inside the block are translated as well: Pillow's decoders raise nearly anything for damaged data.

    Raises:
        MalformedRequest: there is no data.
        UnsupportedMediaType: the data is not an image, or its format or variant is not supported.
        PayloadTooLarge: the header claims more than max_pixels.
        UnreadableImage: the format is supported, but the data is damaged.
        TooCostly: raised by `check`.
    """

    if not data:  # the same code as for an empty body: a client that sends no bytes has a defect, not a strange format
        raise MalformedRequest("the image is empty: it has no bytes")

    def check_header(header: Header) -> None:
        _check_size(data, header, max_pixels)
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
        raise PayloadTooLarge("the image needs more memory than the server has") from None
    except Exception as error:
        raise UnreadableImage(UNDECODED) from error


def _check_size(data: bytes, header: Header, max_pixels: int) -> None:
    count = header.width * header.height
    if count > max_pixels:
        raise PayloadTooLarge(f"the image has {header.width}x{header.height} pixels; at most {max_pixels} are allowed")
    max_scans = max_scanned_pixels(max_pixels) // count
    if data.startswith(b"\xff\xd8") and _has_scans(data, max_scans + 1):
        raise UnreadableImage(f"the JPEG has too many scans for its size: more than {max_scans}")


def _has_scans(jpeg: bytes, count: int) -> bool:
    """Whether a JPEG has at least so many scans."""
    return next(islice(SCAN.finditer(jpeg), count - 1, None), None) is not None
