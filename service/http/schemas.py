"""The shapes of requests and answers, as the OpenAPI document shows them."""

from typing import Any

from pydantic import BaseModel, Field

Described = dict[int | str, dict[str, Any]]  # what FastAPI takes for the statuses of an endpoint


class ImagesBody(BaseModel):
    """Images as JSON, for callers who have nothing better; base64 makes them a third larger."""

    images: list[str] = Field(
        min_length=1,
        description="encoded photos, as base64 (line breaks, missing padding and the URL-safe alphabet are accepted), "
        "or as data URLs",
    )


class ErrorDetail(BaseModel):
    code: str = Field(description="stable, for programs", examples=["unreadable_image"])
    message: str = Field(description="for people")


class ErrorBody(BaseModel):
    error: ErrorDetail


class ClassScore(BaseModel):
    index: int = Field(description="position among the network's classes")
    label: str
    probability: float


class Prediction(BaseModel):
    classes: list[ClassScore] = Field(description="the likeliest classes, best first")


class AnswerBody(BaseModel):
    model: str
    ignored: list[str] | None = Field(
        None, description="names of the parts of a form that are not images, if there are any"
    )


class PredictBody(AnswerBody):
    predictions: list[Prediction | ErrorBody] = Field(description="one entry per image, in order")


class FeaturesBody(AnswerBody):
    dimension: int
    features: list[list[float] | ErrorBody] = Field(description="one entry per image, in order")


class ExplainedClass(ClassScore):
    logit: float = Field(description="the mean of the grid, plus a constant of the class: the head's bias")


class Explanation(BaseModel):
    explained: ExplainedClass | None = Field(None, alias="class", description="what `class` layers explain")
    grid: list[list[float]] = Field(
        description="rows of values, top to bottom, over the middle of the upright photo: the square whose side is "
        "`crop / resize` of the photo's short side, as `/v1/model` says (`preprocess`)"
    )


class ExplainBody(AnswerBody):
    layer: str
    group: int | None = Field(description="of the kernels; null: the mean of all groups")
    explanations: list[Explanation | ErrorBody] = Field(description="one entry per image, in order")


class StatusBody(BaseModel):
    status: str = Field(examples=["ready"])


def described_errors(body: type[BaseModel]) -> Described:
    """What an endpoint that takes images may answer instead, in a protocol's shape of errors."""
    codes = {
        400: "malformed_request",
        401: "unauthorized, where keys are set",
        408: "request_timeout",
        413: "payload_too_large",
        415: "unsupported_media_type",
        422: "unreadable_image",
        429: "overloaded",
        500: "internal",
        503: "not_ready or draining",
        504: "deadline_exceeded",
    }
    return {status: {"model": body, "description": code} for status, code in codes.items()}


def described_images() -> dict[str, Any]:
    """The request body of every endpoint that takes images: the three ways to send them.

    In a form, a part is an image if it has a file name, an image type or the first bytes of an image, also in base64.
    """
    binary = {"schema": {"type": "string", "format": "binary"}}
    parts = {"type": "object", "additionalProperties": {"type": "string", "format": "binary"}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "image/*": binary,
                "application/octet-stream": binary,
                "multipart/form-data": {"schema": parts},
                "application/json": {"schema": ImagesBody.model_json_schema()},
            },
        }
    }


class InferErrorBody(BaseModel):
    """An error as the Open Inference Protocol has it; `code` is ours, the same as everywhere."""

    error: str = Field(description="for people")
    code: str = Field(description="stable, for programs", examples=["unreadable_image"])


class LiveBody(BaseModel):
    live: bool


class ReadyBody(BaseModel):
    """The protocol's text calls the field live here, too; its servers and clients say ready."""

    ready: bool
    live: bool


class ModelReadyBody(BaseModel):
    name: str
    ready: bool


class ServerBody(BaseModel):
    name: str
    version: str
    extensions: list[str]


class TensorBody(BaseModel):
    name: str
    datatype: str
    shape: list[int] = Field(description="-1: any length")


class ModelMetadataBody(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorBody] = Field(description="a request has one of them")
    outputs: list[TensorBody] = Field(description="all of them, unless a request names some")


class OutputTensorBody(TensorBody):
    data: list[float] | list[str] | None = Field(
        None,
        description="row-major, flat; absent where the values follow the JSON. With `classification`: k in an output's "
        'parameters, its k highest values as text, "value:index:label", datatype BYTES, shape [N, k]',
    )
    parameters: dict[str, int] | None = Field(None, description="`binary_data_size`, where they do")


class InferAnswerBody(BaseModel):
    model_name: str
    model_version: str
    id: str | None = Field(None, description="the request's")
    outputs: list[OutputTensorBody]


def described_infer() -> dict[str, Any]:
    """The request body of infer, by example: JSON alone, or JSON and binary data."""
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["<base64 of a photo>"]}
    example = {"id": "42", "inputs": [tensor], "outputs": [{"name": "probabilities"}]}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"type": "object"}, "example": example},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        }
    }
