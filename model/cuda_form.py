"""The inference form for CUDA: Triton kernels, and batches of the usual size replayed from graphs.

A graph launches the hundred kernels of a network at once, which alone takes a fraction of the time of launching them
one by one: small batches are bound by that.
"""

import threading
from contextlib import nullcontext

import torch
from torch import Tensor

from model.exact import exact_float32
from model.form import Output, Stages
from model.fused import Fused
from model.ladder import Ladder, Program
from model.preprocess import Preprocess
from model.rednet import RedNet

_capturing = threading.Lock()  # a process captures one graph at a time


class CudaForm:
    """A copy of a network on a CUDA device. Not for two threads at once.

    Args:
        net: a RedNet for RGB.
        preprocess: how pixels are normalised; batches of uint8 pixels of its crop's size are run from graphs.
        device: a CUDA device.
        dtype: of weights and activations.
    """

    def __init__(self, net: RedNet, preprocess: Preprocess, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._side = device, preprocess.crop
        self._exact = dtype == torch.float32
        self._network = Fused(net, preprocess, device, dtype)
        self._memory = torch.cuda.graph_pool_handle()  # shared: graphs run one after the other
        self._stream = torch.cuda.Stream(device)  # for capturing; torch's own would be the first device's
        self._ladder = Ladder(self._captured)
        self.backend = "CUDA graphs, Triton involution"

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, stages: Stages = (), kernel_sums: Stages = ()) -> Output:
        with torch.cuda.device(self._device), exact_float32() if self._exact else nullcontext():
            usual = pixels.dtype == torch.uint8 and pixels.shape[2:] == (self._side, self._side)
            if usual and len(pixels) and not (stages or kernel_sums):
                logits, features = self._ladder(pixels)
                return Output(logits, features)
            logits, features, maps, sums = self._network(pixels.to(self._device, non_blocking=True))
            return Output(
                logits,
                features,
                tuple(maps[stage].float() for stage in sorted(stages)) if stages else None,
                tuple(sums(stage).float() for stage in sorted(kernel_sums)) if kernel_sums else None,
            )

    def _captured(self, size: int) -> Program:
        """A program that replays the network's graph for `size` images."""
        graph = torch.cuda.CUDAGraph()
        try:
            inputs = torch.zeros(size, 3, self._side, self._side, dtype=torch.uint8, device=self._device)
            self._run_aside(inputs)  # what happens only once: compiling, choosing algorithms
            with _capturing, torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local"):
                logits, features, *_ = self._network(inputs)
        except RuntimeError as error:
            if _is_lack_of_memory(error):
                raise MemoryError(f"no memory for batches of {size} on {self._device}") from error
            raise

        def replay(pixels: Tensor) -> tuple[Tensor, Tensor]:
            images = len(pixels)
            inputs[:images].copy_(pixels, non_blocking=True)
            graph.replay()
            return logits[:images].clone(), features[:images].clone()  # the next replay overwrites the originals

        return replay

    def _run_aside(self, inputs: Tensor) -> None:
        """Where the graph will be captured, so that whatever libraries set up there is in place then."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            self._network(inputs)
        here.wait_stream(self._stream)


def _is_lack_of_memory(error: BaseException | None) -> bool:
    """Also where another error came of it, as when a capture ends early."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
