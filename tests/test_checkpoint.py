"""Checkpoints: ours, the official ones, and files that only look like either."""

import argparse
import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rednet import Checkpoint, CheckpointError, create_rednet, load_checkpoint, save_checkpoint
from rednet.model.inference.activation_ranges import required_activations
from rednet.model.io.checkpoint import METADATA_KEY
from rednet.model.io.labels import imagenet_labels
from rednet.model.io.state_dicts import infer_config


@pytest.fixture
def tiny(tiny_path: Path) -> Checkpoint:
    return load_checkpoint(tiny_path)


def official(checkpoint: Checkpoint) -> dict[str, Any]:
    """The layout that mmcls writes."""
    return {"meta": {"epoch": 1}, "state_dict": dict(checkpoint.net.state_dict()), "optimizer": {"state": {}}}


def metadata(path: Path) -> dict[str, Any]:
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + length])
    description: dict[str, Any] = json.loads(header["__metadata__"][METADATA_KEY])
    return description


def test_what_is_saved_comes_back(tiny: Checkpoint, tmp_path: Path) -> None:
    """Weights bit for bit, architecture, labels, preprocessing, name, provenance and int8 scales."""
    scales = {name: 0.1 + index for index, name in enumerate(required_activations(tiny.net))}
    written = replace(tiny, provenance={"data": "none", "seed": 3}, calibration=scales)
    save_checkpoint(tmp_path / "x.safetensors", written)
    read = load_checkpoint(str(tmp_path / "x.safetensors"))
    assert (read.labels, read.preprocess, read.name, read.provenance, read.calibration) == (
        written.labels,
        written.preprocess,
        written.name,
        written.provenance,
        scales,
    )
    assert read.net.config == written.net.config
    assert not read.net.training
    for key, tensor in written.net.state_dict().items():
        assert torch.equal(read.net.state_dict()[key], tensor), key
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_no_length_of_description_makes_it_something_else(tiny: Checkpoint, tmp_path: Path) -> None:
    """Our files begin with the length of their header; for some lengths that looks like the start of a pickle."""
    for padding in range(0, 256, 4):
        save_checkpoint(tmp_path / "x.safetensors", replace(tiny, provenance={"padding": "x" * padding}))
        assert load_checkpoint(tmp_path / "x.safetensors").labels == tiny.labels


def test_half_precision_halves_the_file_and_keeps_the_answer(tiny: Checkpoint, tmp_path: Path) -> None:
    """Matrices as float16, the rest exact; loaded, all is float32 again."""
    save_checkpoint(tmp_path / "full.safetensors", tiny)
    save_checkpoint(tmp_path / "half.safetensors", tiny, half=True)
    full, half = (os.path.getsize(tmp_path / f"{name}.safetensors") for name in ("full", "half"))
    assert half < 0.6 * full
    stored = load_file(tmp_path / "half.safetensors")
    assert stored["head.fc.weight"].dtype == torch.float16
    assert stored["backbone.layer1.0.bn1.running_var"].dtype == torch.float32
    net = load_checkpoint(tmp_path / "half.safetensors").net
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), tiny.net(x), rtol=0.02, atol=0.02 * float(tiny.net(x).abs().max()))


@pytest.mark.parametrize("bare", [False, True])
def test_the_official_layout_is_read(tiny: Checkpoint, tmp_path: Path, bare: bool) -> None:
    """With and without what surrounds the state dict; classes nobody named get numbers."""
    content = official(tiny)
    torch.save(content["state_dict"] if bare else content, tmp_path / "x.pth")
    read = load_checkpoint(tmp_path / "x.pth")
    assert read.net.config == tiny.net.config
    assert read.name == "x"
    assert [label.name for label in read.labels] == [f"class {index}" for index in range(5)]
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(read.net(x), tiny.net(x))


def test_a_thousand_classes_without_labels_are_imagenets(tmp_path: Path) -> None:
    """In the order of the official checkpoints."""
    net = create_rednet("rednet26", base_channels=16, stem_channels=32)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    labels = load_checkpoint(tmp_path / "x.pth").labels
    assert labels == imagenet_labels()
    assert (len(labels), labels[0], labels[999].id) == (1000, ("n01440764", "tench"), "n15075141")


def prefixed(tiny: Checkpoint, prefix: str, factor: float = 1.0) -> dict[str, Tensor]:
    """The state dict under names with a prefix; the bias of the head times a factor, to tell copies apart."""
    tensors = dict(tiny.net.state_dict())
    tensors["head.fc.bias"] = tensors["head.fc.bias"] * factor
    return {prefix + key: tensor for key, tensor in tensors.items()}


