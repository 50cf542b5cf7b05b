"""Pydantic models for the JSON of Open Inference Protocol requests."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)  # otherwise true and "1" would pass as numbers


class _SharedMemory(_Strict):
    """Parameters of Triton's shared memory extensions. Any value is rejected, with a clear message."""

    shared_memory_region: Any = None
    shared_memory_offset: Any = None
    shared_memory_byte_size: Any = None


class InputParameters(_SharedMemory):
    binary_data_size: int | None = Field(None, ge=0)


class InferInput(_Strict):
    name: Literal["image", "pixels"]
    datatype: str = Field(max_length=16)
    shape: Annotated[list[Annotated[int, Field(ge=0)]], FailFast()] = Field(min_length=1, max_length=4)
    parameters: InputParameters | None = None
    data: list[Any] | None = None


class OutputParameters(_SharedMemory):
    binary_data: bool | None = None
    classification: int | None = Field(None, ge=0)


class InferOutput(_Strict):
    name: Literal["logits", "probabilities", "features", "familiarity"]
    parameters: OutputParameters | None = None


class InferParameters(_Strict):
    """Parameters of a request. Unlisted parameters are accepted and have no effect, as in Triton for a model without
    state or priorities: `sequence_id`, `sequence_start`, `sequence_end`, `priority`, `timeout` (which Triton ignores
    by default; use `X-Request-Timeout-Ms` to set a deadline) and custom ones. As in Triton's HTTP endpoint, names that
    begin with `triton_` are rejected."""

    model_config = ConfigDict(extra="allow")

    binary_data_output: bool | None = None


class InferBody(_Strict):
    """The JSON of an infer request. Unknown fields have no effect, and a null field counts as absent."""

    # The id is echoed and may end up in logs, so that control characters and line separators are not allowed.
    id: str | None = Field(None, max_length=1024, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$")
    inputs: Annotated[list[InferInput], FailFast()] = Field(min_length=1, max_length=1)
    outputs: list[InferOutput] | None = Field(None, max_length=4)
    parameters: InferParameters | None = None
