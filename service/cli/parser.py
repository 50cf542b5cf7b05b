"""The command line of `rednet`."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rednet import __version__
from rednet.model.training.bounds import BOUNDS
from rednet.service.system.exit import end
from rednet.service.system.init_process import fork_if_init
from rednet.service.system.terminal import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `rednet`.

    Args:
        arguments: of the command line; None: those of this process, which is then set up and ended as a command.

    Returns:
        The exit status: 0: success, 1: partial or complete failure, 2: invalid arguments or files.
    """
    if arguments is None:
        open_standard_streams()
        fork_if_init()
    if isinstance(sys.stdout, io.TextIOWrapper):  # terminals may lack some characters
        sys.stdout.reconfigure(errors="backslashreplace")
    options = make_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        status = run(options)
        sys.stdout.flush()
        if arguments is None and run.__name__ == "serve":
            end(status)
        return status
    except BrokenPipeError:  # as in `rednet predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:  # errors that users can fix; others are bugs and show a traceback
        print(f"rednet: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def open_standard_streams() -> None:
    """Open standard input, output and error if the process was started without them.

    Otherwise the next file or socket would get one of their descriptors, and log lines would be written into it.
    """
    for descriptor, mode in enumerate(("r", "w", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            name = ("stdin", "stdout", "stderr")[descriptor]
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115  (until the process ends)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    # Imported here because a process that is PID 1 forks before any slow import: `settings` needs Pydantic.
    from rednet.service.cli import commands
    from rednet.service.settings import add_flags

    parser = argparse.ArgumentParser(prog="rednet", description="Serve, try and train RedNet involution classifiers.")
    parser.add_argument("--version", action="version", version=f"rednet {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = _command(subparsers, commands.serve, "serve over HTTP; every option is also a variable REDNET_<OPTION>")
    add_flags(serve)

    predict = _command(subparsers, commands.predict, "classify photos, or folders of photos, without a server")
    predict.add_argument(
        "paths", nargs="+", metavar="PATH", type=Path, help="a photo, a folder, or - for a list on standard input"
    )
    _add_checkpoint(predict)
    predict.add_argument(
        "--top-k", type=_top_k, default=5, metavar="K", help=f"classes per photo (1 to {MAX_CLASSES}; default: 5)"
    )
    _add_json(predict)
    predict.add_argument(
        "--output", type=Path, metavar="F", help="write .jsonl, .csv or .parquet; an interrupted run continues"
    )
    predict.add_argument("--features", action="store_true", help="also write the feature vectors")
    _add_force(predict)
    add_flags(predict, ("device", "precision", "threads"))

    info = _command(subparsers, commands.info, "describe a checkpoint, and the backend that would run it here")
    _add_checkpoint(info)
    _add_json(info)

    convert = _command(subparsers, commands.convert, "convert an official .pth or PaddleClas .pdparams checkpoint")
    convert.add_argument("input", metavar="IN", type=Path, help="the checkpoint; it is never executed")
    convert.add_argument("output", metavar="OUT.safetensors", type=Path, help="checkpoint to write")
    convert.add_argument("--depth", type=int, metavar="N", help="fail unless the checkpoint is a RedNet-N")
    convert.add_argument("--labels", type=Path, metavar="F", help="class names: JSON, CSV, or text with one per line")
    _add_force(convert)

    quantize = _command(
        subparsers, commands.quantize, "measure activation ranges for int8 on photos, and store them with the weights"
    )
    quantize.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint file; embedded: the embedded one"
    )
    quantize.add_argument("photos", metavar="PHOTOS", type=Path, help="a folder, searched with its subfolders")
    _add_output(quantize)
    _add_training_commands(subparsers)
    return parser


def _add_training_commands(subparsers: Any) -> None:
    from rednet.service.cli import commands

    train = _command(subparsers, commands.train, "train on DATA_DIR/train/<class>/*; resumes an interrupted run")
    train.add_argument("data", metavar="DATA_DIR", type=Path, help=DATA_HELP)
    train.add_argument(
        "--from", dest="start", type=Path, metavar="F", help="checkpoint to fine-tune; embedded: the embedded one"
    )
    _add_output(train)
    _add_recipe(train)
    _add_device(train)

    evaluate = _command(subparsers, commands.evaluate, "measure accuracy on DATA_DIR/val/<class>/*")
    evaluate.add_argument("data", metavar="DATA_DIR", type=Path, help=DATA_HELP)
    _add_checkpoint(evaluate)
    evaluate.add_argument("--confusion", type=Path, metavar="F.png", help="draw a confusion matrix")
    _add_force(evaluate)
    foreign = "a folder of photos of other things, to measure how well familiarity tells them apart"
    evaluate.add_argument("--foreign", type=Path, metavar="PHOTOS", help=foreign)
    precisions = "numeric precision of the network: auto, fp32, bf16, fp16 or int8 (default: auto)"
    evaluate.add_argument("--precision", default="auto", metavar="P", help=precisions)
    _add_device(evaluate)
    _add_json(evaluate)


def _command(subparsers: Any, run: Callable[[argparse.Namespace], int], description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(run.__name__, help=description, description=description)
    parser.set_defaults(run=run)
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, metavar="F", help="checkpoint file (default: the embedded one)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, type=Path, metavar="F", help="checkpoint to write (.safetensors)")
    _add_force(parser)


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace an existing file, which is an error otherwise")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="D", help="device to use: auto, cpu, cuda or cuda:N (default: auto)"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


DATA_HELP = "a folder with the folders train and val, and in each a folder of photos per class"
MAX_SHOWN = 1e9  # larger limits are not worth showing
MAX_CLASSES = 1 << 16  # `rednet.model.nn.rednet.MAX_SIZE`

RECIPE_FLAGS: Sequence[tuple[str, int | float | str, str]] = (
    # The fields of `rednet.model.training.recipe.Recipe`, which imports torch: `--help` would take two seconds.
    ("--depth", 26, "depth of the network: 26, 38, 50, 101 or 152"),
    ("--base-channels", 64, "width of the network, a multiple of 16; the paper uses 64"),
    ("--epochs", 20, "passes over the photos"),
    ("--size", 176, "largest training crop in pixels; inference uses about 8/7 of it"),
    ("--batch-size", 64, "photos per step"),
    ("--learning-rate", 2e-3, "peak learning rate; with --from it is 0.0003, unless given"),
    ("--warmup-epochs", 2.0, "epochs until the learning rate reaches its peak, at most a fifth of all"),
    ("--weight-decay", 0.05, "weight decay of weight matrices"),
    ("--label-smoothing", 0.1, "share of the target spread over all classes"),
    ("--mixup", 0.1, "alpha of mixup; 0: no mixup"),
    ("--cutmix", 0.0, "alpha of CutMix, for half of the batches if there is mixup as well; 0: no CutMix"),
    ("--trivial-augment", 0.0, "share of the photos that TrivialAugment changes"),
    ("--full-size-epochs", 0.2, "share of the epochs, the last ones, that use the largest crops"),
    ("--precision", "auto", "precision of the activations: auto, fp32 or bf16"),
    ("--seed", 0, "seed of data order, crops and initial weights"),
)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    for flag, default, description in RECIPE_FLAGS:
        shown = f"{description} ({_limits(flag)}default: {default})"
        parser.add_argument(
            flag,
            type=type(default),
            default=argparse.SUPPRESS,
            metavar="P" if isinstance(default, str) else "N",
            help=shown,
        )


def _limits(flag: str) -> str:
    minimum, maximum = BOUNDS.get(flag.removeprefix("--").replace("-", "_"), (None, None))
    if minimum is None or maximum is None:
        return ""
    return f"{minimum:g} or more; " if maximum > MAX_SHOWN else f"{minimum:g} to {maximum:g}; "


def _top_k(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text!r}")
    if int(text) > MAX_CLASSES:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_CLASSES}, the most classes a network can have")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
