"""Reads and writes self-describing checkpoints, and reads published ones. No file's content is ever executed.

Our format is one safetensors file: the tensors under their official names, and in the metadata entry `rednet` a JSON
text with architecture, labels, preprocessing, provenance and, where they were measured, the activation ranges for int8
and what familiarity compares with.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.activation_ranges import validate_ranges
from rednet.model.inference.familiarity import Familiarity
from rednet.model.io.checkpoint_folder import find_checkpoint
from rednet.model.io.labels import Label, imagenet_labels, numbered_labels, unique_labels
from rednet.model.io.output_files import write_atomically
from rednet.model.io.paddle import PaddleError, read_pdparams
from rednet.model.io.state_dicts import class_names, find_state_dict, infer_config
from rednet.model.io.text import clean_json, clean_text
from rednet.model.io.torch_files import TORCH_PICKLE, ZIP, read_torch_file
from rednet.model.io.untrusted_files import UntrustedError, check_safetensors, unique_keys
from rednet.model.nn.rednet import RedNet, RedNetConfig

FORMAT = 1
METADATA_KEY = "rednet"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MAX_NAME, MAX_MESSAGE = 1_000, 1_500  # characters
ASSUMED_LABELS = "labels assumed"  # key in the provenance, where the file has no class names
EMBEDDED = "weights/rednet26-imagenette.safetensors"


class CheckpointError(ValueError):
    """A checkpoint file cannot be used. The message names the file and the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(clean_text(message[:MAX_MESSAGE]))  # it quotes the file, which may hold control characters


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A network in evaluation mode and everything that serving it needs.

    Attributes:
        net: the network.
        labels: one per class, in the order of the logits.
        preprocess: how photos become inputs.
        name: of the model, as the server reports it.
        provenance: data, recipe, versions, accuracy, loss and accuracy of each epoch.
        calibration: activation ranges for int8, from `collect_activation_ranges`; None: not quantised.
        familiarity: tells from logits how familiar a photo looks; None: not measured.
        sha256: digest of the file that it was loaded from, in hexadecimal; None: it was not loaded from a file.

    Example:
        >>> from rednet import create_rednet
        >>> labels = [Label("cat", "cat"), Label("dog", "dog")]
        >>> Checkpoint(net=create_rednet("rednet26", num_classes=2).eval(), labels=labels, name="pets").preprocess.crop
        224
    """

    net: RedNet
    labels: list[Label]
    preprocess: Preprocess = field(default_factory=Preprocess)
    name: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, float] | None = None
    familiarity: Familiarity | None = None
    sha256: str | None = None


def load_checkpoint(path: str | Path | None = None) -> Checkpoint:
    """Load a checkpoint. The format is recognised by the first bytes; nothing in the file is executed.

    Args:
        path: our `.safetensors`, an official `.pth`, a PaddleClas `.pdparams`, or a folder that holds one of them;
            None: the embedded checkpoint.

    Returns:
        A network in evaluation mode on the CPU, with its labels and preprocessing. What the file does not contain is
        inferred from the tensors, or ImageNet's.

    Raises:
        CheckpointError: the file is missing, damaged or hostile, or does not hold a RedNet.

    Example:
        >>> checkpoint = load_checkpoint()
        >>> checkpoint.net.config.name, checkpoint.labels[0].name
        ('rednet26', 'tench')
    """
    with checkpoint_file(path) as file:
        try:
            if file.exists() and not file.is_file():
                raise CheckpointError(f"{file} is not a regular file")  # opening a pipe would block
            before = _version(file)
            checkpoint = replace(_load(file), sha256=_sha256(file))
            if _version(file) != before:
                raise CheckpointError(f"{file} changed while it was being read")
            return checkpoint
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
        except UntrustedError as error:
            raise CheckpointError(f"{file} {error}") from error


@contextmanager
def checkpoint_file(path: str | Path | None) -> Iterator[Path]:
    """Yield the file that `load_checkpoint` reads for `path`; it need not exist.

    Raises:
        CheckpointError: `path` is a folder without a checkpoint, or with several, or its training has not finished.
    """
    if path is None:
        with resources.as_file(resources.files("rednet.model") / EMBEDDED) as embedded:
            yield embedded
        return
    path = Path(path)
    try:
        file = find_checkpoint(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    yield file


def _load(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors: eight bytes of length, with any values, then JSON
        return _load_safetensors(path)
    if start[:4] in (ZIP, TORCH_PICKLE):
        return _load_torch(path)
    if start[:1] == b"\x80":  # any other pickle
        return _load_paddle(path)
    raise CheckpointError(f"{path} is neither a safetensors file nor a torch checkpoint nor one of PaddleClas")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(path: Path) -> tuple[int, int, int]:
    """What differs between two versions of a file."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, *, half: bool = False, replace: bool = True) -> None:
    """Write a checkpoint as safetensors. The write is atomic: the file appears complete or not at all.

    Args:
        path: the file to write.
        checkpoint: what to write.
        half: store weight matrices as float16, which halves the file. Biases and batch norms are stored as they are.
        replace: replace an existing file, as `torch.save` does; false: raise `OutputError` instead.

    Raises:
        ValueError: the network has no classifier.
        OutputError: `path` exists and must not be replaced, or another process is writing it.
        OSError: `path` cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> checkpoint = load_checkpoint()
        >>> with TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/copy.safetensors", checkpoint, half=True)
        ...     load_checkpoint(f"{folder}/copy.safetensors").labels == checkpoint.labels
        True
    """
    if not checkpoint.net.num_classes:
        raise ValueError("a network without a classifier cannot be saved; reset_classifier adds one")
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
    if checkpoint.familiarity is not None:
        description["familiarity"] = asdict(checkpoint.familiarity)
    write_atomically(Path(path), save(tensors, {METADATA_KEY: json.dumps(description)}), replace=replace)


