"""Weights in the format of PaddleClas, and files that only look like it."""

import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rednet import CheckpointError, create_rednet, load_checkpoint
from rednet.model.io.checkpoint import Checkpoint
from rednet.model.io.paddle import PaddleError, read_pdparams
from rednet.service.cli.parser import main


def pdparams(checkpoint: Checkpoint) -> dict[str, Any]:
    """The network with the array names and layouts of PaddleClas."""
    entries: dict[str, Any] = {}
    for key, tensor in checkpoint.net.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        name = key.removeprefix("backbone.").removeprefix("head.")
        name = name.replace("running_mean", "_mean").replace("running_var", "_variance")
        entries[name] = tensor.t().numpy() if name == "fc.weight" else tensor.numpy()
    return entries | {"StructuredToParameterName@@": {name: f"param_{name}" for name in entries}}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("ordered", [False, True])
def test_convert_pdparams_keeps_every_weight(tiny_path: Path, tmp_path: Path, protocol: int, ordered: bool) -> None:
    """Bit for bit, for every pickle protocol in use, with `rednet convert`."""
    tiny = load_checkpoint(tiny_path)
    entries = pdparams(tiny)
    file = tmp_path / "RedNet.pdparams"
    file.write_bytes(pickle.dumps(OrderedDict(entries) if ordered else entries, protocol))
    assert main(["convert", str(file), str(tmp_path / "x.safetensors")]) == 0
    converted = load_checkpoint(tmp_path / "x.safetensors")
    assert converted.net.config == tiny.net.config
    for key, tensor in tiny.net.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(converted.net.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ["rednet26", "rednet38", "rednet50", "rednet101", "rednet152"])
def test_pdparams_of_every_depth_are_recognised(name: str, tmp_path: Path) -> None:
    """The arrays alone determine the depth."""
    net = create_rednet(name, num_classes=7, base_channels=16, stem_channels=32).eval()
    file = tmp_path / "x.pdparams"
    file.write_bytes(pickle.dumps(pdparams(Checkpoint(net=net, labels=[], name="x")), 4))
    assert load_checkpoint(file).net.config == net.config


class Command:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_pdparams_with_other_objects_are_rejected_and_not_run(tmp_path: Path) -> None:
    """A command may be anywhere in the file: next to arrays, inside a list, or as a key."""
    command = Command(tmp_path / "was-run")
    array = np.zeros(3, np.float32)
    for content in (command, {"a": command}, {"a": array, "b": [command]}, {command: array}):
        file = tmp_path / "x.pdparams"
        file.write_bytes(pickle.dumps(content, 4))
        with pytest.raises(CheckpointError, match="contains more than tensors"):
            load_checkpoint(file)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([np.zeros(3)], "not a dict of arrays"),
        ({"a": "text"}, "'a' is not an array"),
        ({3: np.zeros(3)}, "3 is not an array"),
        ({"a": np.zeros(3, ">f4")}, "not of plain numbers"),
        ({"a": np.array(["text"])}, "not of plain numbers"),
        ({"a": np.array([{}], object)}, "not of plain numbers"),
        ({"a": np.zeros(3, [("x", "f4")])}, "not of plain numbers"),
    ],
)
def test_pdparams_other_than_a_dict_of_numeric_arrays_are_rejected(content: Any, message: str) -> None:
    """Only numeric arrays in a dict with string keys are accepted."""
    with pytest.raises(PaddleError, match=message):
        read_pdparams(pickle.dumps(content, 4))


def test_pdparams_array_larger_than_its_bytes_is_rejected() -> None:
    """A few bytes that claim to be a huge array allocate nothing."""
    honest = pickle.dumps({"a": np.zeros(200, np.float32)}, 4)
    assert read_pdparams(honest)["backbone..a"].shape == (200,)
    lying = honest.replace(b"K\xc8\x85", b"K\xc9\x85")
    assert lying != honest
    with pytest.raises(PaddleError, match="shape"):
        read_pdparams(lying)


def test_damaged_pdparams_load_or_raise_paddle_error() -> None:
    """Truncated anywhere, or with any byte changed."""
    content = pickle.dumps({"conv1.weight": np.ones((2, 3), np.float32), "fc.weight": np.ones((2, 2))}, 4)
    for position in range(len(content)):
        with pytest.raises(PaddleError):
            read_pdparams(content[:position])
        for value in (0, 0x2E, 0x5D, 0xFF, content[position] ^ 1):
            try:
                read_pdparams(content[:position] + bytes([value]) + content[position + 1 :])
            except PaddleError:
                continue
    assert any(op.name == "REDUCE" for op, _, _ in pickletools.genops(content))


def test_pdparams_of_another_network_are_rejected(tiny_path: Path, tmp_path: Path) -> None:
    """The error names missing arrays and those of the wrong shape."""
    file = tmp_path / "x.pdparams"
    entries = pdparams(load_checkpoint(tiny_path))
    del entries["layer2.0.bn1._mean"]
    file.write_bytes(pickle.dumps(entries, 4))
    with pytest.raises(CheckpointError, match=r"backbone\.layer2\.0\.bn1\.running_mean is missing"):
        load_checkpoint(file)
    entries = pdparams(load_checkpoint(tiny_path))
    entries["layer3.0.conv1.weight"] = np.zeros((2, 2, 1, 1), np.float32)
    file.write_bytes(pickle.dumps(entries, 4))
    with pytest.raises(CheckpointError, match=r"backbone\.layer3\.0\.conv1\.weight is \[2, 2, 1, 1\]"):
        load_checkpoint(file)
