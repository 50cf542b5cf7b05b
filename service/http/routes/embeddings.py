"""Feature vectors in the format of OpenAI's embeddings, for vector databases and other clients that speak it.

https://platform.openai.com/docs/api-reference/embeddings
"""

import binascii
import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from rednet.service.errors import MalformedRequest, NotFound, ServiceError
from rednet.service.http.routes.accept import check_accept
from rednet.service.http.routes.context import context
from rednet.service.http.routes.parameters import StrictRoute
from rednet.service.http.routes.v1 import ERRORS, json_response, with_image_index
from rednet.service.http.schemas import EmbeddingsBody, ErrorBody, described_embeddings
from rednet.service.model_description import ModelBody
from rednet.service.parsing.bodies import BodyFormat, ParsedBody
from rednet.service.types import Floats, Inference

router = APIRouter(prefix="/v1", tags=["v1"], route_class=StrictRoute)


@router.post(
    "/embeddings",
    response_model=EmbeddingsBody,
    responses={**ERRORS, 404: {"model": ErrorBody, "description": "not_found: no such model"}},
    openapi_extra=described_embeddings(),
)
async def embeddings(request: Request) -> Response:
    """Compute the feature vector of each image, for clients of OpenAI's embeddings.

    The vectors are those of `/v1/features`. Their length is not 1: compare them by cosine similarity. The format has no
    place for errors of single images: the first image that cannot be read fails the request.
    """
    check_accept(request, "application/json")
    server = context(request)
    check = partial(_check, model=server.pipeline.model)
    found = await server.image_requests.answer(request, BodyFormat("embeddings"), check=check)
    asked = found.embeddings
    assert asked, "this is a bug: an embeddings request was parsed as something else"
    started = time.monotonic()
    inferences: list[Inference] = []
    for index, answer in enumerate(found.images):
        if isinstance(answer.outcome, ServiceError):
            raise with_image_index(index, answer.outcome, len(found.images))
        inferences.append(answer.outcome)
    entries = (
        {"object": "embedding", "index": index, "embedding": _embedding(each.features, asked.as_base64)}
        for index, each in enumerate(inferences)
    )
    fields: dict[str, Any] = {"object": "list", "usage": {"prompt_tokens": 0, "total_tokens": 0}}
    return await json_response(server, fields, "data", entries, found.images, started)


def _check(body: ParsedBody, model: ModelBody) -> None:
    """Refuse a request for other vectors than those of the model: mixed in one database, they would match nothing."""
    asked = body.embeddings
    assert asked
    if asked.model != model.name:
        raise NotFound(f"model: there is no {asked.model[:100]!r}; this server has {model.name!r}")
    if asked.dimensions not in (None, model.feature_channels):
        raise MalformedRequest(f"dimensions: this model has {model.feature_channels}, not {asked.dimensions}")


def _embedding(vector: Floats, as_base64: bool) -> Floats | str:
    if as_base64:
        return binascii.b2a_base64(vector.astype("<f4").tobytes(), newline=False).decode()
    return vector