def fits_half(net: RedNet) -> bool:
    """Return whether `save_checkpoint` with `half` is lossless, as for weights that were loaded from such a file."""
    return all(torch.equal(weight, weight.half().float()) for weight in net.parameters() if weight.dim() > 1)


def _load_safetensors(path: Path) -> Checkpoint:
    check_safetensors(path)
    content = path.read_bytes()  # a memory map would crash the process if the file were overwritten meanwhile
    try:
        tensors = load(content)
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing: ")
        raise CheckpointError(f"{path} is damaged or incomplete: {reason}") from error
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    del content
    if METADATA_KEY not in metadata:
        return _describe_tensors(path, tensors)
    with _entry(path, "format"):
        description = json.loads(metadata[METADATA_KEY], object_pairs_hook=unique_keys)
        if description["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {description['format']}; this version reads {FORMAT}")
    with _entry(path, "config"):
        config = RedNetConfig(**_with_tuples(description["config"]))
        net = _on_meta_device(config)
    with _entry(path, "preprocess"):
        preprocess = Preprocess(**_with_tuples(description["preprocess"]))
    with _entry(path, "labels"):
        labels = [Label(_json_name(id_), _json_name(name)) for id_, name in description["labels"]]
    with _entry(path, "name"):
        name = _json_name(description["name"])
    with _entry(path, "provenance"):
        provenance = clean_json(dict(description["provenance"]))
    with _entry(path, "calibration"):
        calibration = description.get("calibration")
        if calibration is not None:
            calibration = dict(calibration)
            validate_ranges(net, calibration)
    with _entry(path, "familiarity"):
        familiarity = description.get("familiarity")
        if familiarity is not None:
            familiarity = Familiarity(**_with_tuples(familiarity))
    _load_weights(path, net, tensors)
    if len(labels) != config.num_classes:
        raise CheckpointError(f"{path} has {len(labels)} labels for {config.num_classes} classes")
    return Checkpoint(
        net=net,
        labels=labels,
        preprocess=preprocess,
        name=name,
        provenance=provenance,
        calibration=calibration,
        familiarity=familiarity,
    )


