"""The parts that all servers share: decoding, prediction, class names."""

import argparse
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rednet import Checkpoint, load_checkpoint, prepare
from rednet.service.decoding.decode import decode_image
from rednet.service.model_description import LabelBody
from rednet.service.scores import top_classes
from rednet.service.system.cores import usable_cores
from rednet.service.types import Floats, Pixels

MAX_PIXELS = 50_000_000
MAX_BATCH = 8
CLASSES = 10

Network = Callable[[Sequence[Pixels]], Floats]  # photos to logits [B, CLASSES]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("null", "rednet"), required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--frontends", type=int, default=1, help="of this project's server")
    return parser.parse_known_args()[0]  # mosec reads the rest


def set_role(role: str) -> None:
    """Name this process by what it does, for the table of CPU time by role."""
    Path("/proc/self/comm").write_text(role)


@cache
def checkpoint() -> Checkpoint:
    return load_checkpoint()


@cache
def labels() -> Sequence[LabelBody]:
    return [LabelBody(index=i, id=label.id, label=label.name) for i, label in enumerate(checkpoint().labels)]


def decoded(photo: bytes) -> Pixels:
    return decode_image(photo, checkpoint().preprocess, MAX_PIXELS)


def null_network(photos: Sequence[Pixels]) -> Floats:
    """Logits without cost: each photo's mean colours, from every hundredth pixel."""
    logits = np.zeros((len(photos), CLASSES), np.float32)
    for index, photo in enumerate(photos):
        logits[index, :3] = photo[:, ::10, ::10].mean(axis=(1, 2)) / 64
    return logits


def network(model: str) -> Network:
    """The network by name. It is loaded in the calling process, because some servers use several."""
    torch.set_num_threads(usable_cores())
    if model == "null":
        return null_network
    run = prepare(checkpoint().net, checkpoint().preprocess)
    return lambda photos: run(torch.from_numpy(np.stack(photos))).logits.numpy()


def answer(logits: Floats) -> dict[str, Any]:
    return {"predictions": [{"classes": top_classes(logits, labels(), 5)}]}
