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

from rednet import CheckpointError, Familiarity, load_checkpoint, prepare, save_checkpoint
from rednet.model.io.checkpoint import METADATA_KEY
from rednet.model.training.evaluation import auroc
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


def test_evaluate_measures_familiarity(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The share of unfamiliar photos, and with --foreign how well photos of other things are told apart."""
    for index in range(6):
        folder = tmp_path / "data" / "val" / f"n{index % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        photo(index).save(folder / f"{index}.png")
    (tmp_path / "foreign" / "deep").mkdir(parents=True)
    for index in range(3):
        photo(index).save(tmp_path / "foreign" / "deep" / f"{index}.png")
    tiny = load_checkpoint(tiny_path)
    run = prepare(tiny.net, tiny.preprocess, "cpu", "fp32")
    pixels = torch.from_numpy(np.stack([tiny.preprocess.pixels(photo(index)) for index in range(6)]))
    energies = np.sort(run(pixels).logits.logsumexp(dim=1).numpy()).tolist()
    # The share 0.05 lies between the second and the third lowest photo, so that two of six are unfamiliar.
    between = (energies[1] + energies[2]) / 2
    familiarity = Familiarity((between - 5.0, between, *np.linspace(between + 1, 30, 19).tolist()))
    measured = tmp_path / "measured.safetensors"
    save_checkpoint(measured, replace(tiny, familiarity=familiarity))
    command = [
        "evaluate",
        str(tmp_path / "data"),
        "--checkpoint",
        str(measured),
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["unfamiliar"] == pytest.approx(2 / 6)
    assert "foreign" not in result
    assert main([*command, "--foreign", str(tmp_path / "foreign"), "--json"]) == 0
    foreign = json.loads(capsys.readouterr().out)["foreign"]
    known, others = familiarity(run(pixels).logits), familiarity(run(pixels[:3]).logits)
    pairs = [(a > b) + (a == b) / 2 for a in known for b in others]
    assert foreign == {
        "images": 3,
        "unfamiliar": pytest.approx((others < 0.05).mean()),
        "auroc": pytest.approx(np.mean(pairs)),
    }
    assert main([*command, "--foreign", str(tmp_path / "foreign")]) == 0
    printed = capsys.readouterr().out
    assert "33.3% have a familiarity below 0.05; 5% are expected" in printed
    assert "3 foreign photos: " in printed
    command[command.index(str(measured))] = str(tiny_path)
    assert main([*command, "--foreign", str(tmp_path / "foreign")]) == 2
    assert "tiny has no familiarity; rednet train measures it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("known", "foreign", "expected"),
    [
        ([3, 4], [1, 2], 1.0),
        ([1, 2], [3], 0.0),
        ([1, 1], [1], 0.5),
        ([1, 2, 3, 4], [2, 9], 0.3125),
    ],
)
def test_auroc(known: list[float], foreign: list[float], expected: float) -> None:
    """The share of pairs in the right order; ties count half."""
    assert auroc(known, foreign) == expected


def test_info_says_whether_familiarity_was_measured(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As text and as JSON."""
    save_checkpoint(
        tmp_path / "x.safetensors", replace(load_checkpoint(tiny_path), familiarity=Familiarity(PERCENTILES))
    )
    for path, text, value in ((tiny_path, "not measured", False), (tmp_path / "x.safetensors", "measured", True)):
        assert main(["info", "--checkpoint", str(path)]) == 0
        assert f"familiarity   {text}" in capsys.readouterr().out
        assert main(["info", "--checkpoint", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["familiarity"] is value
