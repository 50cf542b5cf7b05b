"""The one way from a body's bytes to what it holds, for small bodies on the event loop and large ones in a process."""

from dataclasses import replace

import numpy as np

from rednet.service.errors import MalformedRequest
from rednet.service.parsing import uploads
from rednet.service.parsing.bodies import BodyFormat, BodyLimits, ParsedBody
from rednet.service.parsing.oip import parse_infer
from rednet.service.types import Floats, Upload

# A body of fewer bytes is quick to parse, whatever it is; in others so many values of JSON, or parts of a form, take
# about a millisecond. Parts are counted at the beginning only: the check itself must be quick.
ALWAYS_QUICK = 8_000
MAX_COMMAS = 5_000
MAX_PARTS, COUNTED_BYTES = 32, 32_768


def may_be_image(body_format: BodyFormat) -> bool:
    """Whether a body may be one image as it is, by its headers alone."""
    return body_format.protocol == "v1" and uploads.may_be_image(body_format.content_type)


def is_image(body_format: BodyFormat, start: bytes | memoryview) -> bool:
    """Whether a body that starts like this is one image as it is: there is nothing to parse."""
    return may_be_image(body_format) and uploads.is_image(start)


def is_quick(body_format: BodyFormat, body: bytes) -> bool:
    """Whether a body of up to 200 kB is parsed within a millisecond or two."""
    if len(body) < ALWAYS_QUICK or is_image(body_format, body):
        return True
    commas = int(np.count_nonzero(np.frombuffer(body, np.uint8) == ord(",")))  # in a fifth of the time of bytes.count
    return commas <= MAX_COMMAS and body.count(b"\r\n--", 0, COUNTED_BYTES) <= MAX_PARTS


def parse_body(body_format: BodyFormat, body: bytes, limits: BodyLimits) -> ParsedBody:
    """Parse a body. One of several images that cannot be used has its error in its place.

    Args:
        body_format: what the request's headers say about it.
        body: from anyone; nothing that it claims is believed.
        limits: what it may hold.

    Raises:
        MalformedRequest: it is not what its format says, or holds no image.
        PayloadTooLarge: it holds more images than limits allow.
        UnsupportedMediaType: it is not what its Content-Type says.
    """
    if body_format.protocol == "v1":
        return uploads.parse_uploads(body_format.content_type, body, limits.max_images)
    parsed = parse_infer(body_format.header_length, body, limits.max_images)
    return replace(parsed, images=[_checked(image, limits) for image in parsed.images])


def _checked(image: Upload, limits: BodyLimits) -> Upload:
    if not isinstance(image, np.ndarray):
        return image
    try:
        return check_pixels(image, limits)
    except MalformedRequest as error:
        return error


def check_pixels(pixels: Floats, limits: BodyLimits) -> Floats:
    """Normalised pixels [3, side, side], if a photo could have them.

    Larger values would overflow, because involution multiplies activations with one another, and an overflow fails the
    whole batch, other requests' images included.

    Raises:
        MalformedRequest: they have another shape, are not finite or are out of range.
    """
    expected = (3, limits.side, limits.side)
    if pixels.shape != expected:
        raise MalformedRequest(f"pixels must be {list(expected)} for each image, not {list(pixels.shape)}")
    if not np.abs(pixels).max() <= (most := limits.max_abs_pixel):  # so that NaN is refused, too
        raise MalformedRequest(f"pixels must be normalised: finite, and between -{most:.1f} and {most:.1f}")
    return pixels
