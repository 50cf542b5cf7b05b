"""The state of a training run, and the file from which an interrupted run resumes."""

import hashlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from rednet.model.io.checkpoint import Checkpoint
from rednet.model.io.output_files import write_atomically
from rednet.model.nn.rednet import RedNet
from rednet.model.training.loader import Photo
from rednet.model.training.recipe import Recipe


@dataclass
class State:
    """Everything that changes during a run."""

    net: RedNet
    averaged: RedNet  # moving average of the weights; the network that will be served
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    step: int = 0  # completed batches of this epoch
    loss_sum: float = 0.0  # over the completed batches of this epoch
    history: list[dict[str, float]] = field(default_factory=list)


class ResumeFile:
    """The file from which an interrupted run resumes, next to the run's output.

    Args:
        path: the file.
        recipe, photos, start: the inputs of the run. A run with other inputs is not resumed.
    """

    def __init__(self, path: Path, recipe: Recipe, photos: Sequence[Photo], start: Checkpoint | None) -> None:
        self.path = path
        self.inputs = {
            "recipe": asdict(recipe),
            "set of photos": photos_digest(photos),
            "starting point": start and weights_digest(start.net),
        }

    def save(self, state: State) -> None:
        content = io.BytesIO()
        torch.save(
            {
                **self.inputs,
                "net": state.net.state_dict(),
                "averaged": state.averaged.state_dict(),
                "optimizer": state.optimizer.state_dict(),
                "epoch": state.epoch,
                "step": state.step,
                "loss_sum": state.loss_sum,
                "history": state.history,
            },
            content,
        )
        write_atomically(self.path, content.getvalue())

    def load(self, state: State) -> None:
        """Restore the state of an unfinished run, if there is one.

        Raises:
            ValueError: the file is damaged, or belongs to a run with other inputs.
        """
        if not self.path.exists():
            return
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            inputs = {key: saved[key] for key in self.inputs}
            if inputs == self.inputs:
                state.net.load_state_dict(saved["net"])
                state.averaged.load_state_dict(saved["averaged"])
                state.optimizer.load_state_dict(saved["optimizer"])
                state.epoch, state.step = saved["epoch"], saved["step"]
                state.loss_sum, state.history = saved["loss_sum"], saved["history"]
        except Exception as error:  # a damaged zip archive or pickle can raise anything
            raise ValueError(f"{self.path} is damaged; remove it to start again") from error
        if inputs != self.inputs:
            what = next(name for name in inputs if inputs[name] != self.inputs[name])
            raise ValueError(f"{self.path} is an unfinished run of another {what}; finish that one or remove it")
        print(f"resuming after {state.epoch} epochs and {state.step} batches", file=sys.stderr)


def photos_digest(photos: Sequence[Photo]) -> str:
    """Return a hash of the names and classes of photos, not of their content."""
    data = "\n".join(f"{photo.target} {photo.path.parent.name}/{photo.path.name}" for photo in photos)
    return hashlib.sha256(os.fsencode(data)).hexdigest()


def weights_digest(net: RedNet) -> str:
    """Return a hash of a network's weights."""
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
