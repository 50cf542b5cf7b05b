"""Training: a folder of class folders in, a checkpoint that can be served out."""

import copy
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from model.calibrate import fit_temperature
from model.checkpoint import Checkpoint, save_checkpoint
from model.evaluate import evaluate
from model.folders import MAX_NAMED, read_folder
from model.inference.preparation import prepare
from model.labels import named
from model.photos import Photo, PhotoError, check_photos
from model.recipe import Recipe
from model.rednet import RedNet, RedNetConfig
from model.resume import ResumeFile, State
from model.steps import Run, keep_freed_memory, optimizer_for
from model.text import clean_text

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
) -> Checkpoint:
    """Train on `data/train/<class>/*`, try the result on `data/val/<class>/*`, write `output`.

    While it runs, `output` + ".training" holds all that is needed to go on after a kill; run the same command again.

    Args:
        data: the folder of both.
        output: the checkpoint to write.
        recipe: what to follow.
        device: where to compute.
        start: begin with these weights, instead of random ones; the last layer only if the classes are the same.
        workers: threads that read photos.

    Raises:
        PhotoError: a folder or photo cannot be used.
        ValueError: the recipe is no network, or an unfinished run beside `output` follows another recipe or other data.
        OSError: `output` cannot be written.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise NotADirectoryError(f"{output} must be a file in a folder that exists")
    classes, photos, validation = _read_data(data, workers)
    photos, held_out = hold_out(photos)
    preprocess = recipe.preprocess
    if start:
        preprocess = replace(preprocess, mean=start.preprocess.mean, std=start.preprocess.std)
    keep_freed_memory()
    state = _first_state(recipe, start, classes, device)
    resume = ResumeFile(output.with_name(output.name + ".training"), recipe, photos, start)
    resume.load(state)
    run = Run(state, recipe, preprocess, photos, device, workers)
    while state.epoch < recipe.epochs:
        run.epoch(resume)
        watched = evaluate(run.logits, preprocess, held_out or validation, workers=workers, describe="  check")
        _finish_epoch(state, watched.summary()["top1"])
        resume.save(state)
    results = _calibrate(run, held_out, validation)
    checkpoint = Checkpoint(
        net=state.averaged,
        labels=named(classes),
        preprocess=preprocess,
        name=clean_text(output.name.removesuffix(".safetensors")),
        provenance={
            "data": clean_text(data.resolve().name),
            **({"from": start.name} if start else {}),
            "recipe": asdict(recipe),
            "precision": run.precision,
            "torch": torch.__version__,
            **results,
            "history": state.history,
        },
    )
    save_checkpoint(output, checkpoint, half=True)
    resume.path.unlink(missing_ok=True)
    return checkpoint


def _read_data(data: Path, workers: int) -> tuple[list[str], list[Photo], list[Photo]]:
    """Classes, photos to learn from and photos to try the result on, all of which can be read; and what is left out,
    on standard error.
    """
    classes, photos, left_out = read_folder(data / "train")
    if len(photos) < 2:
        raise PhotoError(f"{data / 'train'} holds a single photo, from which nothing can be learned")
    validation = read_folder(data / "val", classes)
    _say(f"{len(classes)} classes, {len(photos)} photos to learn from, {len(validation.photos)} for validation")
    for line in (*left_out.lines(), *validation.left_out.lines()):
        _say(line)
    tried = {photo.target for photo in validation.photos}
    if missing := [name for target, name in enumerate(classes) if target not in tried]:
        more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
        _say(f"without photos for validation: {', '.join(missing[:MAX_NAMED])}{more}")
    check_photos([*photos, *validation.photos], workers)
    return classes, photos, validation.photos


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _first_state(recipe: Recipe, start: Checkpoint | None, classes: Sequence[str], device: torch.device) -> State:
    """Before the first step."""
    torch.manual_seed(recipe.seed)
    net = with_classes(start, classes) if start else fresh_network(recipe, len(classes))
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


def fresh_network(recipe: Recipe, num_classes: int) -> RedNet:
    """A network with random weights."""
    stem_channels = max(32, recipe.base_channels)  # the involution of the stem has half of them, in groups of 16
    return RedNet(
        RedNetConfig(
            depth=recipe.depth,
            num_classes=num_classes,
            base_channels=recipe.base_channels,
            stem_channels=stem_channels,
        )
    )


def with_classes(start: Checkpoint, classes: Sequence[str]) -> RedNet:
    """A copy of a trained network for these classes: with a fresh last layer, unless they are its own."""
    net = RedNet(replace(start.net.config, num_classes=len(classes)))
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
    return {"temperature": temperature, "accuracy": accuracy}


@torch.no_grad()
def cool(net: RedNet, temperature: float) -> None:
    """Divide logits by a temperature, in the weights: then whatever runs them answers with calibrated probabilities."""
    net.head.fc.weight.div_(temperature)
    net.head.fc.bias.div_(temperature)


def _finish_epoch(state: State, top1: float) -> None:
    state.history.append({"loss": state.loss_sum / state.step, "top1": top1})
    state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0
    print(f"epoch {state.epoch}: loss {state.history[-1]['loss']:.4f}, check top-1 {top1:.4f}", file=sys.stderr)
