"""The command line: what may be written on it."""

import argparse
import atexit
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rednet import __version__
from rednet.service.system.init_process import fork_if_init
from rednet.service.system.terminal import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `rednet`; returns the exit status: 0 done, 1 partly or wholly failed, 2 asked for the impossible."""
    if arguments is None:  # the process is ours
        open_standard_streams()
        fork_if_init()
    if isinstance(sys.stdout, io.TextIOWrapper):  # an encoding that lacks a letter is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        status = run(options)
        sys.stdout.flush()
        if arguments is None and run.__name__ == "serve":
            _end(status)
        return status
    except BrokenPipeError:  # `rednet predict ... | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:  # what users can mend; anything else is a defect and shows its trace
        print(f"rednet: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _end(status: int) -> None:
    """End the process without taking the interpreter apart. The engine's thread may still be inside torch, in a long
    batch or in warm-up, and C++ aborts a process that is taken apart under a running thread.
    """
    logging.shutdown()
    atexit._run_exitfuncs()  # the log's writer has the last lines
    os._exit(status)


def open_standard_streams() -> None:
    """Open standard input, output and error where the process was started without them.

    The next file or socket would get their numbers: the event loop would read it as standard input, or a log line
    would be written into it.
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


def _parser() -> argparse.ArgumentParser:
    # As PID 1 the process forks before anything slow is imported: `settings` needs Pydantic.
    from rednet.service.cli import commands
    from rednet.service.settings import add_flags

    parser = argparse.ArgumentParser(prog="rednet", description="Serve, try and train RedNet involution classifiers.")
    parser.add_argument("--version", action="version", version=f"rednet {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = _command(subparsers, commands.serve, "answer requests over HTTP; every option is also REDNET_<OPTION>")
    add_flags(serve)

    predict = _command(subparsers, commands.predict, "classify photos, or folders of them, without a server")
    predict.add_argument(
        "paths", nargs="+", metavar="PATH", type=Path, help="a photo, a folder, or - for a list on standard input"
    )
    _add_checkpoint(predict)
    predict.add_argument("--top-k", type=_top_k, default=5, metavar="K", help="classes per photo (default: 5)")
    _add_json(predict)
    predict.add_argument(
        "--output", type=Path, metavar="F", help="write .jsonl, .csv or .parquet; after a kill, continue where it was"
    )
    predict.add_argument("--features", action="store_true", help="also write the feature vectors")
    _add_force(predict)
    add_flags(predict, ("device", "precision", "threads"))

    info = _command(subparsers, commands.info, "what a checkpoint is and what would run it here")
    _add_checkpoint(info)
    _add_json(info)

    convert = _command(subparsers, commands.convert, "an official .pth or PaddleClas .pdparams checkpoint into ours")
    convert.add_argument("input", metavar="IN", type=Path)
    convert.add_argument("output", metavar="OUT.safetensors", type=Path)
    convert.add_argument("--depth", type=int, metavar="N", help="refuse anything but RedNet-N")
    convert.add_argument(
        "--labels", type=Path, metavar="F", help="names of the classes: JSON, CSV, or text, one a line"
    )
    _add_force(convert)

    quantize = _command(subparsers, commands.quantize, "int8 scales from a folder of photos, stored with the weights")
    quantize.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    quantize.add_argument("photos", metavar="PHOTOS", type=Path, help="a folder; sub-folders are searched, too")
    _add_output(quantize)

    train = _command(subparsers, commands.train, "train on DATA_DIR/train/<class>/*; resumes after a kill")
    train.add_argument("data", metavar="DATA_DIR", type=Path)
    train.add_argument("--from", dest="start", type=Path, metavar="F", help="a checkpoint to begin with (fine-tuning)")
    _add_output(train)
    _add_recipe(train)
    _add_device(train)

    evaluate = _command(subparsers, commands.evaluate, "accuracy on DATA_DIR/val/<class>/*")
    evaluate.add_argument("data", metavar="DATA_DIR", type=Path)
    _add_checkpoint(evaluate)
    evaluate.add_argument("--confusion", type=Path, metavar="F.png", help="draw which classes are taken for which")
    _add_force(evaluate)
    evaluate.add_argument(
        "--precision", default="auto", metavar="P", help="auto, fp32, bf16, fp16, int8 (default: auto)"
    )
    _add_device(evaluate)
    _add_json(evaluate)
    return parser


def _command(subparsers: Any, run: Callable[[argparse.Namespace], int], description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(run.__name__, help=description, description=description)
    parser.set_defaults(run=run)
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, metavar="F", help="default: the embedded one")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", required=True, type=Path, metavar="F", help="the checkpoint to write (.safetensors)"
    )
    _add_force(parser)


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace a file that exists; without it that is an error")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: auto)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


MAX_CLASSES = 1 << 16  # `rednet.model.nn.rednet.MAX_SIZE`

RECIPE_FLAGS: Sequence[tuple[str, int | float | str, str]] = (
    # The fields of `rednet.model.training.recipe.Recipe`, which would import torch: two seconds for a `--help`.
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


def _top_k(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text!r}")
    if int(text) > MAX_CLASSES:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_CLASSES}, the most classes a network can have")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
