"""`rednet info`: describes a checkpoint, and the backend that would run it here."""

import argparse
import json
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rednet import Checkpoint, Prepared, load_checkpoint, prepare
from rednet.model.io.checkpoint import checkpoint_file
from rednet.service.engine.runner import set_threads
from rednet.service.model_description import ModelBody, describe
from rednet.service.system.cores import usable_cores
from rednet.service.system.terminal import printable

SHOWN_LABELS = 10
MEASURED_BY_A_SERVER = {"max_batch_size", "cost_s"}


def info(options: argparse.Namespace) -> int:
    """Print the description as lines of text, or as JSON with all details."""
    set_threads(usable_cores())
    with checkpoint_file(options.checkpoint) as file:
        checkpoint = load_checkpoint(file)
        size = file.stat().st_size
    prepared = prepare(checkpoint.net, checkpoint.preprocess, calibration=checkpoint.calibration)
    model = describe(checkpoint, [prepared])
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if options.json:
        described = model.model_dump(exclude=MEASURED_BY_A_SERVER)
        print(json.dumps({"file": str(file)} | described | {"versions": versions}))
        return 0
    for name, text in _lines(file, size, checkpoint, prepared, model):
        print(f"{name:<14}{printable(text)}")
    print(f"{'versions':<14}" + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return 0


def _lines(
    file: Path, size: int, checkpoint: Checkpoint, prepared: Prepared, model: ModelBody
) -> Iterator[tuple[str, str]]:
    config, preprocess = checkpoint.net.config, checkpoint.preprocess
    yield "file", f"{file} ({size / 1e6:.1f} MB)"
    yield "sha256", model.checkpoint_sha256 or ""
    yield "model", model.name
    yield "network", f"{config.name}, {model.parameters:,} parameters, {config.feature_channels} features"
    yield "classes", f"{config.num_classes}: {_names(model)}"
    channels = "RGB" if config.in_channels == 3 else f"{config.in_channels} channels"
    yield "input", f"{preprocess.crop}x{preprocess.crop} {channels}, cropped from a shorter side of {preprocess.resize}"
    yield from _provenance(checkpoint.provenance)
    yield "int8", "activation ranges are stored" if checkpoint.calibration else "no activation ranges: rednet quantize"
    yield "familiarity", "measured" if model.familiarity else "not measured: rednet train does it"
    yield "device", model.device
    yield "precision", model.precision
    yield "backend", model.backend
    for reason in model.passed_over:
        yield "rejected", reason
    yield "self-check", f"largest relative error {prepared.max_relative_error:.1e}"


def _names(model: ModelBody) -> str:
    names = [label.label for label in model.labels]
    more = f" and {len(names) - SHOWN_LABELS} more" if len(names) > SHOWN_LABELS else ""
    return ", ".join(names[:SHOWN_LABELS]) + more


def _provenance(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a file says of itself may have any shape: its lists and dictionaries are left to `--json`."""
    match provenance.get("accuracy"):
        case {"images": int(images), "top1": float(top1), "ece": float(ece)}:
            yield "accuracy", f"top-1 {top1:.4f} on {images:,} photos, expected calibration error {ece:.4f}"
    facts = {
        name: f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in provenance.items()
        if isinstance(value, str | int | float)
    }
    shown = [f"{name}: {text}" for name, text in facts.items() if not re.fullmatch("[0-9a-f]{64}", text)]  # no digests
    if shown:
        yield "provenance", "; ".join(shown)
