"""Training: a folder of class folders in, a checkpoint that can be served out."""

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace as replace_fields
from functools import partial
from pathlib import Path

import torch

from rednet.model.inference.preparation import prepare
from rednet.model.io.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from rednet.model.io.labels import named
from rednet.model.io.output_files import check_output, locked
from rednet.model.io.text import clean_text
from rednet.model.nn.rednet import RedNet, RedNetConfig
from rednet.model.training.dataset import MAX_NAMED, read_folder
from rednet.model.training.evaluation import evaluate
from rednet.model.training.loader import Photo, PhotoError, check_photos
from rednet.model.training.recipe import Recipe
from rednet.model.training.resume import ResumeFile, State, set_of
from rednet.model.training.steps import Run, keep_freed_memory, optimizer_for
from rednet.model.training.temperature import fit_temperature

HELD_OUT_EVERY = 20  # one photo in so many is kept from training, to watch it and to fit the temperature
FEWEST_HELD_OUT = 100  # fewer photos could say little: then none are kept


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
    """Train on `data/train/<class>/*`, try the result on `data/val/<class>/*`, write `output`.

    While it runs, `output` + ".training" holds all that is needed to go on after a kill; run the same command again.
    Run again after its end, it returns the finished result.

    Args:
        data: the folder of both.
        output: the checkpoint to write.
        recipe: what to follow.
        device: where to compute.
        start: begin with these weights, instead of random ones; the last layer only if the classes are the same.
        workers: threads that read photos.
        replace: replace `output` if it exists, even if it is the result of the same run.

    Raises:
        PhotoError: a folder or photo cannot be used.
        OutputError: `output` exists and is another result, or another process is writing it.
        ValueError: the recipe is no network, or an unfinished run beside `output` follows another recipe or other data.
        OSError: `output` cannot be written.
    """
    if start is None:
        fresh_config(recipe, num_classes=1)  # what cannot be built is refused before any photo is read
    check_output(output, replace=True)
    classes, photos, validation = _find_photos(data)
    photos, held_out = hold_out(photos)
    resume = ResumeFile(output.with_name(output.name + ".training"), recipe, photos, start)
    follows = resume.follows | {"set of validation photos": set_of(validation)}
    if not replace and (finished := _finished(output, follows)):
        return finished
    check_output(output, replace=replace)
    lock = output.with_name(output.name + ".lock")
    with locked(lock):
        try:
            check_photos([*photos, *held_out, *validation], workers)
            preprocess = recipe.preprocess
            if start:
                preprocess = replace_fields(preprocess, mean=start.preprocess.mean, std=start.preprocess.std)
            keep_freed_memory()
            state = _first_state(recipe, start, classes, device)
            resume.load(state)
            run = Run(state, recipe, preprocess, photos, device, workers)
            _learn(run, resume, held_out or validation)
            checkpoint = Checkpoint(
                net=state.averaged,
                labels=named(classes),
                preprocess=preprocess,
                name=clean_text(output.name.removesuffix(".safetensors")),
                provenance={
                    "data": clean_text(data.resolve().name),
                    **({"from": start.name} if start else {}),
                    **follows,
                    "precision": run.precision,
                    "torch": torch.__version__,
                    **_calibrate(run, held_out, validation),
                    "history": state.history,
                },
            )
            save_checkpoint(output, checkpoint, half=True, replace=replace)
            resume.path.unlink(missing_ok=True)
        finally:
            lock.unlink(missing_ok=True)
    return checkpoint


def _learn(run: Run, resume: ResumeFile, watched: Sequence[Photo]) -> None:
    """Do the epochs that are left, and print after each how good the network is on the photos to watch."""
    while run.state.epoch < run.recipe.epochs:
        run.epoch(resume)
        answers = evaluate(run.logits, run.preprocess, watched, workers=run.workers, describe="  check")
        _finish_epoch(run.state, answers.summary()["top1"])
        resume.save(run.state)


def _finished(output: Path, follows: Mapping[str, object]) -> Checkpoint | None:
    """The result of a run of the same recipe and photos, if that is what `output` is."""
    if not output.is_file():
        return None
    try:
        checkpoint = load_checkpoint(output)
    except CheckpointError:
        return None
    if any(checkpoint.provenance.get(key) != value for key, value in follows.items()):
        return None
    _say(f"{output} is already finished, with this recipe and these photos; --force trains it again")
    return checkpoint


