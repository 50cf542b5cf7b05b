"""Some of Triton's extensions of the Open Inference Protocol: model configuration, statistics, model repository.

https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client.samples import Sample
from pydantic import BaseModel, Field

from rednet.service import open_inference
from rednet.service.pipeline import Pipeline
from rednet.service.types import State

EXTENSIONS = ("model_configuration", "model_repository", "statistics")
DATA_TYPES = {"BYTES": "TYPE_STRING", "FP32": "TYPE_FP32"}
OK = "200"  # the status of a request in the metrics, whatever the protocol
# Triton's states of a model. There, READY is the only one that takes requests.
STATES: Mapping[State, str] = {
    State.STARTING: "LOADING",
    State.READY: "READY",
    State.NO_DECODER: "UNAVAILABLE",
    State.DRAINING: "UNLOADING",
    State.FAILED: "UNAVAILABLE",
}


class ConfigTensor(BaseModel):
    name: str
    data_type: str
    dims: Sequence[int] = Field(description="without the first dimension, the number of images")


class ConfigInput(ConfigTensor):
    optional: bool = Field(True, description="a request has one of the inputs")


class InstanceGroup(BaseModel):
    name: str
    kind: str
    count: int
    gpus: Sequence[int]


class DynamicBatching(BaseModel):
    preferred_batch_size: Sequence[int]


class ModelConfig(BaseModel):
    """The part of Triton's model configuration that has a meaning here."""

    name: str
    platform: str
    backend: str
    max_batch_size: int = Field(description="the most images in one request")
    input: Sequence[ConfigInput]
    output: Sequence[ConfigTensor]
    instance_group: Sequence[InstanceGroup]
    dynamic_batching: DynamicBatching


class Durations(BaseModel):
    count: int
    ns: int = Field(description="sum of the durations, in nanoseconds")


class InferenceStatistics(BaseModel):
    success: Durations = Field(description="requests that were answered with 200, of all endpoints that take images")
    fail: Durations = Field(description="other requests of these endpoints")
    queue: Durations = Field(description="of single images")
    compute_input: Durations = Field(description="decoding, of single images")
    compute_infer: Durations = Field(description="the batch of each image")
    compute_output: Durations = Field(description="encoding, of responses")


class ModelStatistics(BaseModel):
    """What has been counted since the start of the server."""

    name: str
    version: str
    inference_count: int = Field(description="images")
    execution_count: int = Field(description="batches")
    inference_stats: InferenceStatistics


class IndexEntry(BaseModel):
    name: str
    version: str
    state: str
    reason: str


def model_config(pipeline: Pipeline) -> ModelConfig:
    """The configuration that Triton would have for the model: in terms of its tools, a model that batches."""
    model = pipeline.model
    return ModelConfig(
        name=model.name,
        platform=open_inference.PLATFORM,
        backend=model.backend,
        max_batch_size=pipeline.client.max_images,
        input=[ConfigInput(**_tensor(each)) for each in open_inference.inputs(model)],
        output=[ConfigTensor(**_tensor(each)) for each in open_inference.outputs(model)],
        instance_group=[_instances(model.name, device) for device in model.device.split(",")],
        dynamic_batching=DynamicBatching(preferred_batch_size=[pipeline.client.costs.max_batch_size]),
    )


def model_statistics(pipeline: Pipeline) -> ModelStatistics:
    """The statistics of the model, from the metrics of all processes of the server."""
    samples = list(pipeline.metrics.samples())
    images = [each for each in samples if each.name == "rednet_images_total"]
    endpoints = {each.labels["endpoint"] for each in images}

    def requests(succeeded: bool) -> Durations:
        def belongs(labels: Mapping[str, str]) -> bool:
            return labels["endpoint"] in endpoints and (labels["status"] == OK) is succeeded

        return _durations(samples, "rednet_request_duration_seconds", belongs)

    def stage(name: str) -> Durations:
        return _durations(samples, "rednet_stage_duration_seconds", lambda labels: labels["stage"] == name)

    return ModelStatistics(
        name=pipeline.model.name,
        version=open_inference.MODEL_VERSION,
        inference_count=round(sum(each.value for each in images if each.labels["outcome"] == "ok")),
        execution_count=round(sum(each.value for each in samples if each.name == "rednet_batch_size_count")),
        inference_stats=InferenceStatistics(
            success=requests(succeeded=True),
            fail=requests(succeeded=False),
            queue=stage("queue"),
            compute_input=stage("decode"),
            compute_infer=stage("inference"),
            compute_output=stage("respond"),
        ),
    )


def repository_index(pipeline: Pipeline, only_ready: bool) -> Sequence[IndexEntry]:
    """The models of the repository: the one that is served."""
    state = pipeline.state
    if only_ready and state is not State.READY:
        return []
    reason = "" if state is State.READY else str(state)
    return [
        IndexEntry(name=pipeline.model.name, version=open_inference.MODEL_VERSION, state=STATES[state], reason=reason)
    ]


def _tensor(tensor: open_inference.Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "data_type": DATA_TYPES[tensor.datatype], "dims": tensor.shape[1:]}


def _instances(model: str, device: str) -> InstanceGroup:
    kind, _, index = device.partition(":")
    gpus = [int(index or 0)] if kind == "cuda" else []
    return InstanceGroup(name=f"{model}_{device}", kind="KIND_GPU" if gpus else "KIND_CPU", count=1, gpus=gpus)


def _durations(samples: Iterable[Sample], name: str, belongs: Callable[[Mapping[str, str]], bool]) -> Durations:
    """The number and the sum of what some series of a histogram have observed."""
    counts = [each.value for each in samples if each.name == f"{name}_count" and belongs(each.labels)]
    sums = [each.value for each in samples if each.name == f"{name}_sum" and belongs(each.labels)]
    return Durations(count=round(sum(counts)), ns=round(1e9 * sum(sums)))
