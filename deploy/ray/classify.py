"""Classifies a folder of photos on a Ray cluster: python deploy/ray/classify.py PHOTOS RESULTS

RESULTS becomes a folder of Parquet files with the columns path, error, label, probability and features. On several
machines, both folders must be on storage that all of them see.
"""

import sys
from typing import Any

import numpy as np
import ray
import torch

from rednet import load_checkpoint, prepare
from rednet.service.decoding.decode import decode_image
from rednet.service.errors import ServiceError
from rednet.service.scores import top_classes


class Classifier:
    """An actor with one core and the prepared network."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.checkpoint = load_checkpoint()
        self.run = prepare(self.checkpoint.net, self.checkpoint.preprocess, calibration=self.checkpoint.calibration)
        self.names = [label.name for label in self.checkpoint.labels]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        side = self.checkpoint.preprocess.crop
        pixels, errors = np.zeros((len(batch["path"]), 3, side, side), np.uint8), [""] * len(batch["path"])
        for index, photo in enumerate(batch["bytes"]):
            try:
                pixels[index] = decode_image(photo, self.checkpoint.preprocess, max_pixels=50_000_000)
            except ServiceError as error:
                errors[index] = error.code
        output = self.run(torch.from_numpy(pixels))
        best = [top_classes(logits, self.names, 1)[0] for logits in output.logits.numpy()]
        found = {"label": [each["label"] for each in best], "probability": [each["probability"] for each in best]}
        return {"path": batch["path"], "error": errors, **found, "features": output.features.numpy()}


if __name__ == "__main__":
    photos, results = sys.argv[1:]
    ray.init(address="auto")
    actors = ray.data.ActorPoolStrategy(size=int(ray.cluster_resources()["CPU"]) - 1)  # one core reads and writes
    dataset = ray.data.read_binary_files(photos, include_paths=True)
    dataset.map_batches(Classifier, batch_size=32, compute=actors, num_cpus=1).write_parquet(results)
