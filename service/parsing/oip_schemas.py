"""The JSON of an Open Inference Protocol request, as pydantic checks it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)  # true is no number, "1" is none either


class _SharedMemory(_Strict):
    """Parameters of Triton's shared memory extensions; any value at all is refused."""

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
    name: Literal["logits", "probabilities", "features"]
    parameters: OutputParameters | None = None


class InferParameters(_Strict):
    """Parameters of a request. Those not listed are accepted and have no effect on the answer, as in Triton for a model
    without state or priorities: `sequence_id`, `sequence_start`, `sequence_end`, `priority`, `timeout` (Triton's
    default ignores it, too; `X-Request-Timeout-Ms` is the deadline here), and custom ones. Names that begin with
    `triton_` are refused, as Triton's HTTP endpoint does."""

    model_config = ConfigDict(extra="allow")

    binary_data_output: bool | None = None


class InferBody(_Strict):
    """The JSON of an infer request. Unknown fields have no effect, and null is the same as no field."""

    # The id is echoed, perhaps into logs: no control characters, nor the line and paragraph separators.
    id: str | None = Field(None, max_length=1024, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$")
    inputs: Annotated[list[InferInput], FailFast()] = Field(min_length=1, max_length=1)
    outputs: list[InferOutput] | None = Field(None, max_length=3)
    parameters: InferParameters | None = None
