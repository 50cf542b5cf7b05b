"""The device. The only module on a request's way that knows torch."""

from collections.abc import Sequence

import numpy as np
import torch

from model.prepare import Prepared
from service.types import Pixels, RunnerOutput


class TorchRunner:
    """A prepared network behind arrays.

    Args:
        prepared: the network in its inference form.
        max_batch_size: the largest batch it will be given.
    """

    def __init__(self, prepared: Prepared, max_batch_size: int) -> None:
        self._prepared = prepared
        self._max_batch_size = max_batch_size

    def warm_up(self) -> None:
        """Run the smallest and the largest batch, which loads kernels and grows memory pools to what will be needed."""
        side = self._prepared.preprocess.crop
        noise = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)
        for batch_size in (1, self._max_batch_size):
            self.run([noise] * batch_size)

    def run(self, pixels: Sequence[Pixels]) -> RunnerOutput:
        output = self._prepared(torch.from_numpy(np.stack(pixels)))
        return RunnerOutput(output.logits.cpu().numpy(), output.features.cpu().numpy())


def set_threads(threads: int | None) -> None:
    """How many cores one batch may use; None: what torch finds."""
    if threads is not None:
        torch.set_num_threads(threads)
