"""Parses the body of an embeddings request: OpenAI's format, with images in place of texts.

https://platform.openai.com/docs/api-reference/embeddings
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from rednet.service.errors import MalformedRequest
from rednet.service.parsing.base64_text import decode_base64
from rednet.service.parsing.bodies import EmbeddingOptions, ParsedBody
from rednet.service.parsing.content_sniffing import begins_like_image
from rednet.service.parsing.json_text import load_json
from rednet.service.parsing.multipart import too_many
from rednet.service.parsing.validation_errors import first_error

TAKES_IMAGES = "this model embeds images, as data URLs or base64, and no text"
MAX_NAME_CHARS = 1024


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class EmbeddingsRequest(BaseModel):
    """The JSON of a request. A null field counts as absent. An unknown field is an error, as it is at OpenAI: it could
    ask for other vectors."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str = Field(max_length=MAX_NAME_CHARS)
    input: Annotated[list[str], FailFast(), BeforeValidator(_as_list)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: Any = None


def parse_embeddings(body: bytes, max_images: int) -> ParsedBody:
    """Parse the images of a body, at least one, in order.

    Raises:
        MalformedRequest: the body does not follow the format, or an input is not an image.
        PayloadTooLarge: there are more than max_images.
    """
    try:
        request = EmbeddingsRequest.model_validate(load_json(body, unique=[b'"input"', b'"model"']))
    except ValidationError as error:
        message = first_error(error)
        raise MalformedRequest(f"{message}; {TAKES_IMAGES}" if message.startswith("input") else message) from None
    if not request.input:
        raise MalformedRequest("the request holds no image")
    if len(request.input) > max_images:
        raise too_many(max_images)
    images = [_image(index, text) for index, text in enumerate(request.input)]
    options = EmbeddingOptions(request.model, request.encoding_format == "base64", request.dimensions)
    return ParsedBody(images, embeddings=options)


def _image(index: int, text: str) -> bytes:
    """The image in an input. Many words are base64, so that what is not a data URL must begin like an image."""
    data = decode_base64(text)
    if isinstance(data, MalformedRequest):
        raise MalformedRequest(f"input.{index}: {data.message}; {TAKES_IMAGES}")
    if not (text[:100].lstrip()[:5].lower() == "data:" or begins_like_image(data)):
        raise MalformedRequest(f"input.{index}: not an image; {TAKES_IMAGES}")
    return data
