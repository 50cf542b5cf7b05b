"""What the Open Inference Protocol, version 2, says about this server, the same over HTTP and over gRPC.

https://github.com/kserve/open-inference-protocol. There is one model in one version.
"""

import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rednet.service.errors import MalformedRequest, NotFound, ServiceError
from rednet.service.event_loop import in_turns
from rednet.service.model_description import ModelBody
from rednet.service.parsing.bodies import InferOptions
from rednet.service.parsing.oip import Row, highest_values
from rednet.service.pipeline import Answer
from rednet.service.scores import probabilities

if TYPE_CHECKING:
    from rednet.service.types import Floats, Inference

SERVER = "rednet-serve"
PLATFORM = "pytorch_rednet"
MODEL_VERSION = "1"
EXTENSIONS = ("classification", "parameters")  # those that do not depend on the transport


class Tensor(NamedTuple):
    """The description of an input or an output; -1 is the number of images."""

    name: str
    datatype: str
    shape: Sequence[int]


def server_version() -> str:
    return importlib.metadata.version("rednet-serve")


def inputs(model: ModelBody) -> Sequence[Tensor]:
    """The inputs, one of which a request has."""
    side = model.preprocess["crop"]
    return [Tensor("image", "BYTES", [-1]), Tensor("pixels", "FP32", [-1, 3, side, side])]


def outputs(model: ModelBody) -> Sequence[Tensor]:
    """The outputs, all of which a request gets unless it names some."""
    classes = len(model.labels)
    shapes = {"logits": [-1, classes], "probabilities": [-1, classes], "features": [-1, model.feature_channels]}
    if model.familiarity:
        shapes["familiarity"] = [-1]
    return [Tensor(name, "FP32", shape) for name, shape in shapes.items()]


def requested_outputs(asked: InferOptions, model: ModelBody) -> Sequence[str]:
    """The names of the outputs that a request gets, in order.

    Raises:
        MalformedRequest: the model does not have one of them.
    """
    available = [output.name for output in outputs(model)]
    for name in asked.outputs:
        if name not in available:
            raise MalformedRequest(f"outputs: this model has no {name!r}, only {', '.join(available)}")
    return list(asked.outputs) or available


def check_model(model: ModelBody, name: str, version: str | None = None) -> None:
    """Check that a request is for the model that is served.

    Args:
        model: that is served.
        name: requested.
        version: requested; None or empty: any.

    Raises:
        NotFound: there is no such model or version.
    """
    if name != model.name:
        raise NotFound(f"no such model: {name[:100]!r}; this server has {model.name!r}")
    if version and version != MODEL_VERSION:
        raise NotFound(f"no such version of the model: {version[:100]!r}; this server has {MODEL_VERSION!r}")


async def output_rows(answers: Sequence[Answer], asked: InferOptions, model: ModelBody) -> dict[str, Sequence[Row]]:
    """The `requested_outputs` by name, in order, with one row per image.

    Raises:
        ServiceError: the first image without an answer; the protocol has no place for errors of single images.
    """
    inferences: list[Inference] = []
    for index, answer in enumerate(answers):
        if isinstance(answer.outcome, ServiceError):
            raise answer.outcome.with_message(f"image {index}: {answer.outcome.message}")
        inferences.append(answer.outcome)
    available: dict[str, Sequence[Floats]] = {
        "logits": [each.logits for each in inferences],
        "probabilities": [probabilities(each.logits).astype(np.float32) async for each in in_turns(inferences)],
        "features": [each.features for each in inferences],
        "familiarity": [np.array(each.familiarity, np.float32) for each in answers],
    }
    rows: dict[str, Sequence[Row]] = {name: available[name] for name in requested_outputs(asked, model)}
    labels = [label.label for label in model.labels]
    for name, count in asked.classes.items():
        known = labels if name in ("logits", "probabilities") else ()
        rows[name] = [highest_values(row, known, count) async for row in in_turns(available[name])]
    return rows
