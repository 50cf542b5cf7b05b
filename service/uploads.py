"""A request body to the images in it: the three ways to send them."""

import base64
import binascii
import io
from collections.abc import Sequence

from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header

from service.bodies import Upload
from service.errors import MalformedRequest, PayloadTooLarge
from service.schemas import ImagesBody

MAX_FIELDS = 100  # parts of a form that are no images


def is_image(content_type: str) -> bool:
    """Whether a body of that type is one image as it is, so that there is nothing to parse."""
    return parse_options_header(content_type)[0] not in (b"multipart/form-data", b"application/json")


def parse_uploads(content_type: str, body: bytes, max_images: int) -> Sequence[Upload]:
    """The images of a body, at least one, in order. What is neither a form nor JSON is taken as the image itself.

    Raises:
        MalformedRequest: there are none, or the body is not what its Content-Type says.
        PayloadTooLarge: there are more than max_images.
    """
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        boundary = options.get(b"boundary")
        if not boundary:  # said here: the parser would also say it in the log, for whoever likes to fill that
            raise MalformedRequest("the form's Content-Type names no boundary")
        images: Sequence[Upload] = _parse_form(boundary, body, max_images)
    elif kind == b"application/json":
        images = _parse_json(body, max_images)
    else:
        images = [body] if body else []
    if not images:
        raise MalformedRequest("the request holds no image")
    return images


def _parse_json(body: bytes, max_images: int) -> list[Upload]:
    if body.count(b'"') > 2 * max_images + MAX_FIELDS:  # millions of strings would take a second to parse
        raise too_many(max_images)
    try:
        encoded = ImagesBody.model_validate_json(body).images
    except ValidationError as error:
        raise MalformedRequest(f'JSON must be {{"images": ["<base64>", ...]}}: {first_error(error)}') from None
    if len(encoded) > max_images:
        raise too_many(max_images)
    return [decode_base64(text) for text in encoded]


def decode_base64(text: str) -> Upload:
    """The bytes of an image in JSON: base64, or a data URL."""
    if text.startswith("data:"):  # a data URL, as browsers make them
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return MalformedRequest("not base64")


def _parse_form(boundary: bytes, body: bytes, max_images: int) -> list[Upload]:
    """The file parts of a form, whatever their names; parts without a file name are passed over."""
    files: list[Upload] = []
    parts = 0
    complete = False

    def on_part() -> None:
        nonlocal parts
        parts += 1
        if parts > max_images + MAX_FIELDS:  # here, not at the end: thousands of empty parts take seconds to parse
            raise too_many(max_images)

    def on_field(field: Field) -> None:
        on_part()

    def on_file(file: File) -> None:
        on_part()
        data = file.file_object
        assert isinstance(data, io.BytesIO), "this is a bug: uploads stay in memory, where no disk is written"
        if file.file_name or data.getbuffer().nbytes:  # browsers send an empty, nameless part for an empty input
            files.append(data.getvalue())

    def on_end() -> None:
        nonlocal complete
        complete = True

    try:
        config = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
        parser = FormParser("multipart/form-data", on_field, on_file, on_end, boundary=boundary, config=config)
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequest(f"the form cannot be read: {error}") from error
    if not complete:
        raise MalformedRequest("the form ends before its closing boundary")
    if len(files) > max_images:
        raise too_many(max_images)
    return files


def first_error(error: ValidationError) -> str:
    """Where the first thing wrong with JSON stands, and what it is."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}"


def too_many(max_images: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"more than {max_images} images in one request")
