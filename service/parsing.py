"""The one way from a body's bytes to what it holds, for small bodies on the event loop and large ones in a process."""

import numpy as np

from service import uploads
from service.bodies import BodyFormat, BodyLimits, ParsedBody, Upload
from service.errors import MalformedRequest
from service.tensors import parse_infer
from service.types import Floats

# So many take the parsers about a millisecond: numbers, lists and strings of JSON, and parts of a form.
TOKENS = (b",", b"[", b"{", b'"')
MAX_TOKENS = 5_000
MAX_PARTS = 32


def is_image(body_format: BodyFormat) -> bool:
    """Whether a body is one image as it is: there is nothing to parse."""
    return body_format.protocol == "v1" and uploads.is_image(body_format.content_type)


def is_quick(body_format: BodyFormat, body: bytes) -> bool:
    """Whether a body of up to 200 kB is parsed within a millisecond or two."""
    if is_image(body_format):
        return True
    return body.count(b"\r\n--") <= MAX_PARTS and sum(map(body.count, TOKENS)) <= MAX_TOKENS


def parse_body(body_format: BodyFormat, body: bytes, limits: BodyLimits) -> ParsedBody:
    """Parse a body. One of several images that cannot be used has its error in its place.

    Args:
        body_format: what the request's headers say about it.
        body: from anyone; nothing that it claims is believed.
        limits: what it may hold.

    Raises:
        MalformedRequest: it is not what its format says, or holds no image.
        PayloadTooLarge: it holds more images than limits allow.
    """
    if body_format.protocol == "v1":
        return ParsedBody(uploads.parse_uploads(body_format.content_type, body, limits.max_images))
    parsed = parse_infer(body_format.header_length, body, limits.max_images)
    return ParsedBody([_checked(image, limits) for image in parsed.images], parsed.infer)


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
