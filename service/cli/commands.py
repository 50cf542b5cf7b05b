"""The commands. Each returns its exit status, 0 for success, and imports what it needs, so that `rednet --help` is
instant."""

import argparse
import atexit
import os
from pathlib import Path
from typing import Any

from rednet.service.settings import check_files, read_settings
from rednet.service.system.cores import usable_cores
from rednet.service.system.hangup import Hangups
from rednet.service.system.terminal import printable


def serve(options: argparse.Namespace) -> int:
    flags = {name: value for name, value in vars(options).items() if name != "run"}
    settings = read_settings(flags, os.environ)
    hangups = Hangups()
    hangups.install()  # before anything slow: a reload that is requested now must not end the server
    from rednet.model.io.checkpoint_folder import find_checkpoint
    from rednet.service.api_keys import KeyFile
    from rednet.service.observability.gpus import count_gpus
    from rednet.service.processes.counts import front_end_count
    from rednet.service.system.sockets import bind, bind_unix, passed_sockets, remove_unix

    # Whatever can fail at once fails before PyTorch is imported.
    if settings.checkpoint is not None:
        find_checkpoint(settings.checkpoint)
    check_files(settings)
    if settings.grpc_port is not None:
        _check_grpc()
    keys = KeyFile(settings.api_key_file) if settings.api_key_file else None
    sockets = passed_sockets(os.environ)
    if sockets and settings.uds is not None:
        raise ValueError(f"--uds {settings.uds}: the service manager has already passed a socket to listen on")
    if not sockets:
        sockets = [bind_unix(settings.uds)] if settings.uds else bind(settings.host, settings.port)
        if settings.uds:
            atexit.register(remove_unix, settings.uds, settings.uds.lstat().st_ino)
    grpc_sockets = [] if settings.grpc_port is None else bind(settings.host, settings.grpc_port)
    front_ends = front_end_count(settings, usable_cores(), count_gpus())
    if front_ends > 1:
        from rednet.service.processes.supervisor import supervise

        return supervise(settings, sockets, front_ends, hangups, grpc_sockets)
    from rednet.service.main import serve as run_server

    return run_server(settings, sockets, keys, hangups, grpc_sockets)


def _check_grpc() -> None:
    try:
        import rednet.service.grpc.server  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"--grpc-port needs {error.name}: pip install 'rednet-serve[grpc]'") from None


def predict(options: argparse.Namespace) -> int:
    from rednet.service.cli.predict import predict as run

    return run(options)


def info(options: argparse.Namespace) -> int:
    from rednet.service.cli.info import info as run

    return run(options)


def convert(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from rednet import load_checkpoint, save_checkpoint
    from rednet.model.io.checkpoint import ASSUMED_LABELS, fits_half
    from rednet.model.io.label_files import read_labels
    from rednet.model.io.output_files import check_output

    check_output(options.output, replace=options.force, inputs=[options.input, options.labels])
    checkpoint = load_checkpoint(options.input)
    config = checkpoint.net.config
    if options.depth is not None and options.depth != config.depth:
        raise ValueError(f"{options.input} is a {config.name}, not a rednet{options.depth}")
    if options.labels is not None:
        labels = read_labels(options.labels, checkpoint.labels, keep_ids=ASSUMED_LABELS not in checkpoint.provenance)
        provenance = {key: value for key, value in checkpoint.provenance.items() if key != ASSUMED_LABELS}
        checkpoint = replace(checkpoint, labels=labels, provenance=provenance)
    save_checkpoint(options.output, checkpoint, half=fits_half(checkpoint.net), replace=options.force)
    print(f"{printable(options.output)}: {config.name}, {config.num_classes} classes")
    return 0


def quantize(options: argparse.Namespace) -> int:
    from rednet import load_checkpoint, save_checkpoint
    from rednet.model.io.checkpoint import fits_half
    from rednet.model.io.output_files import check_output
    from rednet.model.training.quantization import quantize as run
    from rednet.service.engine.runner import set_threads

    set_threads(usable_cores())
    check_output(options.output, replace=options.force, inputs=[options.checkpoint])
    checkpoint = run(load_checkpoint(_file(options.checkpoint)), options.photos, usable_cores())
    save_checkpoint(options.output, checkpoint, half=fits_half(checkpoint.net), replace=options.force)
    report = checkpoint.provenance["int8"]
    network = checkpoint.net.config.name
    print(f"{printable(options.output)}: {network} with activation ranges from {report['photos']} photos")
    if "not_compared" in report:
        print(f"int8 was not compared with float32: {report['not_compared']}")
    else:
        print(
            "on {compared} other photos, int8 and float32 choose the same class for {same_class:.1%}; the mean cosine "
            "similarity of their features is {feature_cosine:.4f}".format(**report)
        )
    return 0


def train(options: argparse.Namespace) -> int:
    from rednet import load_checkpoint
    from rednet.model.inference.preparation import resolve_device
    from rednet.model.io.output_files import check_output
    from rednet.model.training.recipe import FINE_TUNING_RATE, Recipe
    from rednet.model.training.trainer import train as run_training
    from rednet.service.engine.runner import set_threads

    set_threads(usable_cores())
    fields: dict[str, Any] = {
        name: value for name, value in vars(options).items() if name in Recipe.__dataclass_fields__
    }
    start = None
    check_output(options.output, replace=True, inputs=[options.start])
    if options.start is not None:
        if fields.keys() & {"depth", "base_channels"}:
            raise ValueError("--depth and --base-channels are those of the checkpoint that --from names")
        start = load_checkpoint(_file(options.start))
        config = start.net.config
        its_own = {"depth": config.depth, "base_channels": config.base_channels, "learning_rate": FINE_TUNING_RATE}
        fields = its_own | fields
    run_training(
        options.data,
        options.output,
        Recipe(**fields),
        device=resolve_device(options.device),
        start=start,
        workers=usable_cores(),
        replace=options.force,
    )
    print(f"{printable(options.output)}: done")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    from rednet.service.cli.evaluate import evaluate as run

    return run(options)


def _file(path: Path) -> Path | None:
    """The checkpoint that an argument names; None: the embedded one."""
    return None if path == Path("embedded") else path
