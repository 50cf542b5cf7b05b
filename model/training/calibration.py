"""Calibrates a trained network: its temperature and familiarity, from photos that it has not seen."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rednet.model.inference.familiarity import Familiarity
from rednet.model.inference.preparation import prepare
from rednet.model.training.evaluation import Predictions, evaluate
from rednet.model.training.loader import Photo
from rednet.model.training.progress import log
from rednet.model.training.steps import Run
from rednet.model.training.temperature import fit_temperature, scale_logits

MIN_COMPARED = 50  # photos for familiarity: with 20, up to 18% of the validation photos were below 0.05


class Calibration(NamedTuple):
    familiarity: Familiarity | None
    report: dict[str, object]  # for the provenance


def calibrate(run: Run, unseen: Predictions | None, held_out: int, validation: Sequence[Photo]) -> Calibration:
    """Fit the temperature and familiarity, apply the temperature to the averaged network, and evaluate the result.

    Args:
        run: the finished run.
        unseen: predictions for photos that the predicting network had not seen; None: nothing is fitted.
        held_out: how many of them are held-out photos; 0: they are from cross-validation.
        validation: photos for the evaluation.
    """
    temperature, familiarity = 1.0, None
    basis = "no temperature is fitted"
    if unseen:
        temperature = fit_temperature(unseen.logits, unseen.targets)
        if len(unseen.targets) >= MIN_COMPARED:
            familiarity = Familiarity.fit(unseen.logits / temperature)
        kind = f"{held_out} held-out photos" if held_out else f"{len(unseen.targets)} photos in cross-validation"
        basis = f"the temperature is fitted on {kind}"
    predictions = predict(run, validation, "validation").with_temperature(temperature)
    scale_logits(run.state.averaged, temperature)
    meaning = f"validation photos, {'not used before' if held_out else 'not used to choose anything'}; {basis}"
    log(f"{len(validation)} photos: {predictions}")
    log(f"these are {meaning}")
    accuracy = predictions.summary()
    report = {"temperature": temperature, "held out": held_out, "accuracy": accuracy, "accuracy of": meaning}
    return Calibration(familiarity, report)


def predict(run: Run, photos: Sequence[Photo], describe: str) -> Predictions:
    """Run the averaged network on photos, as it will be served."""
    prepared = prepare(run.state.averaged.cpu(), run.preprocess, run.device)

    def logits(pixels: Tensor) -> Tensor:
        return prepared(pixels).logits

    return evaluate(logits, run.preprocess, photos, workers=run.workers, describe=describe)
