"""The shapes of requests and answers, as the OpenAPI document shows them."""

from typing import Annotated, Any

from pydantic import BaseModel, FailFast, Field


class ImagesBody(BaseModel):
    """Images as JSON, for callers who have nothing better; base64 makes them a third larger."""

    # FailFast: without it a body of a million wrong entries makes a million error messages
    images: Annotated[list[str], FailFast()] = Field(min_length=1, description="encoded photos, as base64")


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


class PredictBody(BaseModel):
    model: str
    predictions: list[Prediction | ErrorBody] = Field(description="one entry per image, in order")


class FeaturesBody(BaseModel):
    model: str
    dimension: int
    features: list[list[float] | ErrorBody] = Field(description="one entry per image, in order")


class LabelBody(BaseModel):
    index: int
    id: str = Field(description="short name; for networks trained on folders, the folder's")
    label: str


class ModelBody(BaseModel):
    name: str
    architecture: str
    parameters: int
    config: dict[str, Any]
    labels: list[LabelBody]
    preprocess: dict[str, Any]
    provenance: dict[str, Any] = Field(description="where the weights come from")
    device: str
    precision: str
    backend: str = Field(description="what runs the network")
    passed_over: list[str] = Field(description="why faster ways to run it were not taken, if so")
    deviation: float = Field(description="relative distance from the plain network's answers, by the check at start")
    max_batch_size: int = Field(1, description="decided in warm-up, unless by an option")
    cost_s: dict[int, float] = Field({}, description="seconds of a batch by its size, measured in warm-up")


class StatusBody(BaseModel):
    status: str = Field(examples=["ready"])


def described_images() -> dict[str, Any]:
    """The request body of every endpoint that takes images: the three ways to send them."""
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
