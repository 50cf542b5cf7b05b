"""The Open Inference Protocol, version 2, as spoken by KServe, Triton and their clients.

https://github.com/kserve/open-inference-protocol, with some of Triton's extensions.
"""

import time
from collections.abc import Sequence
from itertools import chain
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError

from rednet.service import open_inference, triton_extensions
from rednet.service.errors import MalformedRequest, PayloadTooLarge
from rednet.service.event_loop import in_turns
from rednet.service.http.routes.context import context
from rednet.service.http.routes.parameters import StrictRoute
from rednet.service.http.routes.respond import respond
from rednet.service.http.schemas import (
    InferAnswerBody,
    InferErrorBody,
    ModelMetadataBody,
    ModelReadyBody,
    RepositoryIndexRequestBody,
    Responses,
    ServerBody,
    StatisticsBody,
    TensorBody,
    described_errors,
    described_infer,
    described_json,
)
from rednet.service.parsing.bodies import BodyFormat, ParsedBody
from rednet.service.parsing.json_text import load_json
from rednet.service.parsing.oip import HEADER_LENGTH, encode_infer
from rednet.service.parsing.validation_errors import first_error
from rednet.service.types import State

MAX_SMALL_BYTES = 1_000  # of a body without images
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
        extensions=["binary_tensor_data", *open_inference.EXTENSIONS, *triton_extensions.EXTENSIONS],
    )


@router.get("/v2/models/stats")
async def statistics(request: Request) -> StatisticsBody:
    """Describe what has been counted since the start of the server, as Triton's statistics extension does.

    The counts are those of `/metrics`, and of all processes of the server. They have no batches by size, and no time of
    the last request.
    """
    return StatisticsBody(model_stats=[triton_extensions.model_statistics(context(request).pipeline)])


@router.post(
    "/v2/repository/index",
    responses={status: described_errors(InferErrorBody)[status] for status in (400, 413)},
    openapi_extra=described_json(RepositoryIndexRequestBody),
)
async def repository_index(request: Request) -> Sequence[triton_extensions.IndexEntry]:
    """List the models: the one that is served, and its state."""
    asked = await _index_request(request)
    return triton_extensions.repository_index(context(request).pipeline, asked.ready)


async def _index_request(request: Request) -> RepositoryIndexRequestBody:
    """The body of a request for the index, which may be empty."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_SMALL_BYTES:
            raise PayloadTooLarge(f"the body has more than {MAX_SMALL_BYTES} bytes")
    try:
        return RepositoryIndexRequestBody.model_validate(load_json(body) if body else {})
    except ValidationError as error:
        raise MalformedRequest(first_error(error)) from None


async def no_shared_memory() -> None:
    raise MalformedRequest("shared memory is not supported; use data or binary data")


async def no_loading() -> None:
    raise MalformedRequest("models cannot be loaded or unloaded; the server loads its checkpoint again after SIGHUP")


for memory in ("systemsharedmemory", "cudasharedmemory"):
    for path in (f"/v2/{memory}", f"/v2/{memory}/{{rest:path}}"):
        router.add_api_route(path, no_shared_memory, methods=["GET", "POST"], include_in_schema=False)
for action in ("load", "unload"):
    path = f"/v2/repository/models/{{name}}/{action}"
    router.add_api_route(path, no_loading, methods=["POST"], include_in_schema=False)


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


async def config(request: Request) -> triton_extensions.ModelConfig:
    """Describe the model as Triton's model configuration does."""
    return triton_extensions.model_config(context(request).pipeline)


async def ready(request: Request, response: Response) -> ModelReadyBody:
    """200 while the model takes requests, else 503."""
    server = context(request)
    takes_work = server.pipeline.state is State.READY
    response.status_code = 200 if takes_work else 503
    return ModelReadyBody(name=server.pipeline.model.name, ready=takes_work)


async def infer(request: Request) -> Response:
    """Compute logits, probabilities and features of N images, and their familiarity if the model has it.

    The input is either `image`, BYTES `[N]`: encoded photos, in JSON as base64; or `pixels`, FP32 `[N, 3, H, W]`:
    cropped and normalised as described by `/v1/model`. The protocol has no place for errors of single images: the first
    image that cannot be read fails the request.

    With the parameter `classification`: k, an output is BYTES `[N, k]` instead: its k highest values, highest first,
    each as "value:index:label" (without a label for `features` and `familiarity`).
    """
    server = context(request)
    model = server.pipeline.model

    def check(body: ParsedBody) -> None:
        assert body.infer, "this is a bug: an infer request was parsed as something else"
        open_inference.requested_outputs(body.infer, model)

    header_length = request.headers.get(HEADER_LENGTH)
    found = await server.image_requests.answer(request, BodyFormat("v2", header_length=header_length), check=check)
    answers, asked = found.images, found.infer
    assert asked
    started = time.monotonic()
    tensors = await open_inference.output_rows(answers, asked, model)
    fields = {"model_name": model.name, "model_version": open_inference.MODEL_VERSION}
    if asked.id is not None:
        fields["id"] = asked.id
    binary = asked.outputs or dict.fromkeys(tensors, asked.binary)
    as_json, tail = encode_infer(fields, tensors, binary)
    if not any(binary.values()):
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
    models.add_api_route("", metadata, name="model_metadata")
    models.add_api_route("/config", config, name="model_config")
    models.add_api_route("/stats", statistics, name="model_statistics")
    # A probe may carry a query parameter against caches.
    models.add_api_route(
        "/ready",
        ready,
        name="model_ready",
        responses={503: {"model": ModelReadyBody}},
        route_class_override=APIRoute,
    )
    models.add_api_route(
        "/infer",
        infer,
        name="model_infer",
        methods=["POST"],
        response_model=InferAnswerBody,
        responses=described_errors(InferErrorBody),
        openapi_extra=described_infer(),
    )
    router.include_router(models)
