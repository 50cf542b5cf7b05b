"""The checkpoint that ships with the package."""

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


def test_embedded_checkpoint_describes_itself() -> None:
    """It has ten named classes, preprocessing, int8 ranges and provenance, and is small enough to ship."""
    checkpoint = load_checkpoint()
    assert checkpoint.name == "rednet26-imagenette"
    assert checkpoint.labels[0] == ("n01440764", "tench")
    assert len(checkpoint.labels) == 10
    assert checkpoint.net.config == RedNetConfig(depth=26, num_classes=10)  # the paper's architecture at full width
    assert checkpoint.preprocess.crop == 224
    assert checkpoint.calibration is not None
    assert checkpoint.familiarity is not None
    assert {"data", "recipe", "torch", "accuracy", "temperature", "history", "int8"} <= checkpoint.provenance.keys()
    assert len((resources.files("model") / EMBEDDED).read_bytes()) < 16 << 20


@pytest.mark.slow
@needs_shared
@pytest.mark.timeout(600)
def test_embedded_checkpoint_accuracy_on_imagenette_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rednet evaluate` reports at least 90 % of 1,966 photos, with a small calibration error."""
    with tarfile.open(SHARED / "data" / "imagenette-val.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    assert main(["evaluate", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["images"] == 1966
    assert result["top1"] >= 0.9
    assert result["top5"] >= 0.98
    assert result["ece"] <= 0.02


@needs_shared
def test_embedded_checkpoint_recognises_a_photo_with_default_options() -> None:
    """`rednet serve` with no option except the port, and a photo of everyday size."""
    with ServerProcess() as running:
        photo = (PHOTOS / "n01440764_tench.JPEG").read_bytes()
        best = running.client.post("/v1/predict", content=photo).json()["predictions"][0]["classes"][0]
        assert best["label"] == "tench"
