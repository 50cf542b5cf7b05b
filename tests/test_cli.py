"""The command line."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from rednet import __version__, create_rednet, load_checkpoint, save_checkpoint
from rednet.model.native import int8_unavailable, unavailable
from rednet.model.training.recipe import FINE_TUNING_RATE, Recipe
from rednet.service.cli.parser import RECIPE_FLAGS, main
from tests import official
from tests.conftest import encoded, photo
from tests.servers import REDNET, ServerProcess
from tests.shared import PHOTOS, needs_shared


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    for seed in range(3):
        (tmp_path / f"{seed}.jpg").write_bytes(encoded(photo(seed), "JPEG"))
    return [str(tmp_path / f"{seed}.jpg") for seed in range(3)]


def test_version_is_printed_without_importing_torch() -> None:
    """It is the package's version, which is also `rednet.__version__`."""
    printed = subprocess.run([REDNET, "--version"], capture_output=True, text=True, check=True)
    assert printed.stdout == f"rednet {__version__}\n"
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules));"
        "from rednet.service.cli.parser import main; main(['--version'])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout == f"rednet {__version__}\nFalse\n"


def test_predict_prints_the_same_json_as_the_server(
    server: ServerProcess, tiny_path: Path, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes and probabilities are equal."""
    assert main(["predict", *photos, "--checkpoint", str(tiny_path), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    files = [("f", (name, Path(name).read_bytes())) for name in photos]
    theirs = server.client.post("/v1/predict", files=files).json()
    assert ours["model"] == theirs["model"]
    assert len(ours["predictions"]) == len(theirs["predictions"]) == 3
    for our_photo, their_photo in zip(ours["predictions"], theirs["predictions"], strict=True):
        for our_class, their_class in zip(our_photo["classes"], their_photo["classes"], strict=True):
            assert our_class["label"] == their_class["label"]
            assert our_class["probability"] == pytest.approx(their_class["probability"], abs=1e-4)


@needs_shared
def test_predict_and_server_agree_on_a_real_photo(
    server: ServerProcess, tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A JPEG of everyday size, which the decoder scales while decoding."""
    zebra = PHOTOS / "n02391049_zebra.JPEG"
    assert main(["predict", str(zebra), "--checkpoint", str(tiny_path), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)["predictions"][0]["classes"]
    theirs = httpx.post(server.url + "/v1/predict", content=zebra.read_bytes()).json()["predictions"][0]["classes"]
    assert [entry["label"] for entry in ours] == [entry["label"] for entry in theirs]


def test_predict_prints_percentages_and_continues_after_an_unreadable_photo(
    tiny_path: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error is printed in place of the answer, and the status is 1."""
    (tmp_path / "bad.jpg").write_text("no photo")
    bad, missing = str(tmp_path / "bad.jpg"), str(tmp_path / "nowhere.jpg")
    assert main(["predict", photos[0], bad, missing, photos[1], "--checkpoint", str(tiny_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == photos[0]
    assert "%  thing " in lines[1]
    assert lines[7].strip().startswith("the data is in no known image format")
    assert lines[9].strip() == "No such file or directory"
    assert "%  thing " in lines[11]


def test_missing_checkpoint_is_reported_in_one_line(photos: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The status is 2, without a traceback."""
    assert main(["predict", *photos, "--checkpoint", "nowhere.pth"]) == 2
    assert capsys.readouterr().err == "rednet: nowhere.pth cannot be read: No such file or directory\n"


def test_predict_into_a_closed_pipe_succeeds(tiny_path: Path, photos: list[str]) -> None:
    """As in `rednet predict ... | head -1`."""
    command = [str(REDNET), "predict", *photos, "--checkpoint", str(tiny_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert (process.communicate()[1], process.returncode) == (b"", 0)


def test_top_k_below_one_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    """The message says which values are valid."""
    with pytest.raises(SystemExit):
        main(["predict", "x.jpg", "--top-k", "0"])
    assert "must be at least 1, not '0'" in capsys.readouterr().err


def test_info_reports_file_model_and_backend(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As text and as JSON."""
    assert main(["info", "--checkpoint", str(tiny_path), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["name"], info["architecture"], info["versions"]["torch"]) == ("tiny", "rednet26", torch.__version__)
    assert ("native engine" if unavailable() is None else "involution: torch") in info["backend"]
    assert main(["info", "--checkpoint", str(tiny_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"file          {tiny_path} ({tiny_path.stat().st_size / 1e6:.1f} MB)"
    assert lines[1] == f"sha256        {hashlib.sha256(tiny_path.read_bytes()).hexdigest()}"
    assert lines[3].startswith("network       rednet26, ")
    assert info["file"] == str(tiny_path)


def test_info_prints_the_path_of_the_embedded_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    """With its accuracy, and without the long lists that `--json` has."""
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    file = text.splitlines()[0].removeprefix("file          ").rpartition(" (")[0]
    assert load_checkpoint(file).name == load_checkpoint().name
    assert re.search(r"^accuracy      top-1 0\.\d{4} on 1,966 photos, expected calibration error 0\.\d{4}$", text, re.M)
    assert "history" not in text


def test_convert_official_checkpoint_with_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The user's labels are stored. A wrong depth or a wrong number of labels is an error."""
    source, output = str(tmp_path / "official.pth"), tmp_path / "ours.safetensors"
    official.save(create_rednet("rednet26", num_classes=12, base_channels=16, stem_channels=32), Path(source))
    (tmp_path / "names").write_text("\n".join(f"name {index}" for index in range(12)))
    (tmp_path / "few").write_text("a\nb")
    assert main(["convert", source, str(output), "--depth", "26", "--labels", str(tmp_path / "names")]) == 0
    converted, original = load_checkpoint(output), load_checkpoint(source)
    assert converted.labels[11].name == "name 11"
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(converted.net(x), original.net(x))
    other = str(tmp_path / "other.safetensors")
    assert main(["convert", source, other, "--depth", "50"]) == 2
    assert main(["convert", source, other, "--labels", str(tmp_path / "few")]) == 2
    assert "names 2 classes; the network has 12" in capsys.readouterr().err


def test_convert_with_index_labels_keeps_folder_ids(tiny_path: Path, tmp_path: Path) -> None:
    """A labels file with indices in text order gives each class its name. The ids remain those of the training."""
    (tmp_path / "names.json").write_text(json.dumps({str(index): f"name {index}" for index in (4, 0, 3, 2, 1)}))
    command = ["convert", str(tiny_path), str(tmp_path / "x.safetensors"), "--labels", str(tmp_path / "names.json")]
    assert main(command) == 0
    labels = load_checkpoint(tmp_path / "x.safetensors").labels
    assert labels == [(f"n{index}", f"name {index}") for index in range(5)]


def test_convert_bare_tensors_with_labels_uses_names_as_ids(tiny_path: Path, tmp_path: Path) -> None:
    """A file of bare tensors has no ids, so the numbers that stood in for them are replaced."""
    torch.save(load_checkpoint(tiny_path).net.state_dict(), tmp_path / "x.pth")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    output = tmp_path / "x.safetensors"
    assert load_checkpoint(tmp_path / "x.pth").provenance["labels assumed"] == "numbers"
    assert main(["convert", str(tmp_path / "x.pth"), str(output), "--labels", str(tmp_path / "names.txt")]) == 0
    assert load_checkpoint(output).labels == [(name, name) for name in "abcde"]
    assert load_checkpoint(output).provenance == {"converted from": "x.pth"}


def test_quantize_stores_activation_ranges_with_unchanged_weights(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For any depth. Unreadable files and too few photos cause warnings, and the int8 accuracy is stored."""
    (tmp_path / "photos" / "a" / "b").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(
        0, 256, (4, 72, 72, 3), dtype=np.uint8
    )  # as in the self-check of `prepare`
    for seed, image in enumerate([*map(photo, range(4)), *map(Image.fromarray, noise)]):
        (tmp_path / "photos" / "a" / "b" / f"{seed}.png").write_bytes(encoded(image))
    (tmp_path / "photos" / "bad.jpg").write_text("no photo")
    output = tmp_path / "int8.safetensors"
    assert main(["quantize", str(tiny_path), str(tmp_path / "photos"), "--output", str(output)]) == 0
    written, original = load_checkpoint(output), load_checkpoint(tiny_path)
    assert written.calibration is not None
    assert all(torch.equal(original.net.state_dict()[key], value) for key, value in written.net.state_dict().items())
    printed = capsys.readouterr()
    assert "bad.jpg is not a readable photo" in printed.err
    assert "come from only 6 photos" in printed.err
    assert "rednet26 with activation ranges from 6 photos" in printed.out
    report = written.provenance["int8"]
    assert report["photos"] == 6
    if int8_unavailable() is None:
        assert report["compared"] == 2
        assert report["feature_cosine"] > 0.99
    else:
        assert "int8" in report["not_compared"]
    again = tmp_path / "again.safetensors"
    assert main(["quantize", str(tiny_path), str(tmp_path / "photos"), "--output", str(again)]) == 0
    assert again.read_bytes() == output.read_bytes()


def test_half_precision_weights_stay_byte_for_byte(tiny_path: Path, photos: list[str], tmp_path: Path) -> None:
    """A half-precision file keeps its size in `quantize` and `convert`, and only its metadata change."""
    half, output = tmp_path / "half.safetensors", tmp_path / "output.safetensors"
    save_checkpoint(half, load_checkpoint(tiny_path), half=True)
    before = half.read_bytes()
    for command in (
        ["quantize", str(half), str(tmp_path), "--output", str(output)],
        ["convert", str(half), str(output)],
    ):
        assert main([*command, "--force"]) == 0
        after = output.read_bytes()
        assert after[8 + int.from_bytes(after[:8], "little") :] == before[8 + int.from_bytes(before[:8], "little") :]


def test_quantize_takes_the_embedded_checkpoint(photos: list[str], tmp_path: Path) -> None:
    output = tmp_path / "int8.safetensors"
    assert main(["quantize", "embedded", str(tmp_path), "--output", str(output)]) == 0
    assert load_checkpoint(output).labels == load_checkpoint().labels


def test_quantize_without_photos_or_writable_output_is_reported_in_one_line(
    tiny_path: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The status is 2, and nothing is written."""
    (tmp_path / "empty").mkdir()
    for folder, output, message in (
        (tmp_path / "empty", tmp_path / "x.safetensors", "has no photos"),
        (tmp_path / "nowhere", tmp_path / "x.safetensors", "nowhere does not exist"),
        (tmp_path, tmp_path / "nowhere" / "x.safetensors", "cannot be written"),
    ):
        assert main(["quantize", str(tiny_path), str(folder), "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()


def test_train_has_a_flag_with_its_default_for_every_recipe_field() -> None:
    """The help of each flag states the limits and the default."""
    printed = {flag.removeprefix("--").replace("-", "_"): default for flag, default, _ in RECIPE_FLAGS}
    assert printed == vars(Recipe())
    shown = " ".join(
        subprocess.run([REDNET, "train", "--help"], capture_output=True, text=True, check=True).stdout.split()
    )
    for limits in ("1 to 896; default: 176", "0 to 0.99; default: 0.1", "0 or more; default: 0"):
        assert f"({limits})" in shown
    assert f"it is {FINE_TUNING_RATE}" in {flag: text for flag, _, text in RECIPE_FLAGS}["--learning-rate"]


def test_help_is_printed_without_importing_torch() -> None:
    """Heavy modules are imported only by commands that need them."""
    script = (
        "import sys, rednet.service.cli.parser as p; p.make_parser().format_help(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    shown = subprocess.run([REDNET, "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("serve", "predict", "info", "convert", "quantize", "train", "evaluate"):
        assert command in shown