def _find_photos(data: Path) -> tuple[list[str], list[Photo], list[Photo]]:
    """Classes, photos to learn from and photos to try the result on; what is left out, on standard error."""
    classes, photos, left_out = read_folder(data / "train")
    if len(photos) < 2:
        raise PhotoError(f"{data / 'train'} holds a single photo, from which nothing can be learned")
    validation = read_folder(data / "val", classes)
    _say(f"{len(classes)} classes, {len(photos)} photos to learn from, {len(validation.photos)} for validation")
    for line in (*left_out.lines(), *validation.left_out.lines()):
        _say(line)
    if not hold_out(photos)[1]:
        _say(
            f"of fewer than {HELD_OUT_EVERY * FEWEST_HELD_OUT} photos none are held out: the validation photos are "
            "watched after every epoch, and no temperature is fitted"
        )
    tried = {photo.target for photo in validation.photos}
    if missing := [name for target, name in enumerate(classes) if target not in tried]:
        more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
        _say(f"without photos for validation: {', '.join(missing[:MAX_NAMED])}{more}")
    return classes, photos, validation.photos


def _say(text: str) -> None:
    print(clean_text(text), file=sys.stderr)


def _first_state(recipe: Recipe, start: Checkpoint | None, classes: Sequence[str], device: torch.device) -> State:
    """Before the first step."""
    torch.manual_seed(recipe.seed)
    net = with_classes(start, classes) if start else RedNet(fresh_config(recipe, len(classes)))
    # Channels-last is how convolutions and the native involution want it; what flows through the network follows suit.
    net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return State(net, copy.deepcopy(net).eval(), optimizer_for(net, recipe))


def hold_out(photos: Sequence[Photo]) -> tuple[list[Photo], list[Photo]]:
    """The photos to train on, and those kept from it: evenly from all classes, because they come class by class."""
    some = slice(HELD_OUT_EVERY // 2, None, HELD_OUT_EVERY)
    learned, held_out = list(photos), list(photos[some])
    if len(held_out) < FEWEST_HELD_OUT:
        return learned, []
    del learned[some]
    return learned, held_out


def fresh_config(recipe: Recipe, num_classes: int) -> RedNetConfig:
    """The network that a recipe describes.

    Raises:
        ValueError: it describes none.
    """
    return RedNetConfig(
        depth=recipe.depth,
        num_classes=num_classes,
        base_channels=recipe.base_channels,
        stem_channels=max(32, recipe.base_channels),  # the involution of the stem has half of them, in groups of 16
    )


def with_classes(start: Checkpoint, classes: Sequence[str]) -> RedNet:
    """A copy of a trained network for these classes: with a fresh last layer, unless they are its own."""
    net = RedNet(replace_fields(start.net.config, num_classes=len(classes)))
    weights = start.net.state_dict()
    if [label.id for label in start.labels] != list(classes):
        weights = {key: tensor for key, tensor in weights.items() if not key.startswith("head.")}
    net.load_state_dict(weights, strict=False)
    return net


def _calibrate(run: Run, held_out: Sequence[Photo], validation: Sequence[Photo]) -> dict[str, object]:
    """Fit the averaged network's temperature to the photos held out, put it into its weights, and try the result."""
    net = run.state.averaged.cpu()
    prepared = prepare(net, run.preprocess, run.device)
    ask = partial(evaluate, lambda pixels: prepared(pixels).logits, run.preprocess, workers=run.workers)
    temperature = fit_temperature(*ask(held_out, describe="calibration")) if held_out else 1.0
    accuracy = ask(validation, describe="validation").cooled(temperature).summary()
    cool(net, temperature)
    if held_out:
        meaning = f"validation photos, not watched; the temperature is fitted to {len(held_out)} others, held out"
    else:
        meaning = "validation photos, the same that were watched after every epoch; no temperature is fitted"
    _say("top-1 {top1:.4f}, top-5 {top5:.4f}, expected calibration error {ece:.4f}".format(**accuracy))
    _say(f"of {len(validation)} {meaning}")
    return {"temperature": temperature, "held out": len(held_out), "accuracy": accuracy, "accuracy of": meaning}


@torch.no_grad()
def cool(net: RedNet, temperature: float) -> None:
    """Divide logits by a temperature, in the weights: then whatever runs them answers with calibrated probabilities."""
    net.head.fc.weight.div_(temperature)
    net.head.fc.bias.div_(temperature)


def _finish_epoch(state: State, top1: float) -> None:
    state.history.append({"loss": state.loss_sum / state.step, "top1": top1})
    state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0
    print(f"epoch {state.epoch}: loss {state.history[-1]['loss']:.4f}, check top-1 {top1:.4f}", file=sys.stderr)
