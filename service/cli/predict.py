"""`rednet predict`: photos through the pipeline that the server uses, without a server."""

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rednet.service.build import build, load_network
from rednet.service.errors import MalformedRequest, PayloadTooLarge, ServiceError, error_body
from rednet.service.pipeline import Answer, Pipeline
from rednet.service.scores import top_classes
from rednet.service.settings import Settings
from rednet.service.system.cores import usable_cores
from rednet.service.system.terminal import printable
from rednet.service.types import State, Upload

MAX_FILE_BYTES = 1 << 28  # of a photo; 50 million pixels of 32 bits, uncompressed, are less
AT_ONCE = 16  # photos whose files are in memory
TIMEOUT_S = 86_400.0
POLL_S = 0.01


def predict(options: argparse.Namespace) -> int:
    """Print the likeliest classes of each photo; the exit status is 1 if there are none for one of them."""
    photos = len(options.photos)
    # Warm-up measures no batches larger than will be needed, so that one photo is answered soon.
    settings = Settings(
        checkpoint=options.checkpoint, max_batch_size=min(AT_ONCE, photos), decoders=min(usable_cores(), photos)
    )
    return asyncio.run(_run(build(settings, load_network(settings)), options))


async def _run(pipeline: Pipeline, options: argparse.Namespace) -> int:
    labels = [label.label for label in pipeline.model.labels]
    predictions: list[dict[str, Any]] = []
    await pipeline.start()
    try:
        while pipeline.state is not State.READY:
            if pipeline.state is State.FAILED:
                return 1  # the log says why
            await asyncio.sleep(POLL_S)
        for first in range(0, len(options.photos), AT_ONCE):
            photos = options.photos[first : first + AT_ONCE]
            for photo, answer in zip(photos, await _answers(pipeline, photos), strict=True):
                predictions.append(_prediction(answer, labels, options.top_k))
                if not options.json:
                    _print_prediction(photo, predictions[-1])
    finally:
        await pipeline.close()
    if options.json:
        print(json.dumps({"model": pipeline.model.name, "predictions": predictions}))
    return 1 if any("error" in prediction for prediction in predictions) else 0


async def _answers(pipeline: Pipeline, photos: Sequence[Path]) -> Sequence[Answer]:
    with pipeline.admit(TIMEOUT_S) as request:
        return await pipeline.run(request, [_read(photo) for photo in photos], "predict")


def _read(photo: Path) -> Upload:
    try:
        with photo.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        return MalformedRequest(str(error.strerror))
    if len(content) > MAX_FILE_BYTES:
        return PayloadTooLarge(f"the file has more than {MAX_FILE_BYTES} bytes")
    return content


def _prediction(answer: Answer, labels: Sequence[str], top_k: int) -> dict[str, Any]:
    if isinstance(answer.outcome, ServiceError):
        return error_body(answer.outcome)
    return {"classes": top_classes(answer.outcome.logits, labels, top_k)}


def _print_prediction(photo: Path, prediction: dict[str, Any]) -> None:
    print(printable(photo))
    if "error" in prediction:
        print(f"  {printable(prediction['error']['message'])}")
    for score in prediction.get("classes", []):
        print(f"  {score['probability']:6.1%}  {score['label']}")
