"""Checkpoints: this project's, the official ones, and files that only look like one."""

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
from rednet.model.io import checkpoint as checkpoint_module
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


def test_saved_checkpoint_loads_unchanged(tiny: Checkpoint, tmp_path: Path) -> None:
    """Weights are bit-identical; architecture, labels, preprocessing, name, provenance and int8 ranges are equal."""
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


@pytest.mark.slow
def test_safetensors_with_any_header_length_is_recognised(tiny: Checkpoint, tmp_path: Path) -> None:
    """A safetensors file begins with the length of its header, and some lengths look like the start of a pickle."""
    for padding in range(0, 256, 4):
        save_checkpoint(tmp_path / "x.safetensors", replace(tiny, provenance={"padding": "x" * padding}))
        assert load_checkpoint(tmp_path / "x.safetensors").labels == tiny.labels


def test_half_precision_checkpoint_is_half_as_large_with_the_same_predictions(tiny: Checkpoint, tmp_path: Path) -> None:
    """Matrices are stored as float16, other tensors unchanged. Loading converts all of them to float32."""
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
def test_official_checkpoint_layout_is_read(tiny: Checkpoint, tmp_path: Path, bare: bool) -> None:
    """The state dict may be bare or wrapped. Classes without names are numbered."""
    content = official(tiny)
    torch.save(content["state_dict"] if bare else content, tmp_path / "x.pth")
    read = load_checkpoint(tmp_path / "x.pth")
    assert read.net.config == tiny.net.config
    assert read.name == "x"
    assert [label.name for label in read.labels] == [f"class {index}" for index in range(5)]
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(read.net(x), tiny.net(x))


def test_thousand_classes_without_labels_get_imagenet_names(tmp_path: Path) -> None:
    """The names are in the order of the official checkpoints."""
    net = create_rednet("rednet26", base_channels=16, stem_channels=32)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    labels = load_checkpoint(tmp_path / "x.pth").labels
    assert labels == imagenet_labels()
    assert (len(labels), labels[0], labels[999].id) == (1000, ("n01440764", "tench"), "n15075141")


def prefixed(tiny: Checkpoint, prefix: str, factor: float = 1.0) -> dict[str, Tensor]:
    """The state dict with prefixed names. The classifier's bias is multiplied by a factor, to distinguish copies."""
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
    """Data-parallel training, torch.compile, Lightning and custom scripts save it so. The provenance names the key."""
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
    """timm stores the average separately; mmengine stores it as `state_dict`, and the raw weights as
    `ema_state_dict`."""
    saved = {key: prefixed(tiny, *each) if isinstance(each, tuple) else each for key, each in content.items()}
    for each in saved.values():
        each.setdefault("steps", torch.tensor(3)) if "meta" not in saved else None
    torch.save(saved, tmp_path / "x.pth")
    read = load_checkpoint(tmp_path / "x.pth")
    assert bias_factor(read, tiny) == pytest.approx(factor)
    assert read.provenance["weights"] == source


def test_several_networks_in_one_state_dict(tiny: Checkpoint, tmp_path: Path) -> None:
    """Averaged weights are chosen by their prefix, and mmcv's buffers of raw weights are ignored. Two equal candidates
    are rejected."""
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


