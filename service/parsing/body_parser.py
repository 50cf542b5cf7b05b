"""Parses request bodies. Small ones are parsed on the event loop, large ones in another process, by the same code."""

from dataclasses import replace

import numpy as np

from rednet.service.errors import MalformedRequest
from rednet.service.parsing import uploads
from rednet.service.parsing.bodies import BodyFormat, BodyLimits, ParsedBody
from rednet.service.parsing.embeddings import parse_embeddings
from rednet.service.parsing.oip import parse_infer
from rednet.service.types import Floats, Upload

ALWAYS_QUICK_BYTES = 8_000  # any body up to this size is quick to parse
# In larger bodies, so many JSON values or form parts take about a millisecond. Parts are only counted at the start of
# the body, as the check itself must be quick.
MAX_COMMAS = 5_000
MAX_PARTS, COUNTED_BYTES = 32, 32_768


def may_be_image(body_format: BodyFormat) -> bool:
    """Whether a body may be a single unwrapped image, by its headers alone."""
    return body_format.protocol == "v1" and uploads.may_be_image(body_format.content_type)


def is_image(body_format: BodyFormat, start: bytes | memoryview) -> bool:
    """Whether a body that starts with these bytes is a single unwrapped image, so that there is nothing to parse."""
    return may_be_image(body_format) and uploads.is_image(start)


def is_quick(body_format: BodyFormat, body: bytes) -> bool:
    """Whether a body of up to 200 kB can be parsed within a millisecond or two."""
    if len(body) < ALWAYS_QUICK_BYTES or is_image(body_format, body):
        return True
    commas = int(np.count_nonzero(np.frombuffer(body, np.uint8) == ord(",")))  # five times as fast as bytes.count
    return commas <= MAX_COMMAS and body.count(b"\r\n--", 0, COUNTED_BYTES) <= MAX_PARTS


def parse_body(body_format: BodyFormat, body: bytes, limits: BodyLimits) -> ParsedBody:
    """Parse a body. If one of several images is unusable, the list of images holds its error instead.

    Args:
        body_format: as declared by the request's headers.
        body: untrusted.
        limits: on the contents.

    Raises:
        MalformedRequest: the body does not match its format, or holds no image.
        PayloadTooLarge: the body holds more images than allowed.
        UnsupportedMediaType: the body does not match its Content-Type.
    """
    if body_format.protocol == "v1":
        return uploads.parse_uploads(body_format.content_type, body, limits.max_images)
    if body_format.protocol == "embeddings":
        return parse_embeddings(body, limits.max_images)
    return with_checked_pixels(parse_infer(body_format.header_length, body, limits.max_images), limits)


def with_checked_pixels(parsed: ParsedBody, limits: BodyLimits) -> ParsedBody:
    """The same, but with an error in place of pixels that the network cannot take."""
    return replace(parsed, images=[_checked(image, limits) for image in parsed.images])


def _checked(image: Upload, limits: BodyLimits) -> Upload:
    if not isinstance(image, np.ndarray):
        return image
    try:
        return check_pixels(image, limits)
    except MalformedRequest as error:
        return error


def check_pixels(pixels: Floats, limits: BodyLimits) -> Floats:
    """Return normalised pixels [3, side, side] if their values are plausible for a photo.

    Larger values would overflow in the network, because involution multiplies activations with each other.

    Raises:
        MalformedRequest: the pixels have another shape, are not finite or are out of range.
    """
    expected = (3, limits.side, limits.side)
    if pixels.shape != expected:
        raise MalformedRequest(f"pixels must be {list(expected)} for each image, not {list(pixels.shape)}")
    largest = np.abs(pixels).max()
    if not largest <= (limit := limits.max_abs_pixel):  # written so that NaN is rejected
        found = f"the largest magnitude is {largest:g}"
        raise MalformedRequest(f"pixels must be normalised, between -{limit:.1f} and {limit:.1f}; {found}")
    return pixels