def bias_factor(read: Checkpoint, tiny: Checkpoint) -> float:
    return float((read.net.head.fc.bias / tiny.net.head.fc.bias).detach().mean())


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        ((), "module."),
        (("state_dict",), "model."),
        (("model",), "_orig_mod."),
        (("model_state_dict",), "module._orig_mod."),
        (("net",), "module.model.net."),
        (("ema",), ""),
        (("checkpoint", "model"), "module."),
        (("state_dict",), "classifier._orig_mod.module."),
    ],
)
def test_state_dict_is_found_under_other_keys_and_prefixes(
    tiny: Checkpoint, tmp_path: Path, keys: tuple[str, ...], prefix: str
) -> None:
    """As data-parallel training, torch.compile, Lightning and hand-written scripts save it; provenance says where."""
    content: dict[str, Any] = prefixed(tiny, prefix)
    for key in reversed(keys):
        content = {key: content, "epoch": 7}
    torch.save(content, tmp_path / "x.pth")
    read = load_checkpoint(tmp_path / "x.pth")
    assert all(torch.equal(read.net.state_dict()[key], value) for key, value in tiny.net.state_dict().items())
    assert read.provenance.get("weights", "") == ".".join((*keys, *prefix.replace("_orig_mod.", "").split("."))).strip(
        "."
    )


@pytest.mark.parametrize(
    ("content", "factor", "source"),
    [
        (
            {"state_dict": ("", 1.0), "state_dict_ema": ("module.", 2.0)},
            2.0,
            "state_dict_ema.module (preferred to state_dict)",
        ),
        ({"model": ("", 1.0), "model_ema": ("", 2.0)}, 2.0, "model_ema (preferred to model)"),
        (
            {"state_dict": ("", 1.0), "ema_state_dict": ("module.", 2.0)},
            2.0,
            "ema_state_dict.module (preferred to state_dict)",
        ),
        (
            {"state_dict": ("", 1.0), "ema_state_dict": ("module.", 2.0), "meta": {"mmengine_version": "0.10.4"}},
            1.0,
            "state_dict (preferred to ema_state_dict)",
        ),
        ({"model": ("", 1.0), "state_dict": ("", 2.0)}, 2.0, "state_dict (preferred to model)"),
    ],
)
def test_averaged_weights_are_preferred_and_named(
    tiny: Checkpoint, tmp_path: Path, content: dict[str, Any], factor: float, source: str
) -> None:
    """As timm does; mmengine stores the average as `state_dict`, and what was averaged as `ema_state_dict`."""
    saved = {key: prefixed(tiny, *each) if isinstance(each, tuple) else each for key, each in content.items()}
    for each in saved.values():
        each.setdefault("steps", torch.tensor(3)) if "meta" not in saved else None
    torch.save(saved, tmp_path / "x.pth")
    read = load_checkpoint(tmp_path / "x.pth")
    assert bias_factor(read, tiny) == pytest.approx(factor)
    assert read.provenance["weights"] == source


def test_networks_side_by_side_in_one_state_dict(tiny: Checkpoint, tmp_path: Path) -> None:
    """Averaged ones are taken by their prefix, mmcv's buffers of what was averaged are left; two equals are refused."""
    path = tmp_path / "x.pth"
    torch.save({"state_dict": prefixed(tiny, "model.") | prefixed(tiny, "ema_model.", 2.0)}, path)
    read = load_checkpoint(path)
    assert bias_factor(read, tiny) == pytest.approx(2.0)
    assert read.provenance["weights"] == "state_dict.ema_model (preferred to model.backbone)"
    buffers = {f"ema_{key.replace('.', '_')}": value * 3 for key, value in tiny.net.state_dict().items()}
    torch.save({"state_dict": prefixed(tiny, "") | buffers}, path)
    assert bias_factor(load_checkpoint(path), tiny) == pytest.approx(1.0)
    torch.save({"state_dict": prefixed(tiny, "student.") | prefixed(tiny, "other.")}, path)
    with pytest.raises(CheckpointError, match=r"several networks: other\.backbone, student\.backbone"):
        load_checkpoint(path)


