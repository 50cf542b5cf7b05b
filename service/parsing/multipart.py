"""Parses multipart forms and finds the images in them (RFC 2046, RFC 7578).

`bytes.find` locates the parts, which are views of the body. python-multipart loops over the bytes in Python, so that
200 kB of blanks, or of lines that begin like a boundary, take it 35 to 90 ms. It also copies every image.
"""

import binascii
import re
from collections.abc import Iterator
from typing import NamedTuple

from python_multipart.multipart import parse_options_header

from rednet.service.errors import MalformedRequest, PayloadTooLarge
from rednet.service.parsing.base64_text import decode_base64
from rednet.service.parsing.bodies import ParsedBody
from rednet.service.parsing.content_sniffing import begins_like_image, is_encoded_image
from rednet.service.types import Upload

MAX_FIELDS = 100  # parts that are not images
MAX_BOUNDARY_BYTES = 256  # RFC 2046 allows 70
MAX_FALSE_BOUNDARIES = 100  # lines inside parts that begin like the boundary
MAX_HEADER_BYTES = 8_000  # all headers of one part
MAX_HEADER_LINES = 16
MAX_PARAMETERS = 30  # in one header
MAX_NAME_CHARS = 100  # of field names in messages

AFTER_BOUNDARY = re.compile(rb"--|[ \t]*\r?\n")


class Part(NamedTuple):
    """One part of a form.

    Attributes:
        label: the field name, or the position if there is no name, for messages.
        media_type: in lower case; empty if not declared.
        filename: None if not declared; empty if a file input was left empty.
        content: a view of the body, or the decoded content, or the error if it cannot be decoded.
    """

    label: str
    media_type: bytes
    filename: bytes | None
    content: memoryview | bytes | MalformedRequest


def parse_form(boundary: bytes, body: bytes, max_images: int) -> ParsedBody:
    """Parse a form: its images in order, and the labels of the parts that are not images.

    Raises:
        MalformedRequest: the body is not a valid form.
        PayloadTooLarge: the form has too many images or other parts.
    """
    images: list[Upload] = []
    ignored: dict[str, None] = {}  # an ordered set
    others = 0
    for part in _parts(boundary, body):
        image = _image(part)
        if image is not None:
            images.append(image)
        else:
            others += 1
            if part.content:
                ignored[part.label] = None
        if len(images) > max_images:
            raise too_many(max_images)
        if others > MAX_FIELDS:
            raise PayloadTooLarge(f"more than {MAX_FIELDS} parts of the form are not images")
    if not images and ignored:
        raise MalformedRequest(f"the form holds no image, only {', '.join(map(repr, list(ignored)[:5]))}")
    return ParsedBody(images, ignored=list(ignored))


def too_many(max_images: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"more than {max_images} images in one request")


def _image(part: Part) -> Upload | None:
    """The image in a part: a part is an image if it is a file, or by its media type or first bytes. None: no image."""
    if part.media_type.startswith(b"multipart/"):
        raise MalformedRequest(f"{part.label!r} is a form inside the form: send each file as a separate part")
    content = part.content
    if isinstance(content, MalformedRequest):
        return content
    is_image = part.media_type.startswith(b"image/")
    if not content and not part.filename and not is_image:
        return None  # an empty field or file input
    if part.filename is not None or is_image or part.media_type == b"application/octet-stream":
        return content
    if begins_like_image(content):
        return content
    return decode_base64(bytes(content)) if is_encoded_image(content) else None


def _parts(boundary: bytes, body: bytes) -> Iterator[Part]:
    view = memoryview(body)
    for number, (start, end) in enumerate(_sections(boundary, body)):
        # The search includes the line breaks of both boundary lines, for parts without headers or without content.
        headers_end = body.find(b"\r\n\r\n", start - 2, min(end + 2, start + MAX_HEADER_BYTES))
        if headers_end < 0:
            limit = f"within {MAX_HEADER_BYTES} bytes"
            raise MalformedRequest(f"part {number} of the form has no empty line after its headers, {limit}")
        yield _part(number, body[start:headers_end], view[headers_end + 4 : max(headers_end + 4, end)])


