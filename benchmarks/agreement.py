"""Accuracy of every backend and of the server on real photos, compared with the network itself.

    python -m benchmarks.agreement DATA_DIR [--checkpoint F]

The photos are DATA_DIR/val/<class>/*. It measures no speed, and takes minutes, too long for a test.
"""

import argparse
import http.client
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor

from benchmarks.measure import report
from benchmarks.server import post_when_ready, serving
from rednet import Checkpoint, load_checkpoint, prepare
from rednet.model.training.dataset import read_folder
from rednet.model.training.evaluation import Predictions, evaluate
from rednet.model.training.loader import Photo

CLIENTS = 4


def unprepared(checkpoint: Checkpoint) -> Callable[[Tensor], Tensor]:
    """The network itself, without batch norm folding and `prepare`."""
    return lambda pixels: checkpoint.net(checkpoint.preprocess.normalise(pixels))


def over_http(photos: Sequence[Photo], classes: int, options: Sequence[object]) -> Predictions:
    """The predictions of a running server. Logarithms of its probabilities are used as logits."""
    local = threading.local()

    def ask(photo: Photo) -> list[float]:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(urlsplit(url).netloc)
        local.connection.request("POST", f"/v1/predict?top_k={classes}", photo.path.read_bytes())
        found = json.loads(local.connection.getresponse().read())["predictions"][0]["classes"]
        by_index = {each["index"]: each["probability"] for each in found}
        return [math.log(max(by_index[index], 1e-30)) for index in range(classes)]

    with serving(*options) as url, ThreadPoolExecutor(CLIENTS) as pool:
        post_when_ready(f"{url}/v1/predict", photos[0].path.read_bytes())
        logits = torch.tensor(list(pool.map(ask, photos)))
    return Predictions(logits, torch.tensor([photo.target for photo in photos]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.checkpoint)
    photos = read_folder(options.data / "val", [label.id for label in checkpoint.labels]).photos
    answers = {"plain network": evaluate(unprepared(checkpoint), checkpoint.preprocess, photos)}
    precisions = ["fp32", "bf16", "fp16"] if torch.cuda.is_available() else ["fp32", "bf16"]
    if checkpoint.calibration and not torch.cuda.is_available():
        precisions.append("int8")
    for precision in precisions:
        run = prepare(checkpoint.net, checkpoint.preprocess, precision=precision, calibration=checkpoint.calibration)
        name = f"prepared, {precision}: {run.backend}"
        answers[name] = evaluate(lambda pixels, run=run: run(pixels).logits, checkpoint.preprocess, photos)  # type: ignore[misc]
    server_options = ["--checkpoint", options.checkpoint] if options.checkpoint else []
    for precision in ("fp32", "auto"):
        found = over_http(photos, len(checkpoint.labels), [*server_options, "--precision", precision])
        answers[f"server, --precision {precision}, over HTTP"] = found
    plain = answers["plain network"].logits.argmax(dim=1)
    rows = []
    for name, each in answers.items():
        summary = each.summary()
        del summary["top1_interval"]  # they see the same photos, so it says nothing about their differences
        as_plain = float((each.logits.argmax(dim=1) == plain).double().mean())
        rows.append({"answers of": name, **summary, "as plain": as_plain})
    report("agreement", f"{checkpoint.name} on {len(photos)} photos, {os.fspath(options.data.name)}", rows)


if __name__ == "__main__":
    main()
