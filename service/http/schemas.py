"""The schemas of requests and responses in the OpenAPI document."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rednet.service.triton_extensions import ModelStatistics

Responses = dict[int | str, dict[str, Any]]  # FastAPI's description of the responses of an endpoint, by status


class ImagesBody(BaseModel):
    """Images as JSON, for clients that cannot send files. Base64 makes them a third larger."""

    images: list[str] = Field(
        min_length=1,
        description="encoded images, as base64 (line breaks, missing padding and the URL-safe alphabet are accepted) "
        "or as data URLs",
    )


class ErrorDetail(BaseModel):
    code: str = Field(description="stable and machine-readable", examples=["unreadable_image"])
    message: str = Field(description="human-readable, may change")


class ErrorBody(BaseModel):
    error: ErrorDetail


class ClassScore(BaseModel):
    index: int = Field(description="index of the class, counted from 0")
    id: str = Field(description="id of the class in `/v1/model`")
    label: str
    probability: float


class Prediction(BaseModel):
    classes: list[ClassScore] = Field(description="the most probable classes, best first")
    familiarity: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of held-out training images that look less familiar; below 0.05, the image probably shows "
        "something other than the classes. Absent if `familiarity` in `/v1/model` is false",
    )


class ResponseBody(BaseModel):
    model: str
    ignored: list[str] | None = Field(None, description="names of the form parts that are not images, if any")


class PredictBody(ResponseBody):
    predictions: list[Prediction | ErrorBody] = Field(description="one entry per image, in order")


class FeaturesBody(ResponseBody):
    dimension: int
    features: list[list[float] | ErrorBody] = Field(description="one entry per image, in order")


class EmbeddingsRequestBody(BaseModel):
    """The request of OpenAI's embeddings, with images in place of texts."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="name of the model in `/v1/model`; another one is refused")
    input: str | list[str] = Field(description="one encoded image or a list of them, as data URLs or as base64")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="`base64`: each vector as base64 of little-endian float32"
    )
    dimensions: int | None = Field(None, description="accepted only if it is the length of the model's vectors")
    user: str | None = Field(None, description="ignored")


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int = Field(description="of the image in `input`")
    embedding: list[float] | str = Field(description="the feature vector, as `/v1/features` returns it")


class Usage(BaseModel):
    """Always zero: images have no tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsBody(BaseModel):
    object: Literal["list"]
    data: list[Embedding] = Field(description="one entry per image, in order")
    model: str
    usage: Usage


class ExplainedClass(ClassScore):
    logit: float = Field(description="the mean of the grid plus the bias of the class in the head")


class Explanation(Prediction):
    explained: ExplainedClass | None = Field(
        None, alias="class", description="the explained class, for the layer `class`"
    )
    grid: list[list[float]] = Field(
        description="rows of values, top to bottom. They cover the centre of the upright image: a square whose side is "
        "`crop / resize` of the image's shorter side (`preprocess` in `/v1/model`)"
    )


class ExplainBody(ResponseBody):
    layer: str
    group: int | None = Field(description="group of the kernels; null: mean of all groups")
    explanations: list[Explanation | ErrorBody] = Field(description="one entry per image, in order")


class StatusBody(BaseModel):
    status: str = Field(examples=["ready"])


def described_errors(body: type[BaseModel]) -> Responses:
    """The error responses of an endpoint that takes images, with the protocol's error body."""
    codes = {
        400: "malformed_request",
        401: "unauthorized, if the server requires an API key",
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
    """The request body of the `/v1` endpoints: the three ways to send images.

    The image itself may have any image type; only `application/octet-stream` is named, which generators understand. A
    part of a form is an image if it has a file name or an image type, or begins like an image, also in base64.
    """
    binary = {"type": "string", "format": "binary"}
    parts = {
        "type": "object",
        "required": ["images"],
        "properties": {"images": {"type": "array", "items": binary, "description": "files; other names work as well"}},
    }
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/octet-stream": {"schema": binary},
                "multipart/form-data": {"schema": parts},
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/ImagesBody"},
                    "example": {"images": ["<base64 of a photo>"]},
                },
            },
        }
    }


def described_embeddings() -> dict[str, Any]:
    """The request body of embeddings, with an example."""
    example = {"model": "rednet26-imagenette", "input": ["data:image/jpeg;base64,<base64 of a photo>"]}
    described = described_json(EmbeddingsRequestBody)
    described["requestBody"]["required"] = True
    described["requestBody"]["content"]["application/json"]["example"] = example
    return described


def described_json(body: type[BaseModel]) -> dict[str, Any]:
    """An optional request body in JSON."""
    return {
        "requestBody": {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}}
    }


class InferErrorBody(BaseModel):
    """An error in the format of the Open Inference Protocol, extended by `code`, which is the same as in `/v1`."""

    error: str = Field(description="human-readable, may change")
    code: str = Field(description="stable and machine-readable", examples=["unreadable_image"])


class LiveBody(BaseModel):
    live: bool


class ReadyBody(BaseModel):
    """The specification names the field `live` here as well, while its servers and clients use `ready`."""

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
    inputs: list[TensorBody] = Field(description="a request has exactly one of them")
    outputs: list[TensorBody] = Field(description="all are returned unless the request selects some")


class StatisticsBody(BaseModel):
    model_stats: list[ModelStatistics] = Field(description="one entry, as there is one model")


class RepositoryIndexRequestBody(BaseModel):
    """A body is not required."""

    ready: bool = Field(False, strict=True, description="list only models that take requests")


class OutputTensorBody(TensorBody):
    data: list[float] | list[str] | None = Field(
        None,
        description="flat, in row-major order; absent if the values follow as binary data. With the output parameter "
        '`classification`: k, the k highest values as text "value:index:label", datatype BYTES, shape [N, k]',
    )
    parameters: dict[str, int] | None = Field(None, description="`binary_data_size`, if the values are binary data")


class InferAnswerBody(BaseModel):
    model_name: str
    model_version: str
    id: str | None = Field(None, description="id of the request")
    outputs: list[OutputTensorBody]


def described_infer() -> dict[str, Any]:
    """The request body of infer, with an example: JSON alone, or JSON followed by binary data."""
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["<base64 of a photo>"]}
    example = {"id": "42", "inputs": [tensor], "outputs": [{"name": "probabilities"}]}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/InferBody"}, "example": example},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        }
    }