def test_tensors_beside_the_network_are_unknown(tiny: Checkpoint, tmp_path: Path) -> None:
    """Another layer in the same state dict means that the network is not what it seems."""
    torch.save({"state_dict": prefixed(tiny, "model.") | {"model.neck.weight": torch.zeros(2)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"neck\.weight is unknown"):
        load_checkpoint(tmp_path / "x.pth")


def test_backbone_without_its_prefix_is_refused_with_a_tensors_name(tiny: Checkpoint, tmp_path: Path) -> None:
    """A backbone alone has no classifier."""
    state = {key.removeprefix("backbone."): value for key, value in tiny.net.state_dict().items() if "head" not in key}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"no tensor backbone\.stem\.0\.conv\.weight, but stem\.0\.conv\.weight"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "meta",
    [
        {"CLASSES": ("cat", "dog", "cow", "hen", "caf\u0065\u0301")},
        {"dataset_meta": {"classes": ["cat", "dog", "cow", "hen", "caf\u0065\u0301"]}},
        {"dataset_meta": {"CLASSES": ["cat", "dog", "cow", "hen", "caf\u0065\u0301"]}, "CLASSES": None},
    ],
)
def test_class_names_of_mmcls_and_mmpretrain_are_read(tiny: Checkpoint, tmp_path: Path, meta: dict[str, Any]) -> None:
    """From `meta`, in both layouts."""
    torch.save({"meta": meta, "state_dict": tiny.net.state_dict()}, tmp_path / "x.pth")
    labels = load_checkpoint(tmp_path / "x.pth").labels
    assert labels == [(name, name) for name in ("cat", "dog", "cow", "hen", "caf\u00e9")]


def test_class_names_of_another_number_are_not_taken(tiny: Checkpoint, tmp_path: Path) -> None:
    """A fine-tuned head beside the names of the pre-training; numbers instead, and provenance says so."""
    torch.save({"meta": {"CLASSES": ["a", "b"]}, "state_dict": tiny.net.state_dict()}, tmp_path / "x.pth")
    read = load_checkpoint(tmp_path / "x.pth")
    assert [label.name for label in read.labels] == [f"class {index}" for index in range(5)]
    assert read.provenance["labels assumed"] == "numbers"


def test_class_names_that_are_not_unique_keep_numbers_as_ids(tiny: Checkpoint, tmp_path: Path) -> None:
    """ImageNet has two cranes; an id means one class."""
    torch.save({"meta": {"CLASSES": ["crane"] * 5}, "state_dict": tiny.net.state_dict()}, tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth").labels[3] == ("3", "crane")


def test_what_training_scripts_store_beside_weights_is_ignored(tiny: Checkpoint, tmp_path: Path) -> None:
    """Options, paths and NumPy's numbers: not made, not needed, and no reason to refuse the weights."""
    beside = {
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
        "best": np.float64(0.9),
        "losses": np.zeros(3),
    }
    torch.save({"model": tiny.net.state_dict(), **beside}, tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth").net.config == tiny.net.config


class Attack:
    """Pickles into a command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_command_is_refused_and_never_run(tmp_path: Path, zipped: bool) -> None:
    """In both layouts that torch has had; the message names what the file wanted to run."""
    witness = tmp_path / "witness"
    torch.save({"state_dict": {"x": Attack(witness)}}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"more than tensors.*system.*not loaded"):
        load_checkpoint(tmp_path / "x.pth")
    assert not witness.exists()
    torch.load(tmp_path / "x.pth", weights_only=False)  # the attack is real
    assert witness.exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_a_cut_file_is_one_clear_error(tiny: Checkpoint, tmp_path: Path, suffix: str, share: float) -> None:
    """Wherever it ends."""
    path = tmp_path / f"x.{suffix}"
    if suffix == "pth":
        torch.save(official(tiny), path)
    else:
        save_checkpoint(path, tiny)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=rf"x\.{suffix} "):
        load_checkpoint(path)


def test_loading_another_kind_of_file_is_one_clear_error(tmp_path: Path) -> None:
    """Text, nothing, a folder."""
    (tmp_path / "text").write_text("hello, hello")
    for path, message in (
        (tmp_path / "text", "neither a safetensors file nor a torch checkpoint"),
        (tmp_path / "nothing", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)


def changed_state(tiny: Checkpoint, change: str) -> dict[Any, Any]:
    state: dict[Any, Any] = dict(tiny.net.state_dict())
    key = "backbone.layer2.0.conv3.weight"
    match change:
        case "missing":
            del state[key]
        case "extra":
            state["backbone.layer2.0.conv4.weight"] = torch.zeros(1)
        case "misshapen":
            state[key] = state[key][:7]
        case "NaN":
            state[key] = torch.full_like(state[key], torch.nan)
        case "number":
            state[key] = 3
        case "negative":
            state["backbone.layer2.0.bn3.running_var"] = -torch.ones(128)
        case "sparse":
            state[key] = state[key].to_sparse()
        case "unnamed":
            state = {3: state[key]}
        case "integers":
            state[key] = state[key].to(torch.int64)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "backbone.layer2.0.conv3.weight is missing"),
        ("extra", "backbone.layer2.0.conv4.weight is unknown"),
        ("misshapen", r"backbone.layer2.0.conv3.weight is \[7, 32, 1, 1\] instead of \[128, 32, 1, 1\]"),
        ("NaN", "NaNs or negative variances in backbone.layer2.0.conv3.weight"),
        ("number", "no state dict"),
        ("negative", "negative variances in backbone.layer2.0.bn3.running_var"),
        ("sparse", "no state dict of plain tensors"),
        ("unnamed", "no state dict of plain tensors"),
        ("integers", "backbone.layer2.0.conv3.weight is torch.int64"),
    ],
)
def test_a_wrong_tensor_is_named(tiny: Checkpoint, tmp_path: Path, change: str, message: str) -> None:
    """Missing, extra, misshapen, not finite, no tensor at all."""
    torch.save({"state_dict": changed_state(tiny, change)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "x.pth")


def test_another_network_is_refused(tmp_path: Path) -> None:
    """Somebody else's tensors are no RedNet."""
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="not a RedNet"):
        load_checkpoint(tmp_path / "x.pth")
    torch.save([torch.zeros(1)], tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"config": {"depth": 34}}, "invalid description.*depth"),
        ({"config": {"depth": 26, "colour": "red"}}, "invalid description"),
        ({"config": {"depth": 26, "base_channels": "wide"}}, "invalid description"),
        ({"config": {"depth": 26, "base_channels": 1 << 40}}, "invalid description.*at most"),
        ({"preprocess": {"crop": 0}}, "invalid description.*crop"),
        ({"preprocess": {"crop": "64"}}, "invalid description"),
        ({"labels": [["a", "b"]]}, "has 1 labels for 5 classes"),
        ({"labels": 3}, "invalid description"),
        ({"labels": [["a", "\ud800"]] * 5}, "invalid description"),
        ({"config": None}, "invalid description"),
        ({"config": [[]]}, "invalid description"),
        ({"preprocess": {"mean": [None] * 3}}, "invalid description"),
        ({"name": None, "provenance": 3}, "invalid description"),
        ({"calibration": 3}, "invalid description"),
        ({"calibration": {}}, "invalid description.*backbone.layer1.0 is missing.* and 46 more"),
        ({"calibration": {"backbone.layer1.0": -1.0}}, "invalid description.*is -1.0, not a number between"),
        ({"calibration": {"a": 1.0}}, "invalid description.*'a' is unknown"),
        ({"calibration": [["backbone.layer1.0", 10**400]]}, "invalid description"),
    ],
)
def test_invalid_description_in_metadata_is_refused(
    tiny_path: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """Whatever stands in the metadata, it is one clear error, and nothing large is allocated."""
    description = metadata(tiny_path) | change
    save_file(load_file(tiny_path), tmp_path / "x.safetensors", {METADATA_KEY: json.dumps(description)})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "x.safetensors")


def test_bare_safetensors_are_read_like_an_official_checkpoint(tiny_path: Path, tmp_path: Path) -> None:
    """The tensors alone say enough."""
    save_file(load_file(tiny_path), tmp_path / "x.safetensors")
    assert load_checkpoint(tmp_path / "x.safetensors").net.config.base_channels == 16


def test_the_architecture_is_read_off_the_shapes() -> None:
    """Depth, widths, classes, input channels and reduction of any RedNet with 16 channels per group."""
    for depth, fields in (
        (38, {"num_classes": 7, "base_channels": 32}),
        (152, {"stem_channels": 96, "reduction_ratio": 2, "kernel_size": 5, "in_channels": 1}),
    ):
        with torch.device("meta"):
            net = create_rednet(f"rednet{depth}", **fields)
        shapes = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
        assert infer_config(shapes) == net.config


def test_counters_may_be_left_out(tiny: Checkpoint, tmp_path: Path) -> None:
    """Evaluation does not read them, and converters drop them."""
    state: dict[str, Tensor] = {
        key: value for key, value in tiny.net.state_dict().items() if not key.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth").net.config == tiny.net.config
