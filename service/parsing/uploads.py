"""Parses the body of a `/v1` request: a single unwrapped image, a form, or JSON."""

from collections.abc import Mapping
from typing import Any

from python_multipart.multipart import parse_options_header

from rednet.service.errors import MalformedRequest, UnsupportedMediaType
from rednet.service.parsing.base64_text import decode_base64
from rednet.service.parsing.bodies import ParsedBody
from rednet.service.parsing.content_sniffing import Content, content_of
from rednet.service.parsing.json_text import load_json
from rednet.service.parsing.multipart import parse_form, too_many
from rednet.service.parsing.validation_errors import JSON_TYPES

JSON_SHAPE = 'JSON must be {"images": ["<base64>", ...]}'
MAX_SHOWN = 5  # field names in a message
ADVICE: Mapping[Content, str] = {
    "JSON": "it needs Content-Type: application/json",
    "a form": "its Content-Type must be multipart/form-data with the boundary, which HTTP clients set automatically",
    "a URL-encoded form": "files need multipart/form-data, such as curl -F file=@photo.jpg",
    "base64": 'send the image as it is, or JSON {"images": ["<base64>"]}',
    "a data URL": 'send the image as it is, or JSON {"images": ["<data URL>"]}',
}


def may_be_image(content_type: str) -> bool:
    """Whether a body may be a single unwrapped image, by its Content-Type."""
    kind = _media_type(content_type)
    return not (_is_form(kind) or _is_json(kind))


def is_image(start: bytes | memoryview) -> bool:
    """Whether the decoder should judge a body, by its first `content_sniffing.HEAD_BYTES` bytes."""
    return content_of(start) not in ADVICE


def parse_uploads(content_type: str, body: bytes, max_images: int) -> ParsedBody:
    """Parse the images of a body, at least one, in order.

    Raises:
        MalformedRequest: there are no images, or the body is damaged.
        PayloadTooLarge: there are more than max_images.
        UnsupportedMediaType: the body does not match its Content-Type.
    """
    kind = _media_type(content_type)
    try:
        if _is_form(kind):
            parsed = parse_form(_boundary(content_type), body, max_images)
        elif _is_json(kind):
            parsed = _parse_json(body, max_images)
        else:
            parsed = _parse_image(body)
    except MalformedRequest:
        found = content_of(body)
        if found in ("unknown", "JSON" if _is_json(kind) else "a form"):
            raise
        raise UnsupportedMediaType(f"the body looks like {found}, not like {kind}") from None
    if not parsed.images:
        raise MalformedRequest("the request holds no image")
    return parsed


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _is_form(kind: str) -> bool:
    return kind.startswith("multipart/")


def _is_json(kind: str) -> bool:
    return kind in ("application/json", "text/json") or (kind.startswith("application/") and kind.endswith("+json"))


def _boundary(content_type: str) -> bytes:
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise MalformedRequest("the form's Content-Type has no boundary; HTTP clients add it automatically")
    return boundary


def _parse_image(body: bytes) -> ParsedBody:
    """Accept any body that is not recognised as another kind of content; the decoder judges it."""
    found = content_of(body)
    if found in ADVICE:
        raise UnsupportedMediaType(f"the body is not an image file but {found}: {ADVICE[found]}")
    if not body:
        raise MalformedRequest("the body is empty: send an image file, a form or JSON")
    return ParsedBody([body])


def _parse_json(body: bytes, max_images: int) -> ParsedBody:
    found = load_json(body, unique=[b'"images"'])
    if not isinstance(found, dict):
        raise MalformedRequest(f"{JSON_SHAPE}, not {JSON_TYPES[type(found)]}")
    if "images" not in found:
        names = ", ".join(repr(name[:100]) for name in list(found)[:MAX_SHOWN])
        raise MalformedRequest(f"{JSON_SHAPE}; there is no field 'images'" + (f" but {names}" if names else ""))
    texts: Any = found["images"]
    if not isinstance(texts, list):
        raise MalformedRequest(f"{JSON_SHAPE}; images is {JSON_TYPES[type(texts)]}")
    if len(texts) > max_images:
        raise too_many(max_images)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise MalformedRequest(f"{JSON_SHAPE}; images.{index} is {JSON_TYPES[type(text)]}")
    return ParsedBody([decode_base64(text) for text in texts])
