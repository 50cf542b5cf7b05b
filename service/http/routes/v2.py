"""The Open Inference Protocol, version 2, as spoken by KServe, Triton and their clients.

https://github.com/kserve/open-inference-protocol, with Triton's binary tensor data extension. There is one model in
one version.
"""

import importlib.metadata
import time
from collections.abc import Sequence
from itertools import chain
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.routing import APIRoute

from rednet.service.errors import NotFound, ServiceError
from rednet.service.http.routes.context import context
from rednet.service.http.routes.parameters import StrictRoute
from rednet.service.http.routes.pieces import in_turns
from rednet.service.http.routes.respond import respond
from rednet.service.http.schemas import (
    InferAnswerBody,
    InferErrorBody,
    ModelMetadataBody,
    ModelReadyBody,
    Responses,
    ServerBody,
    TensorBody,
    described_errors,
    described_infer,
)
from rednet.service.parsing.bodies import BodyFormat
from rednet.service.parsing.oip import HEADER_LENGTH, Row, encode_infer, highest_values
from rednet.service.pipeline import Answer
from rednet.service.scores import probabilities
from rednet.service.types import Floats, Inference, State

VERSION = "1"
NO_MODEL: Responses = {404: {"model": InferErrorBody, "description": "not_found: no such model or version"}}


async def _named(request: Request, name: Annotated[str, Path(description="of the model")]) -> None:
    served = context(request).pipeline.model.name
    if name != served:
        raise NotFound(f"no such model; this server has {served!r}")


async def _versioned(version: Annotated[str, Path(description=f"{VERSION!r}")]) -> None:
    if version != VERSION:
        raise NotFound(f"no such version of the model; this server has {VERSION!r}")


router = APIRouter(tags=["v2"], route_class=StrictRoute)


@router.get("/v2")
async def server_metadata() -> ServerBody:
    """Describe the server and the protocol extensions that it supports."""
    version = importlib.metadata.version("rednet-serve")
    return ServerBody(
        name="rednet-serve", version=version, extensions=["binary_tensor_data", "classification", "parameters"]
    )


async def metadata(request: Request) -> ModelMetadataBody:
    """Describe inputs and outputs. A request has one of the inputs, and gets all outputs unless it names some."""
    model = context(request).pipeline.model
    side, classes = model.preprocess["crop"], len(model.labels)
    return ModelMetadataBody(
        name=model.name,
        versions=[VERSION],
        platform="pytorch_rednet",
        inputs=[
            TensorBody(name="image", datatype="BYTES", shape=[-1]),
            TensorBody(name="pixels", datatype="FP32", shape=[-1, 3, side, side]),
        ],
        outputs=[
            TensorBody(name="logits", datatype="FP32", shape=[-1, classes]),
            TensorBody(name="probabilities", datatype="FP32", shape=[-1, classes]),
            TensorBody(name="features", datatype="FP32", shape=[-1, model.feature_channels]),
        ],
    )


async def ready(request: Request, response: Response) -> ModelReadyBody:
    """200 while the model takes requests, else 503."""
    server = context(request)
    takes_work = server.pipeline.state is State.READY
    response.status_code = 200 if takes_work else 503
    return ModelReadyBody(name=server.pipeline.model.name, ready=takes_work)


async def infer(request: Request) -> Response:
    """Compute logits, probabilities and features of N images.

    The input is either `image`, BYTES `[N]`: encoded photos, in JSON as base64; or `pixels`, FP32 `[N, 3, H, W]`:
    cropped and normalised as described by `/v1/model`. The protocol has no place for errors of single images: the first
    image that cannot be read fails the request.

    With the parameter `classification`: k, an output is BYTES `[N, k]` instead: its k highest values, highest first,
    each as "value:index:label" (`features` have no labels).
    """
    server = context(request)
    header_length = request.headers.get(HEADER_LENGTH)
    answers, asked, _ = await server.image_requests.answer(request, BodyFormat("v2", header_length=header_length))
    assert asked, "this is a bug: an infer request was parsed as something else"
    started = time.monotonic()
    available = await _tensors(answers)
    fields = {"model_name": server.pipeline.model.name, "model_version": VERSION}
    if asked.id is not None:
        fields["id"] = asked.id
    tensors: dict[str, Sequence[Row]] = {name: available[name] for name in asked.outputs}
    labels = [label.label for label in server.pipeline.model.labels]
    for name, count in asked.classes.items():
        known = () if name == "features" else labels
        tensors[name] = [highest_values(row, known, count) async for row in in_turns(available[name])]
    as_json, tail = encode_infer(fields, tensors, asked.outputs)
    if not any(asked.outputs.values()):
        return await respond(as_json, "application/json", answers, server, started)
    head = [piece async for piece in in_turns(as_json)]
    headers = {HEADER_LENGTH: str(sum(map(len, head)))}
    return await respond(chain(head, tail), "application/octet-stream", answers, server, started, headers)


async def _tensors(answers: Sequence[Answer]) -> dict[str, Sequence[Floats]]:
    """The outputs of the network, with one row per image. Raises the first error among the answers."""
    inferences: list[Inference] = []
    for index, answer in enumerate(answers):
        if isinstance(answer.outcome, ServiceError):
            raise answer.outcome.with_message(f"image {index}: {answer.outcome.message}")
        inferences.append(answer.outcome)
    return {
        "logits": [each.logits for each in inferences],
        "probabilities": [probabilities(each.logits).astype(np.float32) async for each in in_turns(inferences)],
        "features": [each.features for each in inferences],
    }


for path, checks in (
    ("/v2/models/{name}", [Depends(_named)]),
    ("/v2/models/{name}/versions/{version}", [Depends(_named), Depends(_versioned)]),
):
    # The router's own prefix: metrics are labelled with route paths, which do not include a prefix that is added later.
    models = APIRouter(prefix=path, dependencies=checks, responses=NO_MODEL, route_class=StrictRoute)
    models.add_api_route("", metadata)
    # A probe may carry a query parameter against caches.
    models.add_api_route("/ready", ready, responses={503: {"model": ModelReadyBody}}, route_class_override=APIRoute)
    models.add_api_route(
        "/infer",
        infer,
        methods=["POST"],
        response_model=InferAnswerBody,
        responses=described_errors(InferErrorBody),
        openapi_extra=described_infer(),
    )
    router.include_router(models)
