"""Checkpoints that describe themselves, and readers for published ones. Nothing that is read is ever executed.

Ours is one safetensors file: the tensors under their official names, and in the metadata entry `rednet` a JSON text
with architecture, labels, preprocessing, provenance and, if it was quantised, the scales of the int8 network.
"""

import json
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from itertools import chain
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from model.labels import Label, imagenet_labels, numbered_labels
from model.paddle import PaddleError, read_pdparams
from model.preprocess import Preprocess
from model.rednet import BLOCKS, RedNet, RedNetConfig
from model.scales import check

FORMAT = 1
METADATA_KEY = "rednet"
TORCH_PICKLE = b"\x80\x02\x8a\x0a"  # torch before 1.6 wrote pickles, a long magic number first
ASSUMED_LABELS = "labels assumed"  # entry of the provenance: the file has tensors only, and no names of classes
EMBEDDED = "weights/rednet26-imagenette.safetensors"


class CheckpointError(ValueError):
    """A checkpoint file cannot be used; the message says which file and why."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A network in evaluation mode and all that is needed to serve it."""

    net: RedNet
    labels: list[Label]  # one per class, in the order of the logits
    preprocess: Preprocess = field(default_factory=Preprocess)
    name: str
    provenance: Mapping[str, Any] = field(default_factory=dict)  # data, command, seed, versions, accuracy
    calibration: Mapping[str, float] | None = None  # int8 scales, as `model.scales` makes them


def load_checkpoint(path: str | Path | None = None) -> Checkpoint:
    """A checkpoint from a file of ours, an official `.pth` or a PaddleClas `.pdparams`; None: the embedded one.

    Their first bytes tell them apart.

    Raises:
        CheckpointError: the file is missing, damaged, hostile or no RedNet.
    """
    if path is None:
        with resources.as_file(resources.files("model") / EMBEDDED) as embedded:
            return load_checkpoint(embedded)
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # eight bytes of length, which may be any, then JSON: safetensors
            return _load_own(path)
        if start[:4] == b"PK\x03\x04" or start[:4] == TORCH_PICKLE:  # a zip archive, as torch writes it, or as it did
            return _load_official(path)
        if start[:1] == b"\x80":  # any other pickle
            return _load_paddle(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    raise CheckpointError(f"{path} is neither a safetensors file nor a torch checkpoint")


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, *, half: bool = False) -> None:
    """Write our format; the file appears whole or not at all.

    Args:
        path: the file to write.
        checkpoint: what to write.
        half: store weight matrices as float16, half the size. What is added or divided by (biases, batch norms) stays.
    """
    tensors = {}
    for key, value in checkpoint.net.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        tensors[key] = tensor.half() if half and tensor.dim() > 1 else tensor
    description = {
        "format": FORMAT,
        "name": checkpoint.name,
        "config": asdict(checkpoint.net.config),
        "preprocess": asdict(checkpoint.preprocess),
        "labels": checkpoint.labels,
        "provenance": dict(checkpoint.provenance),
    }
    if checkpoint.calibration is not None:
        description["calibration"] = dict(checkpoint.calibration)
    write_atomically(Path(path), save(tensors, {METADATA_KEY: json.dumps(description)}))


