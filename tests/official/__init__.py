"""What the official RedNet computes, for weights and images that can be rebuilt anywhere.

https://github.com/d-li14/involution, the backbone of its `cls` folder with the naive involution, in float64.

`state_dict_shapes.json.gz` has the names and shapes of all weights. `rednet{26,50,101}.npz` has the outputs for two
inputs, `square` and `wide`: logits [B, 1000], features [B, 2048], and a sample of each stage's map.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rednet import RedNet, create_rednet

FOLDER = Path(__file__).parent
DEPTHS = (26, 50, 101)  # with outputs


class Expected(NamedTuple):
    """The outputs for some images."""

    images: Tensor  # [B, 3, H, W]
    logits: Tensor  # [B, 1000]
    features: Tensor  # [B, 2048]
    stages: list[Tensor]  # of each map, what `sampled` takes


@cache
def shapes() -> Mapping[str, Mapping[str, list[int]]]:
    """The shape of every weight, by name of the architecture and of the weight."""
    loaded: Mapping[str, Mapping[str, list[int]]] = json.loads(
        gzip.decompress((FOLDER / "state_dict_shapes.json.gz").read_bytes())
    )
    return loaded


def network(depth: int) -> RedNet:
    """The network with the weights whose outputs are known."""
    net = create_rednet(f"rednet{depth}").eval()
    net.load_state_dict({key: _weight(key, shape) for key, shape in shapes()[f"rednet{depth}"].items()})
    return net


def outputs(depth: int) -> Iterator[Expected]:
    """What the official code computes with these weights: for square images, then for a wide one."""
    with np.load(FOLDER / f"rednet{depth}.npz") as known:
        for name, images in (("square", _images(1, 2, 224, 224)), ("wide", _images(2, 1, 224, 288))):
            values = {key: torch.from_numpy(known[f"{name}_{key}"]) for key in ("logits", "features")}
            stages = [torch.from_numpy(known[f"{name}_stage{number}"]) for number in range(1, 5)]
            yield Expected(images, values["logits"], values["features"], stages)


def sampled(stage: Tensor) -> Tensor:
    """The part of a stage's map that is stored: 16 channels at every seventh position."""
    return stage[:, :: max(1, stage.shape[1] // 16), ::7, ::7]


def save(net: RedNet, path: Path) -> None:
    """Save a network as the official training does, with classes named "class 0" and so on."""
    classes = tuple(f"class {index}" for index in range(net.config.num_classes))
    momentum = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    meta = {"mmcls_version": "0.10.0", "epoch": 130, "CLASSES": classes, "hook_msgs": {}}
    torch.save({"meta": meta, "state_dict": net.state_dict(), "optimizer": momentum}, path)


def _weight(key: str, shape: list[int]) -> Tensor:
    """A weight made from its name, such that values keep their magnitude through all layers."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1)
    noise = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("running_var"):
        value = np.exp(0.2 * noise)
    elif key.endswith(("running_mean", "bias")):
        value = 0.1 * noise
    elif len(shape) == 1:  # of a batch norm; that of the last one of a block is small, as blocks add up
        value = (0.2 if ".bn3." in key else 1.0) * (1 + 0.1 * noise)
    elif key.endswith((".conv2.conv2.conv.weight", ".stem.1.conv2.conv.weight")):  # generates an involution's kernels
        value = noise * np.sqrt(0.002 / np.prod(shape[1:]))
    else:
        value = noise * np.sqrt(2.0 / np.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32))


def _images(seed: int, batch: int, height: int, width: int) -> Tensor:
    """Normalised images: smooth noise, in which neighbouring pixels are related, as in photos."""
    coarse = np.random.default_rng(seed).standard_normal((batch, 3, 9, 9)).astype(np.float32)
    return interpolate(torch.from_numpy(coarse), (height, width), mode="bilinear", align_corners=True)
