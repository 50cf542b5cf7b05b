"""Training and evaluation, on generated photos: each class is one colour."""

import itertools
import json
import random
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rednet import create_rednet, load_checkpoint, prepare
from rednet.model.images.preprocess import Pixels
from rednet.model.training.confusion import draw_confusion
from rednet.model.training.dataset import read_folder
from rednet.model.training.evaluation import Predictions, evaluate
from rednet.model.training.initial import adapt_to_classes
from rednet.model.training.loader import Photo, PhotoError, load_batches
from rednet.model.training.recipe import FINE_TUNING_RATE, Recipe
from rednet.model.training.splits import hold_out
from rednet.model.training.steps import update_average
from rednet.model.training.trainer import train
from rednet.service.cli.parser import main
from tests.conftest import photo
from tests.servers import REDNET, wait_until

RECIPE = Recipe(base_channels=16, epochs=2, size=32, batch_size=8, learning_rate=0.003, seed=5)
FLAGS = ["--base-channels", "16", "--epochs", "2", "--size", "32", "--batch-size", "8", "--learning-rate", "0.003"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 24 training and 8 validation photos."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for name, colour in (("blue", (0, 0, 255)), ("green", (0, 255, 0)), ("red", (255, 0, 0))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                coarse = np.clip(rng.normal(np.array(colour) * 0.6 + 50, 40, (5, 6, 3)), 0, 255).astype(np.uint8)
                clouds = Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)
                clouds.save(folder / f"{index}.png")
    return root


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).net.state_dict()


def test_training_learns_and_saves_a_checkpoint(data: Path, tmp_path: Path) -> None:
    """After a few epochs the colours are classified. The file has provenance, and `evaluate` gives the same
    accuracy."""
    recipe = Recipe(base_channels=16, epochs=8, size=64, batch_size=8, learning_rate=0.003)
    train(data, tmp_path / "colours.safetensors", recipe, device=CPU)
    checkpoint = load_checkpoint(tmp_path / "colours.safetensors")
    assert [label.name for label in checkpoint.labels] == ["blue", "green", "red"]
    assert checkpoint.preprocess.crop == 96
    assert checkpoint.name == "colours"
    history = checkpoint.provenance["history"]
    assert len(history) == 8
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["top1"] > 0.8  # for 24 photos; the minimum of six other seeds is 0.88
    assert [path.name for path in tmp_path.iterdir()] == ["colours.safetensors"]


@pytest.mark.slow
def test_training_is_deterministic_for_a_seed(data: Path, tmp_path: Path) -> None:
    """Two runs give the same weights for any number of loader threads, and another seed gives others."""
    for name, recipe, workers in (
        ("a", RECIPE, 1),
        ("b", RECIPE, 3),
        ("c", Recipe(base_channels=16, epochs=2, size=32, batch_size=8, learning_rate=0.003, seed=6), 1),
    ):
        train(data, tmp_path / name, recipe, device=CPU, workers=workers)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["head.fc.weight"], c["head.fc.weight"])


