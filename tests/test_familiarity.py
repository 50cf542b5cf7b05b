"""Familiarity: the share of held-out photos whose energy is lower."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rednet import CheckpointError, Familiarity, load_checkpoint, save_checkpoint
from rednet.model.io.checkpoint import METADATA_KEY
from rednet.service.cli.parser import main
from tests.conftest import photo

PERCENTILES = tuple(np.linspace(-1, 6, 101).tolist())


def test_familiarity_is_the_share_of_compared_photos_with_a_lower_energy() -> None:
    """For photos like the compared ones it is uniform, so a threshold of 0.05 refuses one in twenty of them."""
    rng = np.random.default_rng(0)
    compared, others = (rng.normal(0, 3, (5_000, 10)) for _ in range(2))
    values = Familiarity.fit(compared)(others)
    energies = [np.log(np.exp(logits).sum(axis=1)) for logits in (compared, others)]
    exact = [(energies[0] < energy).mean() for energy in energies[1]]
    assert values == pytest.approx(np.array(exact), abs=0.01)
    assert (values < 0.05).mean() == pytest.approx(0.05, abs=0.01)


def test_familiarity_of_extreme_logits_stays_between_0_and_1() -> None:
    """Nothing overflows, and logits below and above all compared ones give the ends of the scale."""
    familiarity = Familiarity.fit(np.random.default_rng(0).normal(0, 3, (200, 10)))
    with np.errstate(all="raise", under="ignore"):
        assert familiarity([[-1e30] * 10, [1e30] + [0.0] * 9]).tolist() == [0.0, 1.0]


def test_familiarity_takes_tensors_of_half_precision() -> None:
    """As a CPU network returns them, one row for each photo."""
    logits = torch.randn(7, 10, generator=torch.Generator().manual_seed(0)).half()
    familiarity = Familiarity(PERCENTILES)
    assert familiarity(logits).tolist() == familiarity(logits.double().numpy()).tolist()


def test_familiarity_with_a_single_compared_photo() -> None:
    """It can only tell lower from higher."""
    familiarity = Familiarity.fit([[0.0, 3.0]])
    assert familiarity([[0.0, 2.9], [0.0, 3.1]]).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("command", ["save", "convert", "quantize"])
def test_familiarity_is_stored_with_the_weights(tiny_path: Path, tmp_path: Path, command: str) -> None:
    """Saving, converting and quantising keep it; a file without it loads without it."""
    tiny = load_checkpoint(tiny_path)
    assert tiny.familiarity is None
    save_checkpoint(tmp_path / "x.safetensors", replace(tiny, familiarity=Familiarity(PERCENTILES)))
    written = tmp_path / "x.safetensors"
    if command == "convert":
        written = tmp_path / "y.safetensors"
        assert main(["convert", str(tmp_path / "x.safetensors"), str(written)]) == 0
    if command == "quantize":
        written = tmp_path / "y.safetensors"
        (tmp_path / "photos").mkdir()
        photo().save(tmp_path / "photos" / "1.png")
        assert (
            main(["quantize", str(tmp_path / "x.safetensors"), str(tmp_path / "photos"), "--output", str(written)]) == 0
        )
    assert load_checkpoint(written).familiarity == Familiarity(PERCENTILES)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (3, "invalid description"),
        ({}, "invalid description"),
        ({"energies": None}, "invalid description"),
        ({"energies": [1.0]}, "needs 2 to 1001 energies, got 1"),
        ({"energies": [0.0] * 1002}, "needs 2 to 1001 energies, got 1002"),
        ({"energies": "abc"}, "must be numbers"),
        ({"energies": [1.0, True]}, "must be numbers"),
        ({"energies": [1.0, 10**400]}, "invalid description"),
        ({"energies": [1.0, float("nan")]}, "finite and in ascending order"),
        ({"energies": [2.0, 1.0]}, "finite and in ascending order"),
        ({"energies": [1.0, 2.0], "score": "other"}, "invalid description"),
    ],
)
def test_invalid_familiarity_in_a_file_is_rejected(
    tiny_path: Path, tmp_path: Path, stored: object, message: str
) -> None:
    """With one clear error, as for all metadata."""
    path = tmp_path / "x.safetensors"
    save_file(load_file(tiny_path), path, {METADATA_KEY: json.dumps(_description(tiny_path) | {"familiarity": stored})})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def _description(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        description: dict[str, Any] = json.loads(file.metadata()[METADATA_KEY])
    return description