def fits_half(net: RedNet) -> bool:
    """Whether `save_checkpoint` at half size would lose nothing: so with weights that were loaded from such a file."""
    return all(torch.equal(weight, weight.half().float()) for weight in net.parameters() if weight.dim() > 1)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is never seen half-written, not even after a kill."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def infer_config(shapes: Mapping[str, Sequence[int]]) -> RedNetConfig:
    """The architecture that tensors of these names and shapes belong to.

    Kernel size and group width show only as the quotient K*K / width, so the paper's 16 channels per group are taken
    as given. Strides leave no trace in tensors; the official ones are assumed.

    Raises:
        ValueError: they belong to no RedNet.
    """
    blocks = tuple(
        len({key.split(".")[2] for key in shapes if key.startswith(f"backbone.layer{stage}.")}) for stage in range(1, 5)
    )
    depth = next((depth for depth, layout in BLOCKS.items() if layout == blocks), None)
    if depth is None:
        raise ValueError(f"it has {blocks} blocks in its stages, which is no RedNet")
    try:
        num_classes = shapes["head.fc.weight"][0]
        half_stem, in_channels = shapes["backbone.stem.0.conv.weight"][:2]
        base_channels = shapes["backbone.layer1.0.conv1.weight"][0]
        bottleneck = shapes["backbone.layer1.0.conv2.conv1.conv.weight"][0]
        kernel = shapes["backbone.layer1.0.conv2.conv2.conv.weight"][0]
        stem_kernel = shapes["backbone.stem.1.conv2.conv.weight"][0]
    except KeyError as error:
        raise ValueError(f"its tensor {error} is missing") from error
    except (IndexError, ValueError) as error:
        raise ValueError("the tensors that tell its width have too few dimensions") from error
    return RedNetConfig(
        depth=depth,
        num_classes=num_classes,
        in_channels=in_channels,
        stem_channels=2 * half_stem,
        base_channels=base_channels,
        kernel_size=isqrt(kernel * 16 // max(1, base_channels)),
        stem_kernel_size=isqrt(stem_kernel * 16 // max(1, half_stem)),
        reduction_ratio=base_channels // max(1, bottleneck),
    )


def _load_own(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if METADATA_KEY not in metadata:
        return _describe_tensors(path, tensors, {})
    try:
        description = json.loads(metadata[METADATA_KEY])
        if description["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {description['format']}; this version reads {FORMAT}")
        config = RedNetConfig(**_with_tuples(description["config"]))
        net = _without_memory(config)
        preprocess = Preprocess(**_with_tuples(description["preprocess"]))
        labels = [Label(str(id_), str(name)) for id_, name in description["labels"]]
        name, provenance = str(description["name"]), dict(description["provenance"])
        calibration = description.get("calibration")
        if calibration is not None:
            calibration = dict(calibration)
            check(net, calibration)
        "".join((name, *chain(*labels))).encode()  # JSON can hold halves of characters, which no answer can
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a description that makes no sense: {error!r}") from error
    _fill(path, net, tensors)
    if len(labels) != config.num_classes:
        raise CheckpointError(f"{path} names {len(labels)} classes for a network of {config.num_classes}")
    return Checkpoint(
        net=net, labels=labels, preprocess=preprocess, name=name, provenance=provenance, calibration=calibration
    )


def _load_official(path: Path) -> Checkpoint:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's own text advises to load without its protection, which nobody should: only what it found is passed on.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" (it names {found[1]})" if found else ""
        raise CheckpointError(f"{path} is damaged or holds more than tensors{what}; it was not loaded") from None
    except Exception as error:  # a damaged zip archive or pickle raises nearly anything
        raise CheckpointError(f"{path} is damaged: {_reason(error)}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        tensors, meta = content["state_dict"], content.get("meta")
    else:
        tensors, meta = content, None
    if not isinstance(tensors, dict) or not all(_is_entry(key, value) for key, value in tensors.items()):
        raise CheckpointError(f"{path} holds no state dict of plain tensors")
    return _describe_tensors(path, tensors, meta if isinstance(meta, dict) else {})


def _load_paddle(path: Path) -> Checkpoint:
    try:
        tensors = read_pdparams(path.read_bytes())
    except PaddleError as error:
        raise CheckpointError(f"{path} was not loaded: {error}") from error
    return _describe_tensors(path, tensors, {})


def _describe_tensors(path: Path, tensors: dict[str, Tensor], meta: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint from bare tensors: what they do not say is inferred or ImageNet's."""
    try:
        config = infer_config({key: tuple(tensor.shape) for key, tensor in tensors.items()})
        net = _without_memory(config)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a RedNet: {error}") from error
    _fill(path, net, tensors)
    provenance = {"converted from": path.name}
    classes = meta.get("CLASSES")
    if isinstance(classes, list | tuple) and len(classes) == config.num_classes:
        labels = [Label(str(name), str(name)) for name in classes]
    elif config.num_classes == 1000:
        labels, provenance[ASSUMED_LABELS] = imagenet_labels(), "ImageNet's"
    else:
        labels, provenance[ASSUMED_LABELS] = numbered_labels(config.num_classes), "numbers"
    return Checkpoint(net=net, labels=labels, name=path.stem, provenance=provenance)


def _is_entry(key: object, value: object) -> bool:
    if not (isinstance(key, str) and isinstance(value, Tensor)):
        return False
    return value.layout is torch.strided and not value.is_nested and not value.is_meta


def _without_memory(config: RedNetConfig) -> RedNet:
    """The network's shapes alone: a file that claims a huge one costs nothing, and nothing is initialised in vain."""
    with torch.device("meta"):
        return RedNet(config).eval()


def _fill(path: Path, net: RedNet, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors into a network without memory, after checking every one of them."""
    wanted = net.state_dict()
    counters = {key: torch.tensor(0) for key in wanted if key.endswith("num_batches_tracked")}
    tensors = counters | dict(tensors)  # some converters leave the counters out; evaluation does not read them
    problems = [f"{key} is missing" for key in wanted.keys() - tensors.keys()]
    problems += [f"{key} is unknown" for key in tensors.keys() - wanted.keys()]
    problems += [
        f"{key} is {list(tensors[key].shape)} instead of {list(wanted[key].shape)}"
        for key in wanted.keys() & tensors.keys()
        if tensors[key].shape != wanted[key].shape
    ]
    problems += [
        f"{key} holds {tensor.dtype} instead of floating point"
        for key, tensor in tensors.items()
        if key not in counters and not tensor.is_floating_point()
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} does not fit {net.config.name}: {'; '.join(sorted(problems)[:3])}{more}")
    floats = {key: tensor if key in counters else tensor.float() for key, tensor in tensors.items()}
    for key, tensor in floats.items():
        if not tensor.isfinite().all() or (key.endswith("running_var") and (tensor < 0).any()):
            raise CheckpointError(f"{path} holds infinities, NaNs or negative variances in {key}")
    net.load_state_dict(floats, assign=True)


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists only; our frozen values hold tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def _reason(error: BaseException) -> str:
    return (str(error).strip().split("\n") or [""])[0][:200] or type(error).__name__