@pytest.mark.slow
def test_killed_training_resumes_with_identical_results(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed twice at random and resumed by the same command gives the same weights and history."""
    train(data, tmp_path / "unbroken", RECIPE, device=CPU)
    broken = tmp_path / "broken"
    # The process saves after every batch, so that a run killed within an epoch can be resumed.
    script = (
        "import sys, rednet.model.training.steps as steps; steps.SAVE_EVERY_S = 0.0; "
        "from rednet.service.cli.parser import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [str(REDNET.with_name("python")), "-c", script]
    command += ["train", str(data), "--output", str(broken), *FLAGS, "--seed", "5"]
    resume_file = tmp_path / "broken.training"

    def batches_done() -> int:
        if not resume_file.exists():
            return 0
        saved = torch.load(resume_file, weights_only=True)
        return int(saved["epoch"] * 9 + saved["step"])

    first = random.randint(1, 8)
    for moment in (first, first + random.randint(1, 7)):  # there are 18 batches in two epochs
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_until(lambda moment=moment: batches_done() >= moment, f"{moment} batches")  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not broken.exists()
    subprocess.run([str(REDNET), *command[3:]], check=True, capture_output=True)
    expected, resumed = weights(tmp_path / "unbroken"), weights(broken)
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    assert load_checkpoint(broken).provenance["history"] == load_checkpoint(tmp_path / "unbroken").provenance["history"]
    assert not resume_file.exists()


def test_unfinished_training_with_another_recipe_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    """Nor is a damaged one. The message says what to do."""
    unfinished = tmp_path / "x.training"
    torch.save({"recipe": {"depth": 50}, "set of photos": "", "starting point": None}, unfinished)
    with pytest.raises(ValueError, match="another recipe"):
        train(data, tmp_path / "x", RECIPE, device=CPU)
    torch.save({"recipe": asdict(RECIPE), "set of photos": "others", "starting point": None}, unfinished)
    with pytest.raises(ValueError, match="another set of photos"):
        train(data, tmp_path / "x", RECIPE, device=CPU)
    unfinished.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged; remove it"):
        train(data, tmp_path / "x", RECIPE, device=CPU)


def test_training_progress_is_printed_in_lines_without_a_terminal(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress, rate and remaining time, and the result of every epoch."""
    monkeypatch.setattr("rednet.model.training.progress.LOG_INTERVAL_S", 0.0)
    assert main(["train", str(data), "--output", str(tmp_path / "x"), *FLAGS]) == 0
    printed = capsys.readouterr().err
    assert "epoch 1/2: 1/9 (11%)" in printed
    assert "left" in printed
    assert "epoch 2: loss" in printed


def test_evaluate_json_counts_every_photo(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last line is JSON, and its values are those of the last epoch."""
    train(data, tmp_path / "x", RECIPE, device=CPU)
    capsys.readouterr()
    assert main(["evaluate", str(data), "--checkpoint", str(tmp_path / "x"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["images"] == 24
    assert result["top5"] == 1.0
    last = load_checkpoint(tmp_path / "x").provenance["history"][-1]["top1"]
    assert result["top1"] == pytest.approx(last, abs=0.05)  # weights are rounded to half precision


def test_evaluate_reports_confused_classes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracy by class, calibration error and a confusion matrix. The text lists the weakest class first."""
    train(data, tmp_path / "x", RECIPE, device=CPU)
    picture = tmp_path / "confusion.png"
    command = ["evaluate", str(data), "--checkpoint", str(tmp_path / "x"), "--confusion", str(picture)]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["label"], row["images"]) for row in result["classes"]] == [("blue", 8), ("green", 8), ("red", 8)]
    assert sum(row["top1"] for row in result["classes"]) / 3 == pytest.approx(result["top1"])
    assert 0 <= result["ece"] <= 1
    with Image.open(picture) as image:
        assert image.format == "PNG"
    assert main([*command, "--force"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shares = [float(line.split()[0]) for line in lines[:3]]
    assert shares == sorted(shares)
    assert lines[3].startswith("24 photos, fp32: top-1")


def test_confusion_matrix_image() -> None:
    """Rows are true classes. Both axes have a label and names, unless there are a thousand classes."""
    answers = Predictions(torch.eye(3)[[0, 0, 2, 2]], torch.tensor([0, 0, 0, 2]))
    counts = answers.confusion()
    assert counts.tolist() == [[2, 0, 1], [0, 0, 0], [0, 0, 1]]
    named_picture = draw_confusion(counts.numpy(), ["a", "bb", "a long name"])
    assert named_picture.width == named_picture.height > 3 * 40
    for edge in (12, 12, 200, 27), (12, 12, 27, 200):  # the labels of the axes, beyond the longest name
        assert np.asarray(named_picture.crop(edge)).min() < 128
    assert draw_confusion(np.zeros((1000, 1000), np.int64), [""] * 1000).size == (1000, 1000)


@pytest.mark.slow
def test_fine_tuning_starts_from_the_checkpoint(data: Path, tmp_path: Path) -> None:
    """The last layer is kept for the same classes and replaced for others. All other weights are kept."""
    train(data, tmp_path / "start", RECIPE, device=CPU)
    start = load_checkpoint(tmp_path / "start")
    trained = start.net.state_dict()
    same, other = adapt_to_classes(start, ["blue", "green", "red"]), adapt_to_classes(start, ["black", "white"])
    assert torch.equal(same.head.fc.weight, trained["head.fc.weight"])
    assert other.head.fc.weight.shape == (2, 512)
    assert all(torch.equal(other.state_dict()[key], trained[key]) for key in trained if key.startswith("backbone."))
    for split in ("train", "val"):  # two of the three classes, with other names
        for old, new in (("blue", "cold"), ("red", "warm")):
            shutil.copytree(data / split / old, tmp_path / "two" / split / new)
    command = ["train", str(tmp_path / "two"), "--from", str(tmp_path / "start"), "--output", str(tmp_path / "tuned")]
    assert main([*command, "--epochs", "2", "--size", "32", "--batch-size", "8"]) == 0
    tuned = load_checkpoint(tmp_path / "tuned")
    assert [label.name for label in tuned.labels] == ["cold", "warm"]
    assert tuned.net.config == replace(start.net.config, num_classes=2)
    assert tuned.provenance["from"] == "start"
    assert tuned.provenance["recipe"]["learning_rate"] == FINE_TUNING_RATE
    assert main([*command, "--depth", "50"]) == 2


def test_fine_tuning_starts_from_the_embedded_checkpoint(data: Path, tmp_path: Path) -> None:
    """`--from embedded` needs no path."""
    command = ["train", str(data), "--from", "embedded", "--output", str(tmp_path / "tuned")]
    assert main([*command, "--epochs", "1", "--size", "32"]) == 0
    tuned = load_checkpoint(tmp_path / "tuned")
    assert tuned.provenance["from"] == "rednet26-imagenette"
    assert [label.name for label in tuned.labels] == ["blue", "green", "red"]


def test_held_out_photos_are_one_in_twenty_of_every_class() -> None:
    """None are held out if there would be too few."""
    photos = [Photo(Path(f"{target}/{index:03}.png"), target) for target in range(4) for index in range(500)]
    learned, held_out = hold_out(photos)
    assert len(held_out) == 100
    assert [sum(photo.target == target for photo in held_out) for target in range(4)] == [25, 25, 25, 25]
    assert sorted(learned + held_out) == photos
    assert hold_out(photos[:1900]) == (photos[:1900], [])


def test_held_out_photos_set_the_temperature(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is part of the weights: the accuracy in the file is that of the scaled probabilities."""
    monkeypatch.setattr("rednet.model.training.splits.HELD_OUT_EVERY", 3)
    monkeypatch.setattr("rednet.model.training.splits.MIN_HELD_OUT", 10)
    train(data, tmp_path / "x", RECIPE, device=CPU)
    checkpoint = load_checkpoint(tmp_path / "x")
    assert checkpoint.provenance["temperature"] != 1.0
    photos = read_folder(data / "val").photos
    run = prepare(checkpoint.net, checkpoint.preprocess)
    summary = evaluate(lambda pixels: run(pixels).logits, checkpoint.preprocess, photos).summary()
    assert summary["ece"] == pytest.approx(checkpoint.provenance["accuracy"]["ece"], abs=0.02)


def test_held_out_photos_set_familiarity(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation photos, which are of the same kind, look like them on average."""
    monkeypatch.setattr("rednet.model.training.splits.HELD_OUT_EVERY", 3)
    monkeypatch.setattr("rednet.model.training.splits.MIN_HELD_OUT", 10)
    monkeypatch.setattr("rednet.model.training.calibration.MIN_COMPARED", 10)
    recipe = Recipe(base_channels=16, epochs=8, size=64, batch_size=8, learning_rate=0.003)
    train(data, tmp_path / "x", recipe, device=CPU)
    checkpoint = load_checkpoint(tmp_path / "x")
    assert checkpoint.familiarity is not None
    run = prepare(checkpoint.net, checkpoint.preprocess)
    logits = evaluate(lambda pixels: run(pixels).logits, checkpoint.preprocess, read_folder(data / "val").photos).logits
    assert 0.25 < checkpoint.familiarity(logits).mean() < 0.75


def test_crop_size_grows_to_full_size() -> None:
    """Crops grow from half to three quarters of the size, and the last epochs have full size. Small crops stay
    constant."""
    sizes = [Recipe(epochs=20, size=176).size_at(epoch) for epoch in range(20)]
    assert sizes == [80] * 2 + [96] * 6 + [112] * 6 + [128] * 2 + [176] * 4
    assert Recipe(epochs=1, size=100).size_at(0) == 100
    assert Recipe(epochs=20, size=24).size_at(0) == 24


@pytest.mark.parametrize(("share", "count"), [(0.0, 1), (0.25, 5), (1.0, 20)])
def test_share_of_full_size_epochs(share: float, count: int) -> None:
    """The last epoch has full size whatever the share."""
    recipe = Recipe(epochs=20, size=176, full_size_epochs=share)
    assert sum(recipe.size_at(epoch) == 176 for epoch in range(20)) == count


def test_weight_average_covers_about_the_last_tenth_of_the_steps() -> None:
    """If each step's weights are its number, the average lags a tenth behind. The first step has full weight."""
    net, averaged = (create_rednet("rednet26", num_classes=2, base_channels=16, stem_channels=32) for _ in range(2))
    for step in range(1, 201):
        with torch.no_grad():
            net.head.fc.bias.fill_(step)
        update_average(averaged, net, step)
        if step == 1:
            assert torch.equal(averaged.head.fc.bias, net.head.fc.bias)
    assert averaged.head.fc.bias[0].item() == pytest.approx(200 * 10 / 11, rel=0.01)


def test_evaluation_matches_classes_by_folder_name(data: Path, tmp_path: Path) -> None:
    """A class without photos keeps its index. A folder that is not a class is an error."""
    photos = read_folder(data / "val", ["alpha", "blue", "green", "red"]).photos
    assert {photo.target for photo in photos} == {1, 2, 3}
    with pytest.raises(PhotoError, match=r"'red', which is not the id of a class of this network: blue, green"):
        read_folder(data / "val", ["blue", "green"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(PhotoError, match="has no photos"):
        read_folder(tmp_path / "empty")
    (tmp_path / "empty" / ".hidden").mkdir()
    (tmp_path / "empty" / ".hidden" / "x.jpg").touch()
    with pytest.raises(PhotoError, match="has no photos"):
        read_folder(tmp_path / "empty")
    with pytest.raises(PhotoError, match="nowhere does not exist; expected"):
        read_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("fields", [{"epochs": 0}, {"batch_size": 1}, {"size": 0}, {"learning_rate": -1.0}])
def test_invalid_recipe_is_rejected(fields: dict[str, Any]) -> None:
    """Before any photo is read."""
    with pytest.raises(ValueError, match=next(iter(fields))):
        Recipe(**fields)


def test_unwritable_training_output_is_rejected_before_training(data: Path, tmp_path: Path) -> None:
    """Not at the end of the run."""
    for output in (tmp_path, tmp_path / "nowhere" / "x.safetensors"):
        with pytest.raises(NotADirectoryError, match="must be a file in a folder that exists"):
            train(data, output, RECIPE, device=CPU)


def test_training_drops_a_last_batch_of_one_photo(data: Path, tmp_path: Path) -> None:
    """72 photos in batches of 71: batch norm needs more than one photo."""
    recipe = Recipe(base_channels=16, epochs=1, size=32, batch_size=71)
    train(data, tmp_path / "x", recipe, device=CPU)
    assert len(load_checkpoint(tmp_path / "x").provenance["history"]) == 1


def test_training_with_a_single_class_is_rejected(data: Path, tmp_path: Path) -> None:
    """It would be right about every photo, and know nothing."""
    for split in ("train", "val"):
        shutil.copytree(data / split / "red", tmp_path / split / "red")
    with pytest.raises(PhotoError, match="a single class, 'red'"):
        train(tmp_path, tmp_path / "x", RECIPE, device=CPU)


def test_training_with_a_single_photo_is_rejected(tmp_path: Path) -> None:
    """Batch norm needs two, and the error comes before training."""
    for split in ("train", "val"):
        (tmp_path / split / "red").mkdir(parents=True)
        photo().save(tmp_path / split / "red" / "1.png")
    with pytest.raises(PhotoError, match="a single photo"):
        train(tmp_path, tmp_path / "x", RECIPE, device=CPU)


def test_damaged_photo_stops_training_with_its_path(data: Path, tmp_path: Path) -> None:
    """Nothing is learned from a replacement."""
    for split, name in itertools.product(("train", "val"), ("red", "blue")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "broken.jpg").write_bytes(b"\xff\xd8\xff and then nothing")
    with pytest.raises(PhotoError, match=r"broken\.jpg is not a readable photo"):
        train(tmp_path, tmp_path / "x", RECIPE, device=CPU)


def test_loader_prefetches_a_bounded_number_of_batches() -> None:
    """In order, ahead of the batch in use."""
    begun: list[int] = []

    def read(item: int) -> tuple[Pixels, int]:
        begun.append(item)
        return np.full((3, 1, 1), item, np.uint8), item

    stream = load_batches(list(range(40)), read, batch_size=4, workers=2)
    assert next(stream).targets.tolist() == [0, 1, 2, 3]
    time.sleep(0.1)
    assert len(begun) <= 12
    assert [target for batch in stream for target in batch.targets.tolist()] == list(range(4, 40))


def test_learning_rate_schedule() -> None:
    """Linear warm-up, then half a cosine to zero."""
    recipe = Recipe(epochs=20, learning_rate=0.2, warmup_epochs=2.0)
    rates = [recipe.learning_rate_at(epoch / 10) for epoch in range(201)]
    assert max(rates) == rates[20] == 0.2
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[200] == pytest.approx(0, abs=1e-9)
