"""The inference backend for CUDA: fused Triton operators, replayed from CUDA graphs.

A graph launches a network's hundred kernels at once, in a fraction of the time of launching them one by one. Launches
are the bottleneck of small batches.
"""

import threading
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.backend import Output, Stages
from rednet.model.inference.cuda.batch_buckets import BatchBuckets, Program, bucket_size
from rednet.model.inference.cuda.network import TritonRedNet
from rednet.model.inference.self_check import SelfCheck
from rednet.model.inference.tf32 import ieee_float32
from rednet.model.nn.rednet import RedNet

OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")  # messages of the driver and of cuBLAS; torch has no class for them
_capturing = threading.Lock()  # one process can capture only one graph at a time


class CudaBackend:
    """A copy of a network on a CUDA device. Not thread-safe.

    Args:
        net: a RedNet for RGB.
        preprocess: the normalisation of pixels; uint8 pixels of its crop's size are run from graphs.
        device: a CUDA device.
        dtype: dtype of weights and activations.
        check: compares the program for each batch size with the network when it is made.
        graphs: False: launch every kernel separately, where graphs cannot be captured.
        fuse_generation: generate involution kernels inside the involution.
    """

    def __init__(
        self,
        net: RedNet,
        preprocess: Preprocess,
        device: torch.device,
        dtype: torch.dtype,
        check: SelfCheck,
        graphs: bool = True,
        fuse_generation: bool = False,
    ) -> None:
        self._device, self._side, self._check, self._graphs = device, preprocess.crop, check, graphs
        self._precision = ieee_float32 if dtype == torch.float32 else nullcontext
        self._network = TritonRedNet(net, preprocess, device, dtype, fuse_generation)
        self._pool = torch.cuda.graph_pool_handle()  # shared by all graphs, which never run at the same time
        self._stream = torch.cuda.Stream(device)  # for capturing; torch's default is on the first device
        self._buckets = BatchBuckets(self._capture)
        involution = "Triton involution that generates its kernels" if fuse_generation else "Triton involution"
        self.name = f"CUDA graphs, {involution}" if graphs else f"{involution}, without CUDA graphs"

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, stages: Stages = (), kernel_sums: Stages = ()) -> Output:
        with torch.cuda.device(self._device):
            square = pixels.shape[2:] == (self._side, self._side)
            has_graph = self._graphs and pixels.dtype == torch.uint8 and square
            if has_graph and len(pixels) and not (stages or kernel_sums):
                logits, features = self._buckets(pixels)
                return Output(logits, features)
            return self._run_eagerly(pixels, stages, kernel_sums)

    def _run_eagerly(self, pixels: Tensor, stages: Stages, kernel_sums: Stages) -> Output:
        """Run without a graph, padded to a bucket's size, for which cuDNN already has its plans."""
        images = len(pixels)
        missing = bucket_size(images) - images if images else 0
        with self._precision():
            padded = F.pad(pixels.to(self._device, non_blocking=True), (0, 0, 0, 0, 0, 0, 0, missing))
            logits, features, maps, sums = self._network(padded)
            return Output(
                logits[:images],
                features[:images],
                tuple(maps[stage][:images].float() for stage in sorted(stages)) if stages else None,
                tuple(sums(stage)[:images].float() for stage in sorted(kernel_sums)) if kernel_sums else None,
            )

    def _capture(self, size: int) -> Program:
        """Capture a graph for `size` images and return the program that replays it.

        Raises:
            MemoryError: there is not enough memory.
            DeviationError: the output of a row is wrong, from the graph or without it.
            RuntimeError: the device cannot capture or run it.
        """
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        try:
            inputs = torch.zeros(size, 3, self._side, self._side, dtype=torch.uint8, device=self._device)

            def run_once(pixels: Tensor) -> tuple[Tensor, Tensor]:  # compiles kernels and chooses algorithms
                inputs.copy_(pixels)
                return self._run_on_capture_stream(inputs)

            with self._precision():
                self._check.run(run_once, size)  # explained batches run like this, and cuDNN plans are the graph's
                capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
                with _capturing, torch.cuda.stream(current), capture:  # restores `current` also if the capture fails
                    logits, features, *_ = self._network(inputs)

            def replay(pixels: Tensor) -> tuple[Tensor, Tensor]:
                images = len(pixels)
                inputs[:images].copy_(pixels, non_blocking=True)
                graph.replay()
                return logits[:images].clone(), features[:images].clone()  # the next replay overwrites the originals

            self._check.run(replay, size)
        except RuntimeError as error:
            if _is_out_of_memory(error):
                raise MemoryError(f"no memory for batches of {size} on {self._device}") from error
            raise
        return replay

    def _run_on_capture_stream(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Run once on the capture stream, so that libraries are initialised there."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            logits, features, *_ = self._network(inputs)
        current.wait_stream(self._stream)
        return logits, features


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether lack of memory caused the error, directly or through another one (a capture that ended early)."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