def test_additional_tensors_in_the_state_dict_are_rejected(tiny: Checkpoint, tmp_path: Path) -> None:
    """Another layer in the state dict means that the network is a different one."""
    torch.save({"state_dict": prefixed(tiny, "model.") | {"model.neck.weight": torch.zeros(2)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"neck\.weight is unknown"):
        load_checkpoint(tmp_path / "x.pth")


def test_backbone_without_classifier_is_rejected_with_a_tensor_name(tiny: Checkpoint, tmp_path: Path) -> None:
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
    """They are in `meta`, in two layouts."""
    torch.save({"meta": meta, "state_dict": tiny.net.state_dict()}, tmp_path / "x.pth")
    labels = load_checkpoint(tmp_path / "x.pth").labels
    assert labels == [(name, name) for name in ("cat", "dog", "cow", "hen", "caf\u00e9")]


def test_class_names_of_the_wrong_number_are_ignored(tiny: Checkpoint, tmp_path: Path) -> None:
    """A fine-tuned head may be stored with the names of the pretraining. Classes are numbered then, and the provenance
    says so."""
    torch.save({"meta": {"CLASSES": ["a", "b"]}, "state_dict": tiny.net.state_dict()}, tmp_path / "x.pth")
    read = load_checkpoint(tmp_path / "x.pth")
    assert [label.name for label in read.labels] == [f"class {index}" for index in range(5)]
    assert read.provenance["labels assumed"] == "numbers"


def test_class_names_that_are_not_unique_keep_numbers_as_ids(tiny: Checkpoint, tmp_path: Path) -> None:
    """ImageNet has two classes named crane, and an id must be unique."""
    torch.save({"meta": {"CLASSES": ["crane"] * 5}, "state_dict": tiny.net.state_dict()}, tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth").labels[3] == ("3", "crane")


def test_other_objects_in_a_training_checkpoint_are_ignored(tiny: Checkpoint, tmp_path: Path) -> None:
    """Options, paths and NumPy scalars are neither constructed nor a reason to reject the weights."""
    beside = {
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
        "best": np.float64(0.9),
        "losses": np.zeros(3),
    }
    torch.save({"model": tiny.net.state_dict(), **beside}, tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth").net.config == tiny.net.config


class Attack:
    """Unpickling it runs a command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_command_is_rejected_and_not_run(tmp_path: Path, zipped: bool) -> None:
    """In both of torch's file layouts, the error names what the file wanted to run."""
    witness = tmp_path / "witness"
    torch.save({"state_dict": {"x": Attack(witness)}}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"more than tensors.*system.*not loaded"):
        load_checkpoint(tmp_path / "x.pth")
    assert not witness.exists()
    torch.load(tmp_path / "x.pth", weights_only=False)  # shows that the attack works
    assert witness.exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_truncated_file_raises_checkpoint_error(tiny: Checkpoint, tmp_path: Path, suffix: str, share: float) -> None:
    """The file may end anywhere."""
    path = tmp_path / f"x.{suffix}"
    if suffix == "pth":
        torch.save(official(tiny), path)
    else:
        save_checkpoint(path, tiny)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=rf"x\.{suffix} "):
        load_checkpoint(path)


@pytest.mark.parametrize(("suffix", "reader"), [("pth", "read_torch_file"), ("safetensors", "load")])
def test_file_that_changes_while_it_is_read_raises_checkpoint_error(
    tiny: Checkpoint, tmp_path: Path, suffix: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read may be of two files. It is not mapped: the process would crash where the file has been cut off."""
    path = tmp_path / f"x.{suffix}"
    if suffix == "pth":
        torch.save(official(tiny), path)
    else:
        save_checkpoint(path, tiny)
    os.utime(path, (0, 0))
    read = getattr(checkpoint_module, reader)

    def overwritten(source: object) -> object:
        content = read(source)
        path.write_bytes(bytes(path.stat().st_size))
        return content

    monkeypatch.setattr(checkpoint_module, reader, overwritten)
    with pytest.raises(CheckpointError, match=rf"x\.{suffix} changed while it was being read"):
        load_checkpoint(path)


def test_file_that_is_not_a_checkpoint_raises_checkpoint_error(tmp_path: Path) -> None:
    """A text file and a missing file."""
    (tmp_path / "text").write_text("hello, hello")
    for path, message in (
        (tmp_path / "text", "neither a safetensors file nor a torch checkpoint"),
        (tmp_path / "nothing", "cannot be read: No such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)


def test_folder_with_one_checkpoint_loads_it(tmp_path: Path, tiny_path: Path) -> None:
    """Other files, hidden files and folders do not count."""
    for name in ("README.md", ".hidden.pth"):
        (tmp_path / name).write_text("")
    (tmp_path / "old.pth").mkdir()
    (tmp_path / "model.safetensors").symlink_to(tiny_path)
    assert load_checkpoint(tmp_path).name == "tiny"


def test_folder_without_one_checkpoint_raises_an_error_that_lists_its_files(tmp_path: Path) -> None:
    """None, other files only, and several checkpoints."""
    with pytest.raises(CheckpointError, match=r"no checkpoint .*it is empty"):
        load_checkpoint(tmp_path)
    (tmp_path / "labels.txt").write_text("")
    (tmp_path / "sub").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint .*it holds labels\.txt, sub/"):
        load_checkpoint(tmp_path)
    for name in ("a.pth", "b.safetensors"):
        (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=r"2 checkpoints, not one: a\.pth, b\.safetensors"):
        load_checkpoint(tmp_path)


def test_checkpoint_whose_training_has_not_finished_is_reported_as_such(tmp_path: Path) -> None:
    """Only if the file itself is missing: a finished run may be trained again."""
    (tmp_path / "pets.safetensors.training").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"training has not finished; .* pets\.safetensors\.training has"):
        load_checkpoint(tmp_path / "pets.safetensors")
    (tmp_path / "pets.safetensors").write_text("hello, hello")
    with pytest.raises(CheckpointError, match="neither a safetensors file"):
        load_checkpoint(tmp_path / "pets.safetensors")


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
def test_invalid_tensor_is_rejected_by_name(tiny: Checkpoint, tmp_path: Path, change: str, message: str) -> None:
    """Tensors that are missing, unexpected, of the wrong shape, not finite, or not tensors."""
    torch.save({"state_dict": changed_state(tiny, change)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "x.pth")


def test_other_architecture_is_rejected(tmp_path: Path) -> None:
    """A state dict of another network does not load."""
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
        ({"config": {"depth": 26, "colour": "red"}}, "config: it does not have the expected fields"),
        ({"config": {"depth": 26, "base_channels": "wide"}}, "invalid description"),
        ({"config": {"depth": 26, "base_channels": 1 << 40}}, "invalid description.*at most"),
        ({"preprocess": {"crop": 0}}, "invalid description.*crop"),
        ({"preprocess": {"crop": "64"}}, "invalid description.* preprocess: crop and resize must be integers"),
        ({"labels": [["a", "b"]]}, "has 1 labels for 5 classes"),
        ({"labels": 3}, "invalid description in its metadata: labels: it does not have the expected fields"),
        ({"labels": [["a", "\ud800"]] * 5}, "invalid description"),
        ({"config": None}, "invalid description.* config: it does not have"),
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
def test_invalid_metadata_is_rejected(tiny_path: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Any invalid value in the metadata is one clear error, and nothing large is allocated."""
    description = metadata(tiny_path) | change
    save_file(load_file(tiny_path), tmp_path / "x.safetensors", {METADATA_KEY: json.dumps(description)})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "x.safetensors")


def test_safetensors_without_metadata_are_read(tiny_path: Path, tmp_path: Path) -> None:
    """The architecture follows from the tensors alone."""
    save_file(load_file(tiny_path), tmp_path / "x.safetensors")
    assert load_checkpoint(tmp_path / "x.safetensors").net.config.base_channels == 16


def test_architecture_is_inferred_from_tensor_shapes() -> None:
    """Depth, widths, classes, input channels and reduction of any RedNet with 16 channels per group."""
    for depth, fields in (
        (38, {"num_classes": 7, "base_channels": 32}),
        (152, {"stem_channels": 96, "reduction_ratio": 2, "kernel_size": 5, "in_channels": 1}),
    ):
        with torch.device("meta"):
            net = create_rednet(f"rednet{depth}", **fields)
        shapes = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
        assert infer_config(shapes) == net.config


def test_checkpoint_without_batch_norm_counters_loads(tiny: Checkpoint, tmp_path: Path) -> None:
    """Evaluation does not need `num_batches_tracked`, and converters drop it."""
    state: dict[str, Tensor] = {
        key: value for key, value in tiny.net.state_dict().items() if not key.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth").net.config == tiny.net.config
