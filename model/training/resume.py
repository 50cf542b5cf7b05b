"""All that changes while a training run goes on, and the file that lets a killed run go on."""

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
    """All that changes while a run goes on."""

    net: RedNet
    averaged: RedNet  # the network that will be served
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    step: int = 0  # batches of this epoch that are done
    loss_sum: float = 0.0  # over this epoch's batches
    history: list[dict[str, float]] = field(default_factory=list)


class ResumeFile:
    """All that a killed run needs to go on, beside the file it was going to write.

    Args:
        path: the file.
        recipe, photos, start: what the run follows; a run that followed others is not taken up.
    """

    def __init__(self, path: Path, recipe: Recipe, photos: Sequence[Photo], start: Checkpoint | None) -> None:
        self.path = path
        self.follows = {
            "recipe": asdict(recipe),
            "set of photos": set_of(photos),
            "starting point": start and fingerprint(start.net),
        }

    def save(self, state: State) -> None:
        content = io.BytesIO()
        torch.save(
            {
                **self.follows,
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
        """Take up an unfinished run, if there is one.

        Raises:
            ValueError: it is damaged, or follows another recipe or other photos.
        """
        if not self.path.exists():
            return
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            follows = {key: saved[key] for key in self.follows}
            if follows == self.follows:
                state.net.load_state_dict(saved["net"])
                state.averaged.load_state_dict(saved["averaged"])
                state.optimizer.load_state_dict(saved["optimizer"])
                state.epoch, state.step = saved["epoch"], saved["step"]
                state.loss_sum, state.history = saved["loss_sum"], saved["history"]
        except Exception as error:  # a damaged zip archive or pickle raises nearly anything
            raise ValueError(f"{self.path} is damaged; remove it to start anew") from error
        if follows != self.follows:
            what = next(name for name in follows if follows[name] != self.follows[name])
            raise ValueError(f"{self.path} is an unfinished run of another {what}; finish that one or remove it")
        print(f"resuming in epoch {state.epoch + 1}, after {state.step} batches", file=sys.stderr)


def set_of(photos: Sequence[Photo]) -> str:
    """Changes with the names and classes of photos, not with what is in them."""
    data = "\n".join(f"{photo.target} {photo.path.parent.name}/{photo.path.name}" for photo in photos)
    return hashlib.sha256(os.fsencode(data)).hexdigest()


def fingerprint(net: RedNet) -> str:
    """Changes with any of a network's weights."""
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
