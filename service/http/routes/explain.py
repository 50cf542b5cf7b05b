"""Explanations: heat maps from the forward pass that predicts."""

import time
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Depends, Query, Request, Response

from rednet.service.errors import MalformedRequest, ServiceError, error_body
from rednet.service.http.routes.accept import check_accept, prefers
from rednet.service.http.routes.context import context
from rednet.service.http.routes.parameters import StrictRoute
from rednet.service.http.routes.respond import respond
from rednet.service.http.routes.v1 import ERRORS, body_format, ignored_parts, json_response, raise_if_all_failed
from rednet.service.http.schemas import ExplainBody, described_images
from rednet.service.model_description import ModelBody
from rednet.service.pipeline import Answer
from rednet.service.scores import prediction, probabilities
from rednet.service.types import ClassActivation, ExplainSpec, KernelSums

JSON, PNG = "application/json", "image/png"
LISTED, MAX_SHOWN_CHARS = 10, 40  # ids and characters of a value in an error message
TOP_K = 5  # predicted classes beside each map in JSON, so that a client need not upload a photo twice
Layer = Literal["class", "stage1", "stage2", "stage3", "stage4"]


class Asked(NamedTuple):
    """The parsed parameters."""

    layer: Layer
    group: int | None
    explain: ExplainSpec


async def _asked(
    request: Request,
    layer: Annotated[
        Layer, Query(description="`class`: what each position adds to a class; `stageN`: the kernels of that stage")
    ] = "class",
    class_: Annotated[
        str | None,
        Query(alias="class", description="for `class`: its index, id or label; by default the predicted class"),
    ] = None,
    group: Annotated[
        int | None, Query(ge=0, description="for `stageN`: the group of channels; by default the mean of all groups")
    ] = None,
) -> Asked:
    """Raises `MalformedRequest` if a parameter does not fit the layer, or its value does not exist."""
    model = context(request).pipeline.model
    if layer == "class":
        if group is not None:
            raise MalformedRequest("group: only layers stage1 to stage4 have groups")
        return Asked(layer, None, ClassActivation(None if class_ is None else _class_index(class_, model)))
    if class_ is not None:
        raise MalformedRequest(f"class: only layer class has classes, not {layer}")
    stage = int(layer.removeprefix("stage")) - 1
    groups = (model.config["base_channels"] << stage) // model.config["group_channels"]
    if group is not None and group >= groups:
        raise MalformedRequest(f"group: {layer} of this network has groups 0 to {groups - 1}")
    return Asked(layer, group, KernelSums(stage, group))


router = APIRouter(prefix="/v1", tags=["v1"], route_class=StrictRoute)


@router.post(
    "/explain",
    response_class=Response,
    responses={
        **ERRORS,
        200: {
            "content": {PNG: {"schema": {"type": "string", "format": "binary"}}},
            "description": "The photo with a heat map over it, from the lowest value (violet) to the highest (yellow).",
        },
    },
    openapi_extra=described_images(),
)
async def explain(
    request: Request,
    asked: Annotated[Asked, Depends(_asked)],
) -> Response:
    """Draw a heat map over a photo, from the same forward pass that predicts.

    `class` is the class activation map: what each position adds to the logit of a class. For this network it is exact,
    not an estimate: the mean of the values is the logit, up to a constant. `stageN` is the sum of the involution kernel
    that the last layer of the stage makes at each position: it shows where the operator aggregates, not why a class was
    chosen.

    A picture explains one image. With `Accept: application/json`, the response is that of `/v1/explain.json`.
    """
    check_accept(request, PNG, JSON)
    return await _explain(request, asked, as_json=prefers(request.headers.get("accept", ""), JSON, PNG))


@router.post("/explain.json", response_model=ExplainBody, responses=ERRORS, openapi_extra=described_images())
async def explain_json(request: Request, asked: Annotated[Asked, Depends(_asked)]) -> Response:
    """Predict the 5 most likely classes of any number of images, and compute the maps that `/v1/explain` draws."""
    check_accept(request, JSON)
    return await _explain(request, asked, as_json=True)


async def _explain(request: Request, asked: Asked, as_json: bool) -> Response:
    server = context(request)
    found = await server.image_requests.answer(request, body_format(request), asked.explain, not as_json)
    answers = raise_if_all_failed(found.images)
    started = time.monotonic()
    if drawn := answers[0].drawn:
        return await respond([drawn.png], PNG, answers, server, started)
    explanations = (_explanation(answer, asked.explain, server.pipeline.model) for answer in answers)
    fields = {**ignored_parts(found), "layer": asked.layer, "group": asked.group}
    return await json_response(server, fields, "explanations", explanations, answers, started)


def _class_index(text: str, model: ModelBody) -> int:
    """The index of a class, given its index, its id, or a label that no other class has."""
    ids = [label.id for label in model.labels]
    if text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < len(ids):
        return int(text)
    if text in ids:
        return ids.index(text)
    labelled = [label.index for label in model.labels if label.label == text]
    if len(labelled) == 1:
        return labelled[0]
    if labelled:
        raise MalformedRequest(f"class: several classes have this label; use an index of {labelled[:LISTED]}")
    some = ", ".join(ids[:LISTED]) + (", ..., see /v1/model" if len(ids) > LISTED else "")
    raise MalformedRequest(
        f"class: {text[:MAX_SHOWN_CHARS]!r} is not an index from 0 to {len(ids) - 1}, a label or one of the ids {some}"
    )


def _explanation(answer: Answer, explain: ExplainSpec, model: ModelBody) -> dict[str, Any]:
    if isinstance(answer.outcome, ServiceError):
        return error_body(answer.outcome)
    inference = answer.outcome
    predicted = prediction(inference.logits, answer.familiarity, model.labels, TOP_K)
    if isinstance(explain, KernelSums):
        return {**predicted, "grid": inference.grid}
    index = int(inference.logits.argmax()) if explain.class_index is None else explain.class_index
    explained = {
        "index": index,
        "id": model.labels[index].id,
        "label": model.labels[index].label,
        "probability": float(probabilities(inference.logits)[index]),
        "logit": float(inference.logits[index]),
    }
    return {**predicted, "class": explained, "grid": inference.grid}
