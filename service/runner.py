"""The device. The only module on a request's way that knows torch."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from model.prepare import Prepared
from service.cost import CostTable, measure
from service.types import Pixels, RunnerOutput

SLOW_S = 0.2  # a batch that takes longer is measured once, after one run to warm up; others three times


class TorchRunner:
    """A prepared network behind arrays.

    Args:
        prepared: the network in its inference form.
        max_batch_size: the largest batch it will be given; None: the one found best in warming up.
    """

    def __init__(self, prepared: Prepared, max_batch_size: int | None) -> None:
        self._prepared = prepared
        self._max_batch_size = max_batch_size

    def warm_up(self) -> CostTable:
        """Run batches of rising sizes, which loads kernels and grows memory pools to what will be needed."""
        side = self._prepared.preprocess.crop
        noise = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)

        def batch_s(size: int) -> float:
            best_s = self._time([noise] * size)
            for _ in range(1 if best_s > SLOW_S else 3):
                best_s = min(best_s, self._time([noise] * size))
            return best_s

        return measure(batch_s, self._max_batch_size)

    def run(self, pixels: Sequence[Pixels]) -> RunnerOutput:
        output = self._prepared(torch.from_numpy(np.stack(pixels)))
        return RunnerOutput(output.logits.cpu().numpy(), output.features.cpu().numpy())

    def _time(self, pixels: Sequence[Pixels]) -> float:
        started = time.monotonic()
        self.run(pixels)
        return time.monotonic() - started


def set_threads(threads: int) -> None:
    """How many cores one batch may use on the CPU."""
    torch.set_num_threads(threads)