@contextmanager
def _entry(path: Path, name: str) -> Iterator[None]:
    """Report any error in an entry of the metadata, which may hold any JSON, as a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        reason: object = error
        if isinstance(error, KeyError):
            reason = "it is missing"
        elif isinstance(error, TypeError | AttributeError):
            reason = "it does not have the expected fields and types"
        raise CheckpointError(f"{path} has an invalid description in its metadata: {name}: {reason}") from error


def _load_torch(path: Path) -> Checkpoint:
    content = read_torch_file(path)
    try:
        found = find_state_dict(content)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error
    return _describe_tensors(path, found.tensors, found.source, class_names(content))


def _load_paddle(path: Path) -> Checkpoint:
    try:
        tensors = read_pdparams(path.read_bytes())
    except PaddleError as error:
        raise CheckpointError(f"{path} was not loaded: {error}") from error
    return _describe_tensors(path, tensors)


def _describe_tensors(
    path: Path, tensors: dict[str, Tensor], source: str = "", classes: Sequence[str] | None = None
) -> Checkpoint:
    """Make a checkpoint from tensors alone. The architecture is inferred; preprocessing and labels are ImageNet's."""
    try:
        config = infer_config({key: tuple(tensor.shape) for key, tensor in tensors.items()})
        net = _on_meta_device(config)
        names = [_name(name) for name in classes or ()]
    except ValueError as error:
        raise CheckpointError(f"{path} is not a RedNet: {error}") from error
    _load_weights(path, net, tensors)
    provenance = {"converted from": clean_text(path.name)} | ({"weights": clean_text(source)} if source else {})
    if len(names) == config.num_classes:
        labels = unique_labels(names)
    elif config.num_classes == 1000:
        labels, provenance[ASSUMED_LABELS] = imagenet_labels(), "ImageNet's"
    else:
        labels, provenance[ASSUMED_LABELS] = numbered_labels(config.num_classes), "numbers"
    return Checkpoint(net=net, labels=labels, name=_name(path.stem), provenance=provenance)


def _json_name(value: object) -> str:
    text = str(value)
    text.encode()  # JSON can contain lone surrogates, which cannot be encoded in a response
    return _name(text)


def _name(text: str) -> str:
    """Return a name that can be printed, logged and sent.

    Raises:
        ValueError: it is too long.
    """
    if len(text) > MAX_NAME:
        raise ValueError(f"a name has {len(text)} characters; at most {MAX_NAME} are allowed")
    return clean_text(text)


def _on_meta_device(config: RedNetConfig) -> RedNet:
    """Return a network without memory: a file that claims a huge one costs nothing, and no weight is initialised."""
    with torch.device("meta"):
        return RedNet(config).eval()


def _load_weights(path: Path, net: RedNet, tensors: Mapping[str, Tensor]) -> None:
    """Check all tensors, then load them into a network on the meta device."""
    expected = net.state_dict()
    counters = {key: torch.tensor(0) for key in expected if key.endswith("num_batches_tracked")}
    tensors = counters | dict(tensors)  # some converters omit the counters; evaluation does not use them
    problems = [f"{key} is missing" for key in expected.keys() - tensors.keys()]
    problems += [f"{key} is unknown" for key in tensors.keys() - expected.keys()]
    problems += [
        f"{key} is {list(tensors[key].shape)} instead of {list(expected[key].shape)}"
        for key in expected.keys() & tensors.keys()
        if tensors[key].shape != expected[key].shape
    ]
    problems += [
        f"{key} is {tensor.dtype} instead of floating point"
        for key, tensor in tensors.items()
        if tensor.dtype not in ((*FLOATS, *INTEGERS) if key in counters else FLOATS)
    ]
    # A tensor can be a view that repeats its storage, and several tensors can share one storage: a small file could
    # expand to any number of gigabytes.
    expanded, size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()), path.stat().st_size
    if expanded > size + 8 * len(counters):
        problems.append(f"the tensors have {expanded} bytes, the file {size}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} does not fit {net.config.name}: {'; '.join(sorted(problems)[:3])}{more}")
    floats = {key: tensor if key in counters else tensor.float() for key, tensor in tensors.items()}
    for key, tensor in floats.items():
        if not tensor.isfinite().all() or (key.endswith("running_var") and (tensor < 0).any()):
            raise CheckpointError(f"{path} has infinities, NaNs or negative variances in {key}")
    net.load_state_dict(floats, assign=True)


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Replace JSON's lists by the tuples of our frozen dataclasses."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
