"""The `/v1` endpoints: predictions, features, and the description of the model."""

import io
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter, Query, Request, Response

from rednet.service.errors import MalformedRequest, ServiceError, error_body
from rednet.service.http.image_requests import Answers
from rednet.service.http.routes.accept import check_accept, prefers
from rednet.service.http.routes.context import Context, context
from rednet.service.http.routes.parameters import StrictRoute
from rednet.service.http.routes.pieces import comma_separated
from rednet.service.http.routes.respond import respond
from rednet.service.http.schemas import (
    ErrorBody,
    FeaturesBody,
    PredictBody,
    described_errors,
    described_images,
)
from rednet.service.model_description import ModelBody
from rednet.service.parsing.bodies import BodyFormat
from rednet.service.pipeline import Answer
from rednet.service.scores import prediction
from rednet.service.types import Floats, Inference

ERRORS = described_errors(ErrorBody) | {
    406: {"model": ErrorBody, "description": "not_acceptable: the response cannot have a type of `Accept`"}
}
JSON = "application/json"
NPY = "application/x-npy"
MAX_CONTENT_TYPE = 1_000  # characters; a boundary has up to 70

Normalize = Annotated[bool, Query(description="scale each vector to length 1")]

direct = APIRouter(prefix="/v1", tags=["v1"], route_class=StrictRoute)
router = APIRouter(prefix="/v1", tags=["v1"], route_class=StrictRoute)


@direct.post("/predict", response_model=PredictBody, responses=ERRORS, openapi_extra=described_images())
async def predict(
    request: Request,
    top_k: Annotated[int, Query(ge=1, description="classes per image; all of them if there are fewer")] = 5,
) -> Response:
    """Predict the most likely classes of each image.

    Send the image itself as the body, a form with any number of files, or JSON with base64. An image that cannot be
    read has an error in its place; if no image can be read, the response has the status of the first error. A part of a
    form is an image if it has a file name, an image type, or the first bytes of an image; `ignored` names the others.
    """
    check_accept(request, JSON)
    server = context(request)
    answers, ignored = await _answers(request, server)
    started = time.monotonic()
    labels = server.pipeline.model.labels
    predictions = (
        prediction(answer.outcome.logits, answer.familiarity, labels, top_k)
        if isinstance(answer.outcome, Inference)
        else error_body(answer.outcome)
        for answer in answers
    )
    return await json_response(server, ignored, "predictions", predictions, answers, started)


@router.post(
    "/features",
    response_model=FeaturesBody,
    responses=ERRORS,
    openapi_extra=described_images(),
)
async def features(
    request: Request,
    normalize: Normalize = False,
) -> Response:
    """Compute the feature vector of each image: the output of the last stage, averaged over all positions.

    With `Accept: application/x-npy`, the response is that of `/v1/features.npy`.
    """
    check_accept(request, JSON, NPY)
    if prefers(request.headers.get("accept", ""), NPY, JSON):
        return await _features_npy(request, normalize)
    server = context(request)
    answers, ignored = await _answers(request, server)
    started = time.monotonic()
    rows = [_features(answer, normalize) for answer in answers]
    vectors = (error_body(row) if isinstance(row, ServiceError) else row for row in rows)
    dimension = next(len(row) for row in rows if isinstance(row, np.ndarray))
    fields = {**ignored, "dimension": dimension}
    return await json_response(server, fields, "features", vectors, answers, started)


@router.post(
    "/features.npy",
    response_class=Response,
    responses={**ERRORS, 200: {"content": {NPY: {"schema": {"type": "string", "format": "binary"}}}}},
    openapi_extra=described_images(),
)
async def features_npy(request: Request, normalize: Normalize = False) -> Response:
    """Compute the feature vector of each image, as a NumPy file: a float32 array [N, D].

    An array has no place for errors: one image that cannot be read fails the request.
    """
    check_accept(request, NPY)
    return await _features_npy(request, normalize)


@router.get("/model", name="model_description", responses={406: ERRORS[406]})
async def model(request: Request) -> ModelBody:
    """Describe the model: name, architecture, labels, preprocessing, device, and the measured time of batches."""
    check_accept(request, JSON)
    pipeline = context(request).pipeline
    costs = pipeline.client.costs
    return pipeline.model.model_copy(update={"max_batch_size": costs.max_batch_size, "cost_s": dict(costs.seconds)})


async def _features_npy(request: Request, normalize: bool) -> Response:
    server = context(request)
    answers, _ = await _answers(request, server)
    started = time.monotonic()
    rows = []
    for index, answer in enumerate(answers):
        row = _features(answer, normalize)
        if isinstance(row, ServiceError):
            raise with_image_index(index, row, len(answers))
        rows.append(row)
    return await respond(_npy(rows), NPY, answers, server, started)


async def _answers(request: Request, server: Context) -> tuple[Sequence[Answer], dict[str, Any]]:
    answers = await server.image_requests.answer(request, body_format(request))
    return raise_if_all_failed(answers.images), ignored_parts(answers)


def ignored_parts(answers: Answers) -> dict[str, Any]:
    """The response field that names the parts of a form that are not images, if there are any."""
    return {"ignored": list(answers.ignored)} if answers.ignored else {}


def body_format(request: Request) -> BodyFormat:
    """How to parse the body of a `/v1` request.

    Raises:
        MalformedRequest: the Content-Type is too long.
    """
    content_type = request.headers.get("content-type", "")
    if len(content_type) > MAX_CONTENT_TYPE:
        raise MalformedRequest(f"the Content-Type is longer than {MAX_CONTENT_TYPE} characters")
    return BodyFormat("v1", content_type)


def raise_if_all_failed(answers: Sequence[Answer]) -> Sequence[Answer]:
    """The same answers. Raises the first error if no image has an answer."""
    errors = [answer.outcome for answer in answers if isinstance(answer.outcome, ServiceError)]
    if len(errors) == len(answers):
        raise with_image_index(0, errors[0], len(answers))
    return answers


def with_image_index(index: int, error: ServiceError, images: int) -> ServiceError:
    """The error of one image, with the image's index if the request has several."""
    return error.with_message(f"image {index}: {error.message}") if images > 1 else error


def _features(answer: Answer, normalize: bool) -> Floats | ServiceError:
    if isinstance(answer.outcome, ServiceError):
        return answer.outcome
    vector = answer.outcome.features
    if not normalize:
        return vector
    length = float(np.linalg.norm(vector.astype(np.float64)))  # squares of large float32 numbers overflow
    return (vector.astype(np.float64) / max(length, 1e-12)).astype(np.float32)


async def json_response(
    server: Context,
    fields: dict[str, Any],
    name: str,
    entries: Iterable[Any],
    answers: Sequence[Answer],
    started: float,
) -> Response:
    """A JSON response.

    Args:
        fields: the first fields.
        name: of the list with one entry per image.
        entries: may contain arrays.
        server, answers, started: as for `respond`.
    """
    head = orjson.dumps({"model": server.pipeline.model.name, **fields})
    encoded = (orjson.dumps(entry, option=orjson.OPT_SERIALIZE_NUMPY) for entry in entries)
    body = chain([head[:-1] + f',"{name}":['.encode()], comma_separated(encoded), [b"]}"])
    return await respond(body, JSON, answers, server, started)


def _npy(rows: Sequence[Floats]) -> Iterator[bytes]:
    """The pieces of a `.npy` file of the rows."""
    head = io.BytesIO()
    shape = (len(rows), len(rows[0]))
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
    yield head.getvalue()
    for row in rows:
        yield row.astype("<f4").tobytes()
