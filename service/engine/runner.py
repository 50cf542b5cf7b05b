"""The device. The only module on a request's way that knows torch."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rednet.model.inference.backend import Output
from rednet.model.inference.cam import class_activation
from rednet.model.inference.preparation import Prepared
from rednet.service.cost_table import CostTable, measure
from rednet.service.engine.transfer import Direct, Overlapped, named_errors
from rednet.service.types import ClassActivation, ExplainSpec, KernelSums, Pixels, Running

LAST_STAGE = (3,)
NO_SPECS: Mapping[int, ExplainSpec] = {}
MEASURED_S = 0.1  # runs of one batch size go on for so long; a batch that takes longer by itself runs once


class PreparedRunner:
    """A prepared network behind arrays.

    Args:
        prepared: the network in its inference form.
        largest: no batch will be larger.
        auto: let warm-up find the best size up to that; otherwise batches may be that large.
    """

    def __init__(self, prepared: Prepared, largest: int, auto: bool = False) -> None:
        self._prepared, self._largest, self._auto = prepared, largest, auto
        # An image for each core: cores that share one wait for each other whenever the system takes one of them away,
        # for a photo to be decoded, say, which warm-up does not see.
        self._least = torch.get_num_threads() if prepared.device.type == "cpu" else 1
        self._transfer = Overlapped(prepared.device) if prepared.device.type == "cuda" else Direct()

    def warm_up(self, begin: Callable[[float], None]) -> CostTable:
        """Run batches of rising sizes, which loads kernels and grows memory pools to what will be needed."""
        image_s = self._prepared.check_s  # an upper bound: the self-check ran several images
        side = self._prepared.preprocess.crop
        noise = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)

        def batch_s(size: int) -> float:
            nonlocal image_s
            begin(MEASURED_S + 2 * size * image_s)
            if self._prepared.device.type == "cuda":  # what is asked for with a map runs in a way of its own
                self.launch([noise] * size, {0: ClassActivation()}).wait()
            times = [self._time([noise] * size)]
            while sum(times) < MEASURED_S:
                times.append(self._time([noise] * size))
            image_s = times[0] / size  # the first one: a slow machine is not faster next time
            return min(times)

        batch_s(1)  # what is slow only once
        return measure(batch_s, self._largest, self._auto, self._least)

    def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec] = NO_SPECS) -> Running:
        assert len({image.dtype for image in pixels}) == 1, "this is a bug: a batch must have one dtype"
        with named_errors():
            maps = LAST_STAGE if any(isinstance(spec, ClassActivation) for spec in specs.values()) else ()
            summed = sorted({spec.stage for spec in specs.values() if isinstance(spec, KernelSums)})
            output = self._prepared(self._transfer.upload(pixels), stages=maps, kernel_sums=summed)
            sums = dict(zip(summed, output.kernel_sums or (), strict=True))
            grids = {index: self._grid(output, sums, index, spec) for index, spec in specs.items()}
            return self._transfer.download(output, grids)

    def _grid(self, output: Output, sums: Mapping[int, Tensor], index: int, explain: ExplainSpec) -> Tensor:
        """The map [h, w] that an image of the batch asked for, on the device.

        Args:
            sums: of kernels, by stage.
        """
        match explain:
            case ClassActivation(class_index):
                assert output.stages is not None
                head = self._prepared.head
                best = output.logits[index].argmax(keepdim=True)  # with a dimension: without one, the host would wait
                weights = head[best][0] if class_index is None else head[class_index]
                return class_activation(output.stages[0][index], weights)
            case KernelSums(stage, group):
                every = sums[stage][index]  # [G, h, w]
                return every.mean(dim=0) if group is None else every[group].clone()

    def _time(self, pixels: Sequence[Pixels]) -> float:
        started = time.monotonic()
        self.launch(pixels).wait()
        return time.monotonic() - started


def driver_name(device: torch.device) -> str:
    """What the driver calls a CUDA device: other than its number, that is the same for whoever asks."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def set_threads(threads: int) -> None:
    """How many cores one batch may use on the CPU."""
    torch.set_num_threads(threads)
