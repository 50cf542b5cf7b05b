"""Runs a prepared network on a device. Requests pass through torch only here and in `transfer.py`."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rednet.model.inference.backend import Output
from rednet.model.inference.cam import class_activation
from rednet.model.inference.cuda.batch_buckets import bucket_size
from rednet.model.inference.preparation import Prepared
from rednet.service.cost_table import CostTable, measure
from rednet.service.engine.transfer import CudaTransfer, HostTransfer, translated_errors
from rednet.service.types import ClassActivation, ExplainSpec, KernelSums, Pixels, Running

LAST_STAGE = (3,)
NO_SPECS: Mapping[int, ExplainSpec] = {}
MEASURE_S = 0.1  # time spent on measuring each batch size; a batch that takes longer runs once


class PreparedRunner:
    """A `ModelRunner` that passes NumPy arrays through a prepared network.

    Args:
        prepared: the network.
        max_batch_size: of all batches.
        auto: let warm-up find the best batch size up to that; otherwise batches may be that large.
    """

    def __init__(self, prepared: Prepared, max_batch_size: int, auto: bool = False) -> None:
        self._prepared, self._max_batch_size, self._auto = prepared, max_batch_size, auto
        # One image per core: cores that share an image wait for each other whenever one of them is interrupted, for
        # example to decode an image. Warm-up does not see that.
        self._min_auto = torch.get_num_threads() if prepared.device.type == "cpu" else 1
        self._transfer = CudaTransfer(prepared.device) if prepared.device.type == "cuda" else HostTransfer()

    def warm_up(self, begin: Callable[[float], None]) -> CostTable:
        """Run batches of increasing sizes, which loads kernels and grows memory pools, and measure them."""
        image_s = self._prepared.check_s  # an upper bound: the self-check ran several images
        side = self._prepared.preprocess.crop
        noise = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)

        warm = 0  # the largest size for which explained batches are warm

        def warm_up_explained(size: int) -> None:
            """Run explained batches, which have no CUDA graph, of every bucket up to `size`.

            cuDNN plans convolutions for each batch size and thread, which can take seconds.
            """
            nonlocal warm
            for images in range(warm + 1, size + 1):
                if bucket_size(images) == images or images == size:
                    self.launch([noise] * images, {0: ClassActivation()}).wait()
            warm = size

        def batch_s(size: int) -> float:
            nonlocal image_s
            begin(MEASURE_S + 4 * size * image_s)  # the buckets up to a size have less than twice as many images more
            if self._prepared.device.type == "cuda":
                warm_up_explained(size)
            times = [self._time([noise] * size)]
            while sum(times) < MEASURE_S:
                times.append(self._time([noise] * size))
            image_s = times[0] / size  # of the first run, as the next size may be slow at first, too
            return min(times)

        batch_s(1)  # pays for one-time initialisation
        return measure(batch_s, self._max_batch_size, self._auto, self._min_auto)

    def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec] = NO_SPECS) -> Running:
        assert len({image.dtype for image in pixels}) == 1, "this is a bug: a batch must have one dtype"
        with translated_errors():
            maps = LAST_STAGE if any(isinstance(spec, ClassActivation) for spec in specs.values()) else ()
            summed = sorted({spec.stage for spec in specs.values() if isinstance(spec, KernelSums)})
            uploaded = self._transfer.upload(pixels)
            output = self._prepared(uploaded, stages=maps, kernel_sums=summed)
            sums = dict(zip(summed, output.kernel_sums or (), strict=True))
            grids = {index: self._grid(output, sums, index, spec) for index, spec in specs.items()}
            return self._transfer.download(uploaded, output, grids)

    def _grid(self, output: Output, sums: Mapping[int, Tensor], index: int, explain: ExplainSpec) -> Tensor:
        """The map [h, w] requested for an image of the batch, on the device.

        Args:
            sums: sums of kernels, by stage.
        """
        match explain:
            case ClassActivation(class_index):
                assert output.stages is not None
                head = self._prepared.head
                best = output.logits[index].argmax(keepdim=True)  # a scalar index would make the host wait
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
    """The driver's name of a CUDA device. Unlike the device's index, it is the same in all processes."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def device_memory(device: str) -> tuple[int, int]:
    """Bytes of a CUDA device that this process holds, and that are free."""
    return torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[0]


def release_device_memory() -> None:
    """Give the memory of CUDA devices that torch keeps for reuse back to the driver."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def set_threads(threads: int) -> None:
    """Set the number of cores that one batch may use on the CPU."""
    torch.set_num_threads(threads)
