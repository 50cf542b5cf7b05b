"""The description of what is served: the network, its labels, and the backend that runs it."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from rednet import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rednet import Checkpoint, Prepared


class LabelBody(BaseModel):
    index: int
    id: str = Field(description="short name; for networks trained on folders, the folder's")
    label: str


class ModelBody(BaseModel):
    name: str
    server_version: str = Field(description="version of RedNet Serve")
    architecture: str
    parameters: int
    config: dict[str, Any]
    feature_channels: int = Field(description="length of a feature vector")
    labels: list[LabelBody]
    preprocess: dict[str, Any]
    provenance: dict[str, Any] = Field(description="where the weights come from")
    checkpoint_sha256: str | None = Field(None, description="of the checkpoint file, as `sha256sum` prints it")
    familiarity: bool = Field(False, description="whether answers say how familiar an image looks")
    device: str
    precision: str
    backend: str = Field(description="the implementation that runs the network")
    passed_over: list[str] = Field(description="faster backends that were rejected, with the reason")
    deviation: float = Field(
        description="largest relative error against the reference network, found by the self-check at start"
    )
    max_batch_size: int = Field(1, description="chosen by warm-up, unless set by an option")
    cost_s: dict[int, float] = Field({}, description="seconds per batch, by batch size, measured by warm-up")

    def checkpoint_digits(self) -> str:
        """The first digits of the checkpoint's digest, enough to tell checkpoints apart in logs and metrics."""
        return (self.checkpoint_sha256 or "")[:12]

    def summary(self) -> str:
        """What is served, and how, in a line."""
        return f"{self.name} ({self.checkpoint_digits()}) on {self.device} in {self.precision}: {self.backend}"


def describe(checkpoint: "Checkpoint", prepared: "Sequence[Prepared]") -> ModelBody:
    """Describe a network for `/v1/model` and `rednet info`.

    Args:
        checkpoint: of the network.
        prepared: on each device; precision and backend are the same on all of them.
    """
    net, first = checkpoint.net, prepared[0]
    return ModelBody(
        name=checkpoint.name,
        server_version=__version__,
        architecture=net.config.name,
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        config=asdict(net.config),
        feature_channels=net.config.feature_channels,
        labels=[LabelBody(index=i, id=label.id, label=label.name) for i, label in enumerate(checkpoint.labels)],
        preprocess=asdict(checkpoint.preprocess),
        provenance=dict(checkpoint.provenance),
        checkpoint_sha256=checkpoint.sha256,
        familiarity=checkpoint.familiarity is not None,
        device=",".join(str(each.device) for each in prepared),
        precision=first.precision,
        backend=first.backend,
        passed_over=list(dict.fromkeys(reason for each in prepared for reason in each.rejected_backends)),
        deviation=max(each.max_relative_error for each in prepared),
    )
