"""The Open Inference Protocol, version 2, as spoken by KServe, Triton and their clients.

https://github.com/kserve/open-inference-protocol, with Triton's binary tensor data extension.
"""

import time
from itertools import chain
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.routing import APIRoute

from rednet.service import open_inference
from rednet.service.event_loop import in_turns
from rednet.service.http.routes.context import context
from rednet.service.http.routes.parameters import StrictRoute
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
from rednet.service.parsing.oip import HEADER_LENGTH, encode_infer
from rednet.service.types import State

NO_MODEL: Responses = {404: {"model": InferErrorBody, "description": "not_found: no such model or version"}}


async def _named(request: Request, name: Annotated[str, Path(description="of the model")]) -> None:
    open_inference.check_model(context(request).pipeline.model, name)


async def _versioned(
    request: Request,
    name: Annotated[str, Path(description="of the model")],
    version: Annotated[str, Path(description=f"{open_inference.MODEL_VERSION!r}")],
) -> None:
    open_inference.check_model(context(request).pipeline.model, name, version)


router = APIRouter(tags=["v2"], route_class=StrictRoute)


@router.get("/v2")
async def server_metadata() -> ServerBody:
    """Describe the server and the protocol extensions that it supports."""
    return ServerBody(
        name=open_inference.SERVER,
        version=open_inference.server_version(),
        extensions=["binary_tensor_data", *open_inference.EXTENSIONS],
    )


async def metadata(request: Request) -> ModelMetadataBody:
    """Describe inputs and outputs. A request has one of the inputs, and gets all outputs unless it names some."""
    model = context(request).pipeline.model
    return ModelMetadataBody(
        name=model.name,
        versions=[open_inference.MODEL_VERSION],
        platform=open_inference.PLATFORM,
        inputs=[TensorBody(**each._asdict()) for each in open_inference.inputs(model)],
        outputs=[TensorBody(**each._asdict()) for each in open_inference.outputs(model)],
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
    found = await server.image_requests.answer(request, BodyFormat("v2", header_length=header_length))
    answers, asked = found.images, found.infer
    assert asked, "this is a bug: an infer request was parsed as something else"
    started = time.monotonic()
    model = server.pipeline.model
    tensors = await open_inference.output_rows(answers, asked, model)
    fields = {"model_name": model.name, "model_version": open_inference.MODEL_VERSION}
    if asked.id is not None:
        fields["id"] = asked.id
    as_json, tail = encode_infer(fields, tensors, asked.outputs)
    if not any(asked.outputs.values()):
        return await respond(as_json, "application/json", answers, server, started)
    head = [piece async for piece in in_turns(as_json)]
    headers = {HEADER_LENGTH: str(sum(map(len, head)))}
    return await respond(chain(head, tail), "application/octet-stream", answers, server, started, headers)


for path, checks in (
    ("/v2/models/{name}", [Depends(_named)]),
    ("/v2/models/{name}/versions/{version}", [Depends(_versioned)]),
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
