"""`rednet evaluate`: accuracy, calibration and familiarity on labelled photos."""

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rednet import Checkpoint, load_checkpoint, prepare
from rednet.model.inference.familiarity import UNFAMILIAR
from rednet.model.io.output_files import check_output, write_atomically
from rednet.model.training.confusion import draw_confusion
from rednet.model.training.dataset import Skipped, find_photos, read_folder
from rednet.model.training.evaluation import Predictions, auroc
from rednet.model.training.evaluation import evaluate as run_evaluation
from rednet.model.training.loader import Photo
from rednet.service.engine.runner import set_threads
from rednet.service.system.cores import usable_cores


def evaluate(options: argparse.Namespace) -> int:
    """Print what was measured as lines of text, or as JSON with all details."""
    set_threads(usable_cores())
    if options.confusion is not None:
        check_output(options.confusion, replace=options.force, inputs=[options.checkpoint])
    checkpoint = load_checkpoint(options.checkpoint)
    if options.foreign is not None and checkpoint.familiarity is None:
        raise ValueError(f"--foreign {options.foreign}: {checkpoint.name} has no familiarity; rednet train measures it")
    run = prepare(checkpoint.net, checkpoint.preprocess, options.device, options.precision, checkpoint.calibration)
    _, photos, left_out = read_folder(options.data / "val", [label.id for label in checkpoint.labels])
    _report(left_out)
    foreign = _foreign_photos(options.foreign)
    predict = partial(run_evaluation, lambda pixels: run(pixels).logits, checkpoint.preprocess, workers=usable_cores())
    answers = predict(photos)
    result: dict[str, Any] = {"model": checkpoint.name, "precision": run.precision} | answers.summary()
    result |= _familiarity(checkpoint, answers, foreign, predict)
    names = [label.name for label in checkpoint.labels]
    by_class = answers.by_class(names)
    if options.confusion is not None:
        picture = io.BytesIO()
        draw_confusion(answers.confusion().numpy(), names).save(picture, "png")
        write_atomically(options.confusion, picture.getvalue(), replace=options.force)
    if options.json:
        print(json.dumps(result | {"classes": by_class}))
        return 0
    for row in sorted(by_class, key=lambda row: row["top1"]):
        print(f"{row['top1']:8.4f}  {row['label']} ({row['images']} photos)")
    print(f"{len(photos)} photos, {run.precision}: {answers}")
    if "unfamiliar" in result:
        print(f"{result['unfamiliar']:.1%} have a familiarity below {UNFAMILIAR}; {UNFAMILIAR:.0%} are expected")
    if "foreign" in result:
        print("{images} foreign photos: {unfamiliar:.1%} are below it, AUROC {auroc:.3f}".format(**result["foreign"]))
    return 0


def _foreign_photos(folder: Path | None) -> Sequence[Photo]:
    if folder is None:
        return []
    found, left_out = find_photos(folder)
    _report(left_out)
    if not found:
        raise ValueError(f"--foreign {folder} has no photos")
    return [Photo(path, target=0) for path in found]  # the target is not used


def _familiarity(
    checkpoint: Checkpoint, answers: Predictions, foreign: Sequence[Photo], predict: Callable[..., Predictions]
) -> dict[str, Any]:
    """The share of unfamiliar photos, and how well familiarity tells foreign photos from them, if there are any."""
    familiarity = checkpoint.familiarity
    if familiarity is None:
        return {}
    known = familiarity(answers.logits)
    result: dict[str, Any] = {"unfamiliar": float((known < UNFAMILIAR).mean())}
    if foreign:
        others = familiarity(predict(foreign, describe="foreign photos").logits)
        unfamiliar = float((others < UNFAMILIAR).mean())
        result["foreign"] = {"images": len(foreign), "unfamiliar": unfamiliar, "auroc": auroc(known, others)}
    return result


def _report(left_out: Skipped) -> None:
    for line in left_out.lines():
        print(line, file=sys.stderr)
