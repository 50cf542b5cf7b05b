"""Trains a RedNet on a folder of class folders, and writes a checkpoint that can be served."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import NamedTuple

import torch

from rednet.model.io.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from rednet.model.io.labels import labels_of
from rednet.model.io.output_files import TRAINING_SUFFIX, check_output, locked
from rednet.model.io.text import clean_text
from rednet.model.training.calibration import calibrate, predict
from rednet.model.training.dataset import MAX_LISTED, read_folder
from rednet.model.training.evaluation import Predictions, evaluate
from rednet.model.training.initial import config_for, initial_state
from rednet.model.training.loader import Photo, PhotoError, check_photos
from rednet.model.training.progress import log
from rednet.model.training.recipe import Recipe
from rednet.model.training.resume import ResumeFile, photos_digest
from rednet.model.training.splits import HELD_OUT_EVERY, MIN_HELD_OUT, hold_out, split_folds
from rednet.model.training.steps import Run, keep_freed_memory


def train(
    data: Path,
    output: Path,
    recipe: Recipe,
    *,
    device: torch.device,
    start: Checkpoint | None = None,
    workers: int = 2,
    replace: bool = False,
) -> Checkpoint:
    """Train on `data/train/<class>/*`, evaluate on `data/val/<class>/*`, and write `output`.

    The temperature and familiarity are fitted on photos that the network has not seen: on held-out ones or, with fewer
    than 2,000 photos, in cross-validation.

    During the run, `output` + ".training" holds its state, and files beside it that of cross-validation: after an
    interruption, the same call resumes. After the end, the same call returns the finished checkpoint.

    Args:
        data: a folder with the folders `train` and `val`.
        output: the checkpoint to write.
        recipe: the hyperparameters.
        device: where to compute.
        start: initial weights instead of random ones. Its last layer is used only if the classes are the same.
        workers: number of threads that read photos.
        replace: replace `output` if it exists, even if it is the result of the same run.

    Returns:
        The trained checkpoint.

    Raises:
        PhotoError: a folder or photo cannot be used.
        OutputError: `output` exists and is another result, or another process is writing it.
        ValueError: the recipe does not describe a network, or an unfinished run of this `output` has other inputs.
        OSError: `output` cannot be written.
    """
    if start is None:
        config_for(recipe, num_classes=1)  # fails for an invalid recipe before any photo is read
    check_output(output, replace=True)
    classes, photos, validation = _read_folders(data)
    photos, held_out = hold_out(photos)
    resume = ResumeFile(output.with_name(output.name + TRAINING_SUFFIX), recipe, photos, start)
    inputs = resume.inputs | {"set of validation photos": photos_digest(validation)}
    if not replace and (finished := _finished_checkpoint(output, inputs)):
        return finished
    check_output(output, replace=replace)
    with _resumable(output, resume):
        check_photos([*photos, *held_out, *validation], workers)
        preprocess = recipe.preprocess
        if start:
            preprocess = replace_fields(preprocess, mean=start.preprocess.mean, std=start.preprocess.std)
        keep_freed_memory()

        def begin(resume: ResumeFile, photos: Sequence[Photo]) -> Run:
            state = initial_state(recipe, start, classes, device)
            resume.load(state)
            return Run(state, recipe, preprocess, photos, device, workers)

        run = begin(resume, photos)
        _run_epochs(run, resume, held_out or validation, "held-out" if held_out else "validation")
        folds = [] if held_out else _folds(resume, recipe, photos, start)
        unseen = predict(run, held_out, "held-out") if held_out else _cross_validate(folds, begin)
        calibration = calibrate(run, unseen, len(held_out), validation)
        provenance = {
            "data": clean_text(data.resolve().name),
            **({"from": start.name} if start else {}),
            **inputs,
            "precision": run.precision,
            "torch": torch.__version__,
            **calibration.report,
            "history": run.state.history,
        }
        checkpoint = Checkpoint(
            net=run.state.averaged,
            labels=labels_of(classes),
            preprocess=preprocess,
            name=clean_text(output.name.removesuffix(".safetensors")),
            provenance=provenance,
            familiarity=calibration.familiarity,
        )
        save_checkpoint(output, checkpoint, half=True, replace=replace)
        for each in (resume, *(fold.resume for fold in folds)):
            each.path.unlink(missing_ok=True)
    return checkpoint


@contextmanager
def _resumable(output: Path, resume: ResumeFile) -> Iterator[None]:
    """Let no other process train `output` meanwhile, and say after an interruption that the run can be resumed."""
    lock = output.with_name(output.name + ".lock")
    with locked(lock):
        try:
            yield
        except KeyboardInterrupt:
            if resume.path.exists():
                log("interrupted; the same command resumes the training")
            raise
        finally:
            lock.unlink(missing_ok=True)


def _run_epochs(run: Run, resume: ResumeFile, monitored: Sequence[Photo] = (), kind: str = "") -> None:
    """Run the remaining epochs, and print the accuracy on the monitored photos after each one.

    It selects nothing: the run ends with its last epoch, whatever was printed.
    """
    state = run.state
    while state.epoch < run.recipe.epochs:
        run.epoch(resume)
        finished = {"loss": state.loss_sum / state.step}
        text = f"epoch {state.epoch + 1}: loss {finished['loss']:.4f}"
        if monitored:
            predictions = evaluate(run.logits, run.preprocess, monitored, workers=run.workers, describe=f"  {kind}")
            finished["top1"] = predictions.summary()["top1"]
            text += f", {kind} top-1 {finished['top1']:.4f}"
        state.history.append(finished)
        state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0
        resume.save(state)  # before the line that says so
        log(text)


class _Fold(NamedTuple):
    """A network of the cross-validation."""

    resume: ResumeFile
    training: Sequence[Photo]
    predicted: Sequence[Photo]


def _folds(resume: ResumeFile, recipe: Recipe, photos: Sequence[Photo], start: Checkpoint | None) -> list[_Fold]:
    """Return the networks of the cross-validation, with their own resume files; none for too few photos."""
    paths = (resume.path.with_name(f"{resume.path.name}-{number}") for number in itertools.count(1))
    return [
        _Fold(ResumeFile(path, recipe, training, start), training, predicted)
        for path, (training, predicted) in zip(paths, split_folds(photos), strict=False)
    ]


def _cross_validate(folds: Sequence[_Fold], begin: Callable[[ResumeFile, Sequence[Photo]], Run]) -> Predictions | None:
    """Train the network of each fold, and return the predictions for the photos that it has not seen."""
    if not folds:
        return None
    found = []
    for number, fold in enumerate(folds, 1):
        log(f"cross-validation: network {number} of {len(folds)}, without {len(fold.predicted)} of the photos")
        run = begin(fold.resume, fold.training)
        _run_epochs(run, fold.resume)
        found.append(predict(run, fold.predicted, "cross-validation"))
    predictions = Predictions(*(torch.cat(column) for column in zip(*found, strict=True)))
    log("cross-validation: top-1 {top1:.4f} of {images} photos".format(**predictions.summary()))
    return predictions


def _finished_checkpoint(output: Path, inputs: Mapping[str, object]) -> Checkpoint | None:
    """Return the checkpoint in `output` if it is the result of a run with the same inputs."""
    if not output.is_file():
        return None
    try:
        checkpoint = load_checkpoint(output)
    except CheckpointError:
        return None
    if any(checkpoint.provenance.get(key) != value for key, value in inputs.items()):
        return None
    log(f"{output} is already finished, with this recipe and these photos; --force trains again")
    return checkpoint


def _read_folders(data: Path) -> tuple[list[str], list[Photo], list[Photo]]:
    """Return classes, training photos and validation photos; report skipped files on standard error."""
    classes, photos, skipped = read_folder(data / "train")
    if len(photos) < 2:
        raise PhotoError(f"{data / 'train'} has a single photo; training needs at least two")
    if len(classes) < 2:
        raise PhotoError(f"{data / 'train'} has a single class, {classes[0]!r}; training needs two or more folders")
    validation = read_folder(data / "val", classes)
    log(f"{len(classes)} classes, {len(photos)} photos for training, {len(validation.photos)} for validation")
    for line in (*skipped.lines(), *validation.skipped.lines()):
        log(line)
    if not hold_out(photos)[1]:
        folds = len(split_folds(photos))
        log(f"with fewer than {HELD_OUT_EVERY * MIN_HELD_OUT} photos none are held out:")
        log("- the accuracy after each epoch is that on the validation photos")
        more = f"{folds} more networks are" if folds > 1 else "one more network is"
        log(
            f"- afterwards {more} trained, each without a quarter of the photos, to calibrate the probabilities"
            if folds
            else "- the probabilities are not calibrated, and familiarity is not measured"
        )
    covered = {photo.target for photo in validation.photos}
    if missing := [name for target, name in enumerate(classes) if target not in covered]:
        more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        log(f"classes without validation photos: {', '.join(missing[:MAX_LISTED])}{more}")
    return classes, photos, validation.photos