def _sections(boundary: bytes, body: bytes) -> Iterator[tuple[int, int]]:
    """The start of each part, after its boundary line, and its end, before the line break of the next boundary."""
    mark = b"--" + boundary
    if len(boundary) > MAX_BOUNDARY_BYTES:
        raise MalformedRequest(f"the form's boundary is longer than {MAX_BOUNDARY_BYTES} bytes")
    position = body.find(mark)
    # RFC 2046 allows text before the first boundary. HTTP clients do not send any, so that it may be a damaged part.
    if position < 0 or body[:position].strip() or not AFTER_BOUNDARY.match(body, position + len(mark)):
        raise MalformedRequest("the form does not begin with the boundary that its Content-Type names")
    start: int | None = None
    false_boundaries = 0
    while position >= 0:
        after = AFTER_BOUNDARY.match(body, position + len(mark))
        if after:
            closes = after[0] == b"--"
            if (start is not None and body[position - 2 : position] != b"\r\n") or not (closes or b"\r" in after[0]):
                raise MalformedRequest("the lines of a form must end with CR and LF, not LF alone")
            if start is not None:
                yield start, position - 2
            if closes:
                if body.find(mark, after.end()) >= 0:
                    raise MalformedRequest("the form goes on after its closing boundary")
                return
            start = after.end()
        else:  # a longer word, which belongs to the content
            false_boundaries += 1
            if false_boundaries > MAX_FALSE_BOUNDARIES:
                raise MalformedRequest("the form's boundary also occurs in its parts")
        position = body.find(b"\n" + mark, position + len(mark)) + 1 or -1
    raise MalformedRequest("the form ends before its closing boundary")


def _part(number: int, block: bytes, raw: memoryview) -> Part:
    headers = _headers(number, block)
    disposition = headers.get(b"content-disposition", b"")
    options = _parameters(number, disposition)
    filename = options.get(b"filename")
    if filename is None and b"*" in disposition:  # `filename*=` (RFC 5987), which python-multipart ignores
        extended = _parameters(number, disposition.replace(b"*", b""))
        filename = next((extended[key] for key in extended if key.startswith(b"filename")), None)
    label = options[b"name"].decode(errors="replace")[:MAX_NAME_CHARS] if options.get(b"name") else f"part {number}"
    media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    encoding = headers.get(b"content-transfer-encoding", b"binary").lower()
    return Part(label, media_type, filename, _decoded(label, encoding, raw))


def _headers(number: int, block: bytes) -> dict[bytes, bytes]:
    lines = block.replace(b"\r\n ", b" ").replace(b"\r\n\t", b" ").split(b"\r\n", MAX_HEADER_LINES) if block else []
    if len(lines) > MAX_HEADER_LINES:
        raise MalformedRequest(f"part {number} of the form has more than {MAX_HEADER_LINES} headers")
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or b"\n" in line:
            raise MalformedRequest(f"part {number} of the form has a damaged header: {_shown(line)}")
        headers[name.strip().lower()] = value.strip()
    return headers


def _shown(header: bytes) -> str:
    return repr(header[:40].decode("latin-1"))


def _parameters(number: int, header: bytes) -> dict[bytes, bytes]:
    if header.count(b";") > MAX_PARAMETERS:
        raise MalformedRequest(f"part {number} of the form has a header with more than {MAX_PARAMETERS} parameters")
    return parse_options_header(header)[1]


def _decoded(label: str, encoding: bytes, raw: memoryview) -> memoryview | bytes | MalformedRequest:
    """Decode the Content-Transfer-Encoding of a part (RFC 2045), which old clients still send."""
    if encoding in (b"binary", b"8bit", b"7bit"):
        return raw
    if encoding == b"quoted-printable":
        return binascii.a2b_qp(raw)
    if encoding != b"base64":
        return MalformedRequest(f"{label!r} has an unknown Content-Transfer-Encoding: {_shown(encoding)}")
    content = decode_base64(bytes(raw))
    return MalformedRequest(f"{label!r}: {content.message}") if isinstance(content, MalformedRequest) else content
