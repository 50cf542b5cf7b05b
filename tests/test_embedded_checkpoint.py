"""The checkpoint that ships with the package: what a new user meets first."""

import json
import tarfile
from importlib import resources
from pathlib import Path

import pytest

from rednet import RedNetConfig, load_checkpoint
from rednet.model.io.checkpoint import EMBEDDED
from rednet.service.cli.parser import main
from tests.servers import ServerProcess
from tests.shared import PHOTOS, SHARED, needs_shared


def test_it_says_what_it_is() -> None:
    """Ten named classes, preprocessing, int8 scales, and where the weights come from; small enough to ship."""
    checkpoint = load_checkpoint()
    assert checkpoint.name == "rednet26-imagenette"
    assert checkpoint.labels[0] == ("n01440764", "tench")
    assert len(checkpoint.labels) == 10
    assert checkpoint.net.config == RedNetConfig(depth=26, num_classes=10)  # the paper's, at full width
    assert checkpoint.preprocess.crop == 224
    assert checkpoint.calibration is not None
    assert {"data", "recipe", "torch", "accuracy", "temperature", "history", "int8"} <= checkpoint.provenance.keys()
    assert len((resources.files("model") / EMBEDDED).read_bytes()) < 16 << 20


@needs_shared
@pytest.mark.timeout(600)
def test_it_is_right_on_most_photos_it_has_not_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At least 88 % of the 1,966 validation photos of Imagenette, by the command that users have; as sure as right."""
    with tarfile.open(SHARED / "data" / "imagenette-val.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    assert main(["evaluate", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["images"] == 1966
    assert result["top1"] >= 0.88
    assert result["top5"] >= 0.98
    assert result["ece"] <= 0.03


@needs_shared
def test_a_new_users_first_photo_is_recognised() -> None:
    """`rednet serve` without a single option beside the port, and a photo of everyday size."""
    with ServerProcess() as running:
        photo = (PHOTOS / "n01440764_tench.JPEG").read_bytes()
        best = running.client.post("/v1/predict", content=photo).json()["predictions"][0]["classes"][0]
        assert best["label"] == "tench"
