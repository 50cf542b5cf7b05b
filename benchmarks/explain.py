"""The cost of an explanation compared with a plain prediction: in the network, and over HTTP as JSON and as a picture.

python -m benchmarks.explain PHOTOS [--checkpoint F]
"""

import argparse
import statistics
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import report
from benchmarks.server import post_when_ready, serving
from rednet import Prepared, load_checkpoint, prepare
from rednet.service.engine.runner import PreparedRunner
from rednet.service.types import ClassActivation, ExplainSpec, KernelSums

ROUNDS = 40
SPECS: Mapping[str, ExplainSpec | None] = {
    "predict": None,
    "class": ClassActivation(),
    **{f"stage{stage + 1}": KernelSums(stage) for stage in range(4)},
}


def interleaved(runs: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """The durations of each run in seconds. Runs are interleaved, so that a slow moment of the machine affects all of
    them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:  # the first turn is a warm-up
                times[name].append(time.perf_counter() - started)
    return times


def rows(what: str, times: Mapping[str, list[float]]) -> list[dict[str, object]]:
    """A row for each run: its median, and the median of its ratios to the plain prediction of the same turn."""
    plain = times["predict"]
    return [
        {
            "what": what,
            "answer": name,
            "ms": 1000 * statistics.median(own),
            "of predict": statistics.median(a / b for a, b in zip(own, plain, strict=True)),
        }
        for name, own in times.items()
    ]


def network(prepared: Prepared, batch: int) -> list[dict[str, object]]:
    """Batches in which every image has the same map."""
    runner = PreparedRunner(prepared, max_batch_size=batch)
    side = prepared.preprocess.crop
    images = list(np.random.default_rng(0).integers(0, 256, (batch, 3, side, side), dtype=np.uint8))

    def run(explain: ExplainSpec | None) -> Callable[[], object]:
        specs = dict.fromkeys(range(batch), explain) if explain else {}
        return lambda: runner.launch(images, specs).wait()

    return rows(f"network, batch {batch}", interleaved({name: run(explain) for name, explain in SPECS.items()}))


def http(base: str, photos: list[bytes]) -> list[dict[str, object]]:
    """One photo after another, from one client."""
    post_when_ready(f"{base}/v1/predict", photos[0])

    def run(path: str, accept: str) -> Callable[[], object]:
        turn = iter(range(1_000_000))

        def ask() -> bytes:
            photo = photos[next(turn) % len(photos)]
            headers = {"Content-Type": "application/octet-stream", "Accept": accept}
            with urllib.request.urlopen(urllib.request.Request(f"{base}/v1/{path}", photo, headers)) as answer:
                content: bytes = answer.read()
                return content

        return ask

    runs = {"predict": run("predict", "*/*")}
    for layer in ("class", "stage3"):
        runs[f"{layer}, JSON"] = run(f"explain?layer={layer}", "application/json")
        runs[f"{layer}, picture"] = run(f"explain?layer={layer}", "image/png")
    return rows("HTTP", interleaved(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="a folder of JPEG files")
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.checkpoint)
    prepared = prepare(checkpoint.net, checkpoint.preprocess)
    table = network(prepared, 1) + network(prepared, 8)
    photos = [path.read_bytes() for path in sorted(options.photos.glob("*.JP*G"))]
    with serving(*(["--checkpoint", options.checkpoint] if options.checkpoint else [])) as base:
        table += http(base, photos)
    report("explain", f"{checkpoint.name} on {prepared.backend}, {torch.get_num_threads()} threads", table)


if __name__ == "__main__":
    main()
