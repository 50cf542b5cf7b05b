"""Temperature and familiarity of networks that are trained on few photos."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from rednet import Familiarity, load_checkpoint, prepare
from rednet.model.training.calibration import predict
from rednet.model.training.dataset import read_folder
from rednet.model.training.evaluation import Predictions, evaluate
from rednet.model.training.loader import Photo
from rednet.model.training.splits import split_folds
from rednet.model.training.steps import Run
from rednet.model.training.temperature import fit_temperature
from rednet.model.training.trainer import train
from tests.test_trainer import CPU, RECIPE, data

__all__ = ["data"]  # a fixture


def photos(count: int) -> list[Photo]:
    return [Photo(Path(f"{index}.jpg"), 2 * index // count) for index in range(count)]


@pytest.mark.parametrize(
    ("count", "networks", "predicted"),
    [(19, 0, 0), (20, 4, 20), (72, 4, 72), (199, 3, 150), (400, 1, 100), (1999, 1, 500)],
)
def test_folds_predict_photos_that_they_do_not_train_on(count: int, networks: int, predicted: int) -> None:
    """Every photo at most once, and evenly from both classes; as few networks as give enough predictions."""
    folds = split_folds(photos(count))
    assert len(folds) == networks
    for training, others in folds:
        assert sorted([*training, *others]) == sorted(photos(count))
        assert abs(2 * sum(photo.target for photo in others) - len(others)) <= 2
    every = [photo for _, others in folds for photo in others]
    assert len({*every}) == len(every) == predicted


@pytest.mark.slow
def test_few_photos_get_temperature_and_familiarity(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are those of networks without a quarter of the photos, and the run says so. An interrupted run continues
    where it was, and the result is that of an unbroken one."""
    unbroken = train(data, tmp_path / "a.safetensors", RECIPE, device=CPU)
    said = capsys.readouterr().err
    assert "afterwards 4 more networks are trained, each without a quarter of the photos" in said
    assert "cross-validation: network 4 of 4, without 18 of the photos" in said
    basis = "validation photos, not used to choose anything; the temperature is fitted on 72 photos in cross-validation"
    assert basis in said
    assert unbroken.provenance["accuracy of"] == basis
    assert unbroken.provenance["held out"] == 0
    assert unbroken.familiarity

    tries: list[str] = []

    def interrupted(run: Run, photos: list[Photo], describe: str) -> Predictions:
        tries.append(describe)
        if len(tries) == 3:
            raise KeyboardInterrupt
        return predict(run, photos, describe)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rednet.model.training.trainer.predict", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "b.safetensors", RECIPE, device=CPU)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.safetensors", "b.safetensors.training", *(f"b.safetensors.training-{n}" for n in (1, 2, 3))}
    capsys.readouterr()
    continued = train(data, tmp_path / "b.safetensors", RECIPE, device=CPU)
    assert capsys.readouterr().err.count("epoch 2: loss") == 1  # the last network's
    assert continued.familiarity == unbroken.familiarity
    assert continued.provenance["temperature"] == unbroken.provenance["temperature"]
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


@pytest.mark.slow
def test_temperature_is_that_of_unseen_photos(data: Path, tmp_path: Path) -> None:
    """The networks of the folds, trained one by one, give the same temperature and familiarity."""
    found = train(data, tmp_path / "a.safetensors", RECIPE, device=CPU)
    logits, targets = [], []
    for number, (training, others) in enumerate(split_folds(read_folder(data / "train").photos)):
        root = tmp_path / str(number)
        for photo in training:
            folder = root / "train" / photo.path.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / photo.path.name).symlink_to(photo.path)
        (root / "val").symlink_to(data / "val")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rednet.model.training.trainer.split_folds", lambda _: [])
            alone = train(root, tmp_path / f"{number}.safetensors", RECIPE, device=CPU)
        assert alone.provenance["temperature"] == 1.0
        assert alone.familiarity is None
        run = prepare(alone.net, alone.preprocess, "cpu")
        predictions = evaluate(lambda pixels, run=run: run(pixels).logits, alone.preprocess, others)  # type: ignore[misc]
        logits.append(predictions.logits)
        targets.append(predictions.targets)
    temperature = fit_temperature(torch.cat(logits), torch.cat(targets))
    assert found.provenance["temperature"] == pytest.approx(temperature, rel=0.02)
    assert found.familiarity
    expected = Familiarity.fit(torch.cat(logits) / temperature)
    np.testing.assert_allclose(found.familiarity.energies, expected.energies, rtol=0.05, atol=0.02)


@pytest.mark.slow
def test_familiarity_of_other_classes_is_not_kept(data: Path, tmp_path: Path) -> None:
    """Fine-tuning measures it anew, or leaves it out where there are too few photos."""
    first = train(data, tmp_path / "a.safetensors", RECIPE, device=CPU)
    few = tmp_path / "few"
    for split in ("train", "val"):
        for name in ("blue", "green"):
            (few / split / name).mkdir(parents=True)
            for index in range(8):
                (few / split / name / f"{index}.png").symlink_to(data / split / name / f"{index}.png")
    assert first.familiarity
    tuned = train(few, tmp_path / "b.safetensors", RECIPE, device=CPU, start=first)
    assert tuned.familiarity is None
    assert load_checkpoint(tmp_path / "b.safetensors").familiarity is None
    again = train(data, tmp_path / "c.safetensors", RECIPE, device=CPU, start=first)
    assert again.familiarity
    assert again.familiarity != first.familiarity
