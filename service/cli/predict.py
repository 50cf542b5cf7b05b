"""`rednet predict`: photos through the pipeline that the server uses, without a server."""

import argparse
import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from rednet.model.io.output_files import check_output
from rednet.model.training.progress import progress
from rednet.service.build import build, decode_limits
from rednet.service.cli.answers import MAX_AHEAD, PhotoAnswers, wait_until_ready
from rednet.service.cli.photo_paths import find_all
from rednet.service.cli.result_formats import Columns
from rednet.service.cli.results import Results, check_format, finish, open_results
from rednet.service.engine.admission import OwnCounts
from rednet.service.errors import DeviceFailed, ServiceError, error_body
from rednet.service.model_description import LabelBody
from rednet.service.network import Network, load_network
from rednet.service.observability.metrics import Metrics
from rednet.service.pipeline import Answer, Pipeline
from rednet.service.scores import prediction
from rednet.service.settings import Settings, read_settings
from rednet.service.system.cores import usable_cores
from rednet.service.system.terminal import printable
from rednet.service.types import Inference

FEW = 16  # photos that are answered as soon as they can be; for more, warm-up finds the best batch size
FULL_WAIT_MS = 100.0  # a batch waits that long until it is full


def predict(options: argparse.Namespace) -> int:
    """Print or write the likeliest classes of each photo; the exit status is 1 if there are none for one of them."""
    _check(options)
    photos, skipped = find_all(options.paths, sys.stdin.buffer)
    for line in skipped.lines():
        print(printable(line), file=sys.stderr)
    if not photos:
        raise ValueError(f"there are no photos in {', '.join(map(str, options.paths))}")
    settings = _settings(options, len(photos))
    network = load_network(settings)
    try:
        if options.output is None:
            return asyncio.run(_print(_pipeline(settings, network), photos, options))
        return _write(settings, network, photos, options)
    except DeviceFailed:
        return 1  # the log says why


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot be done before anything slow is done.

    Raises:
        ValueError: options contradict each other, or the output cannot be written.
    """
    if options.output is None:
        if options.features or options.force:
            raise ValueError(f"--{'features' if options.features else 'force'} needs --output")
        return
    if options.json:
        raise ValueError("--json is for printing; --output F.jsonl writes JSON")
    check_format(options.output)
    check_output(options.output, replace=options.force, inputs=[options.checkpoint])


def _settings(options: argparse.Namespace, photos: int) -> Settings:
    flags = {name: value for name, value in vars(options).items() if name in ("device", "precision", "threads")}
    # Warm-up measures no batches larger than will be needed, so that one photo is answered soon.
    few = {"max_batch_size": photos} if photos <= FEW else {"max_wait_ms": FULL_WAIT_MS, "max_queue": MAX_AHEAD}
    decoders = min(usable_cores(), photos)
    return read_settings({"checkpoint": options.checkpoint, "decoders": decoders} | few | flags, {})


async def _print(pipeline: Pipeline, photos: Sequence[str], options: argparse.Namespace) -> int:
    labels = pipeline.model.labels
    predictions: list[dict[str, Any]] = []
    failed = False
    async with _answers(pipeline, photos) as answers:
        for photo in photos:
            row = _row(await anext(answers), labels, options.top_k)
            failed = failed or "error" in row
            if options.json:
                predictions.append(row)
            else:
                _print_row(photo, row)
    if options.json:
        print(json.dumps({"model": pipeline.model.name, "predictions": predictions}))
    return 1 if failed else 0


def _write(settings: Settings, network: Network, photos: Sequence[str], options: argparse.Namespace) -> int:
    model = network.description
    files = [_shown(photo) for photo in photos]
    run = {
        "set of photos": hashlib.sha256("\0".join(photos).encode("utf-8", "surrogateescape")).hexdigest(),
        "checkpoint": model.checkpoint_sha256,
        "model": model.name,
        "device": model.device,
        "precision": model.precision,
        "--top-k": options.top_k,
        "--features": options.features,
    }
    with open_results(options.output, run, files) as results:
        if results.done:
            print(f"continuing after {results.done} of {len(photos)} photos", file=sys.stderr)
        if results.done < len(photos):
            asyncio.run(_add_rows(_pipeline(settings, network), photos, files, results, options))
        width = model.feature_channels if options.features else 0
        columns = Columns(min(options.top_k, len(model.labels)), model.familiarity, width)
        finish(options.output, columns, replace=options.force)
    print(f"{printable(options.output)}: {len(photos)} photos, {results.failed} of them unreadable")
    return 1 if results.failed else 0


async def _add_rows(
    pipeline: Pipeline, photos: Sequence[str], files: Sequence[str], results: Results, options: argparse.Namespace
) -> None:
    labels = pipeline.model.labels
    done = results.done
    async with _answers(pipeline, photos[done:]) as answers:
        for file in progress(files[done:], total=len(files), done=done, describe="photos"):
            answer = await anext(answers)
            row = {"file": file} | _row(answer, labels, options.top_k)
            if options.features and isinstance(answer.outcome, Inference):
                row["features"] = answer.outcome.features
            results.add(row)


def _pipeline(settings: Settings, network: Network) -> Pipeline:
    return build(settings, network, Metrics(), OwnCounts(), decode_limits(settings))


@asynccontextmanager
async def _answers(pipeline: Pipeline, photos: Sequence[str]) -> AsyncIterator[AsyncIterator[Answer]]:
    """Start the pipeline, and answer photos in order until the context ends."""
    await pipeline.start()
    try:
        await wait_until_ready(pipeline)
        async with aclosing(PhotoAnswers(pipeline).in_order(photos)) as answers:
            yield answers
    finally:
        await pipeline.close()


def _row(answer: Answer, labels: Sequence[LabelBody], top_k: int) -> dict[str, Any]:
    if isinstance(answer.outcome, ServiceError):
        return error_body(answer.outcome)
    return {**prediction(answer.outcome.logits, answer.familiarity, labels, top_k)}


def _print_row(photo: str, row: dict[str, Any]) -> None:
    print(printable(photo))
    if "error" in row:
        print(f"  {printable(row['error']['message'])}")
    for score in row.get("classes", []):
        print(f"  {score['probability']:6.1%}  {score['label']}")
    if "familiarity" in row:
        print(f"  familiarity {row['familiarity']:.2f}")


def _shown(photo: str) -> str:
    """A path as text: bytes that are not UTF-8 are escaped, as in `\\xff`."""
    return os.fsencode(photo).decode("utf-8", "backslashreplace")
