"""What is served: the network, its labels, and what runs it."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rednet import Checkpoint, Prepared


class LabelBody(BaseModel):
    index: int
    id: str = Field(description="short name; for networks trained on folders, the folder's")
    label: str


class ModelBody(BaseModel):
    name: str
    architecture: str
    parameters: int
    config: dict[str, Any]
    feature_channels: int = Field(description="length of a feature vector")
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


def describe(checkpoint: "Checkpoint", prepared: "Sequence[Prepared]") -> ModelBody:
    """What `/v1/model` and `rednet info` say of a network and where it runs; precision and backend are the same on all
    devices."""
    net, first = checkpoint.net, prepared[0]
    return ModelBody(
        name=checkpoint.name,
        architecture=net.config.name,
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        config=asdict(net.config),
        feature_channels=net.config.feature_channels,
        labels=[LabelBody(index=i, id=label.id, label=label.name) for i, label in enumerate(checkpoint.labels)],
        preprocess=asdict(checkpoint.preprocess),
        provenance=dict(checkpoint.provenance),
        device=",".join(str(each.device) for each in prepared),
        precision=first.precision,
        backend=first.backend,
        passed_over=list(first.rejected_backends),
        deviation=max(each.max_relative_error for each in prepared),
    )
