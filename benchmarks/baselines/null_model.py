"""The null model behind this project's server."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.baselines.shared import MAX_BATCH, checkpoint, null_network
from rednet import prepare
from rednet.service.cost_table import CostTable
from rednet.service.engine.transfer import Finished
from rednet.service.model_description import describe
from rednet.service.network import Network
from rednet.service.settings import Settings
from rednet.service.types import ExplainSpec, Pixels, RunnerOutput, Running


class NullRunner:
    """A `ModelRunner` for `null_network`.

    Args:
        max_batch_size: of all batches.
        feature_channels: length of a feature vector; all of them are zero.
    """

    def __init__(self, max_batch_size: int, feature_channels: int) -> None:
        self._features = np.zeros((max_batch_size, feature_channels), np.float32)

    def warm_up(self, begin: Callable[[float], None]) -> CostTable:
        return CostTable({1: 1e-5, MAX_BATCH: 8e-5}, len(self._features))

    def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
        return Finished(RunnerOutput(null_network(pixels), self._features[: len(pixels)]))


def load_null_network(settings: Settings) -> Network:
    """The null model in place of the embedded network, whose labels it has."""
    served = checkpoint()
    size = MAX_BATCH if settings.max_batch_size == "auto" else settings.max_batch_size
    description = describe(served, [prepare(served.net, served.preprocess)])
    return Network(description, served.preprocess, {"null": lambda: NullRunner(size, description.feature_channels)})
