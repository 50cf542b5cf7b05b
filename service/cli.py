"""The command line. Each command imports what it needs, so that `--help` is instant."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from service.cores import usable_cores
from service.settings import add_flags, read_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `rednet`; returns the exit status: 0 done, 1 partly or wholly failed, 2 asked for the impossible."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        status = run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `rednet predict ... | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:  # what users can mend; anything else is a defect and shows its trace
        print(f"rednet: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rednet", description="Serve, try and train RedNet involution classifiers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = _command(commands, "serve", _serve, "answer requests over HTTP; every option is also REDNET_<OPTION>")
    add_flags(serve)

    predict = _command(commands, "predict", _predict, "classify photos, without a server")
    predict.add_argument("photos", nargs="+", metavar="PHOTO", type=Path)
    _add_checkpoint(predict)
    predict.add_argument("--top-k", type=_at_least_one, default=5, metavar="K", help="classes per photo (default: 5)")
    _add_json(predict)

    info = _command(commands, "info", _info, "what a checkpoint is and what would run it here")
    _add_checkpoint(info)
    _add_json(info)

    convert = _command(commands, "convert", _convert, "an official .pth or PaddleClas .pdparams checkpoint into ours")
    convert.add_argument("input", metavar="IN", type=Path)
    convert.add_argument("output", metavar="OUT.safetensors", type=Path)
    convert.add_argument("--depth", type=int, metavar="N", help="refuse anything but RedNet-N")
    convert.add_argument("--labels", type=Path, metavar="F", help="names of the classes: JSON, or text with one a line")

    quantize = _command(commands, "quantize", _quantize, "int8 scales from a folder of photos, stored with the weights")
    quantize.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    quantize.add_argument("photos", metavar="PHOTOS", type=Path, help="a folder; sub-folders are searched, too")
    quantize.add_argument(
        "--output", required=True, type=Path, metavar="F", help="the checkpoint to write (.safetensors)"
    )

    train = _command(commands, "train", _train, "train on DATA_DIR/train/<class>/*; resumes after a kill")
    train.add_argument("data", metavar="DATA_DIR", type=Path)
    train.add_argument("--from", dest="start", type=Path, metavar="F", help="a checkpoint to begin with (fine-tuning)")
    _add_output(train)
    _add_recipe(train)
    _add_device(train)

    evaluate = _command(commands, "evaluate", _evaluate, "accuracy on DATA_DIR/val/<class>/*")
    evaluate.add_argument("data", metavar="DATA_DIR", type=Path)
    _add_checkpoint(evaluate)
    evaluate.add_argument("--confusion", type=Path, metavar="F.png", help="draw which classes are taken for which")
    evaluate.add_argument(
        "--precision", default="auto", metavar="P", help="auto, fp32, bf16, fp16, int8 (default: auto)"
    )
    _add_device(evaluate)
    _add_json(evaluate)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], description: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(run=run)
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, metavar="F", help="default: the embedded one")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", required=True, type=Path, metavar="F", help="the checkpoint to write (.safetensors)"
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


RECIPE_FLAGS: Sequence[tuple[str, int | float | str, str]] = (
    # The fields of `model.recipe.Recipe`, not imported because torch comes with it: two seconds for a `--help`.
    ("--depth", 26, "26, 38, 50, 101 or 152"),
    ("--base-channels", 64, "width of the network; 64 is the paper's"),
    ("--epochs", 20, "passes over the photos"),
    ("--size", 176, "pixels of the largest training crops; the network is served at 8/7 of it or a little more"),
    ("--batch-size", 64, "photos per step"),
    ("--learning-rate", 2e-3, "at its peak; with --from it is 0.0003, unless given"),
    ("--warmup-epochs", 2.0, "until the peak is reached"),
    ("--weight-decay", 0.05, "on weight matrices"),
    ("--label-smoothing", 0.1, "share of the target spread over all classes"),
    ("--mixup", 0.1, "how much photos are blended into one another; 0: not at all"),
    ("--precision", "auto", "auto, fp32 or bf16: of the activations"),
    ("--seed", 0, "order, crops and first weights follow from it"),
)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    for flag, default, description in RECIPE_FLAGS:
        shown = f"{description} (default: {default})"
        parser.add_argument(flag, type=type(default), default=argparse.SUPPRESS, metavar="N", help=shown)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text!r}")
    return int(text)


def _serve(options: argparse.Namespace) -> int:
    flags = {name: value for name, value in vars(options).items() if name != "run"}
    settings = read_settings(flags, os.environ)
    from service.main import serve

    return serve(settings)


def _predict(options: argparse.Namespace) -> int:
    from model import load_checkpoint, prepare
    from service.decode import decode_image
    from service.errors import MalformedRequest, ServiceError
    from service.routes.v1 import error_body
    from service.runner import PreparedRunner, set_threads
    from service.scores import top_classes
    from service.settings import Settings

    set_threads(usable_cores())
    checkpoint = load_checkpoint(options.checkpoint)
    run = prepare(checkpoint.net, checkpoint.preprocess, calibration=checkpoint.calibration)
    runner = PreparedRunner(run, largest=1)
    names = [label.name for label in checkpoint.labels]
    predictions: list[Any] = []
    failed = False
    for photo in options.photos:
        try:
            pixels = decode_image(photo.read_bytes(), checkpoint.preprocess, Settings().max_pixels)
            logits = runner.launch([pixels]).wait().logits[0]
            predictions.append({"classes": top_classes(logits, names, options.top_k)})
        except OSError as error:
            failed = True
            predictions.append(error_body(MalformedRequest(f"{error.strerror}")))
        except ServiceError as error:
            failed = True
            predictions.append(error_body(error))
        if not options.json:
            _print_prediction(photo, predictions[-1])
    if options.json:
        print(json.dumps({"model": checkpoint.name, "predictions": predictions}))
    return 1 if failed else 0


def _print_prediction(photo: Path, prediction: Any) -> None:
    print(photo)
    if "error" in prediction:
        print(f"  {prediction['error']['message']}")
    for score in prediction.get("classes", []):
        print(f"  {score['probability']:6.1%}  {score['label']}")


def _info(options: argparse.Namespace) -> int:
    import platform

    import torch

    from model import load_checkpoint, prepare
    from service.main import describe
    from service.runner import set_threads

    set_threads(usable_cores())
    checkpoint = load_checkpoint(options.checkpoint)
    prepared = prepare(checkpoint.net, checkpoint.preprocess, calibration=checkpoint.calibration)
    model = describe(checkpoint, [prepared]).model_dump(exclude={"max_batch_size", "cost_s"})  # a server measures those
    model["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    if options.json:
        print(json.dumps(model))
        return 0
    for key, value in model.items():
        match value:
            case dict():
                print(f"{key}:")
                print("\n".join(f"  {name}: {item}" for name, item in value.items()))
            case list():
                names = [item["label"] if key == "labels" else item for item in value]
                print(f"{key}: {', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}")
            case _:
                print(f"{key}: {value}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from model import load_checkpoint, save_checkpoint
    from model.labels import read_labels

    checkpoint = load_checkpoint(options.input)
    config = checkpoint.net.config
    if options.depth is not None and options.depth != config.depth:
        raise ValueError(f"{options.input} is a {config.name}, not a rednet{options.depth}")
    if options.labels is not None:
        labels = read_labels(options.labels)
        if len(labels) != config.num_classes:
            raise ValueError(f"{options.labels} names {len(labels)} classes; the network has {config.num_classes}")
        checkpoint = replace(checkpoint, labels=labels)
    save_checkpoint(options.output, checkpoint)
    print(f"{options.output}: {config.name}, {config.num_classes} classes")
    return 0


def _quantize(options: argparse.Namespace) -> int:
    from model import load_checkpoint, save_checkpoint
    from model.checkpoint import fits_half
    from model.quantize import quantize
    from service.runner import set_threads

    set_threads(usable_cores())
    if not options.output.parent.is_dir():  # told before the work, not after it
        raise ValueError(f"{options.output} cannot be written: {options.output.parent} is not a folder")
    checkpoint = quantize(load_checkpoint(options.checkpoint), options.photos, usable_cores())
    save_checkpoint(options.output, checkpoint, half=fits_half(checkpoint.net))
    report = checkpoint.provenance["int8"]
    print(f"{options.output}: {checkpoint.net.config.name} with int8 scales from {report['photos']} photos")
    if "not_compared" in report:
        print(f"int8 was not compared with float32: {report['not_compared']}")
    else:
        print(
            "on {compared} other photos int8 gives float32's class for {same_class:.1%}, and features at a mean cosine "
            "of {feature_cosine:.4f} to its own".format(**report)
        )
    return 0


def _train(options: argparse.Namespace) -> int:
    from model import load_checkpoint
    from model.prepare import resolve_device
    from model.recipe import FINE_TUNING_RATE, Recipe
    from model.train import train
    from service.runner import set_threads

    set_threads(usable_cores())
    fields: dict[str, Any] = {
        name: value for name, value in vars(options).items() if name in Recipe.__dataclass_fields__
    }
    start = None
    if options.start is not None:
        if fields.keys() & {"depth", "base_channels"}:
            raise ValueError("--depth and --base-channels are those of the checkpoint that --from names")
        start = load_checkpoint(options.start)
        config = start.net.config
        its_own = {"depth": config.depth, "base_channels": config.base_channels, "learning_rate": FINE_TUNING_RATE}
        fields = its_own | fields
    train(
        options.data,
        options.output,
        Recipe(**fields),
        device=resolve_device(options.device),
        start=start,
        workers=usable_cores(),
    )
    print(f"{options.output}: done")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from model import load_checkpoint, prepare
    from model.confusion import draw_confusion
    from model.evaluate import evaluate
    from model.photos import find_photos
    from service.runner import set_threads

    set_threads(usable_cores())
    checkpoint = load_checkpoint(options.checkpoint)
    run = prepare(checkpoint.net, checkpoint.preprocess, options.device, options.precision, checkpoint.calibration)
    _, photos = find_photos(options.data / "val", [label.id for label in checkpoint.labels])
    answers = evaluate(lambda pixels: run(pixels).logits, checkpoint.preprocess, photos, workers=usable_cores())
    result: dict[str, Any] = {"model": checkpoint.name, "precision": run.precision} | answers.summary()
    names = [label.name for label in checkpoint.labels]
    by_class = answers.by_class(names)
    if options.confusion is not None:
        draw_confusion(answers.confusion().numpy(), names).save(options.confusion, "png")
    if options.json:
        print(json.dumps(result | {"classes": by_class}))
        return 0
    for row in sorted(by_class, key=lambda row: row["top1"]):
        print(f"{row['top1']:8.4f}  {row['label']} ({row['images']} photos)")
    print("{images} photos: top-1 {top1:.4f}, top-5 {top5:.4f}, expected calibration error {ece:.4f}".format(**result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
