"""The inference form for CUDA: Triton kernels, and batches of the usual size replayed from graphs.

A graph launches the hundred kernels of a network at once, which alone takes a fraction of the time of launching them
one by one: small batches are bound by that.
"""

import threading
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from model.exact import exact_float32
from model.form import Output, Stages
from model.fused import Fused
from model.ladder import Ladder, Program, rung
from model.preprocess import Preprocess
from model.rednet import RedNet

NO_MEMORY = ("out of memory", "ALLOC_FAILED")  # of the driver and of cuBLAS, whose errors torch has no class for
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
        self._arithmetic = exact_float32 if dtype == torch.float32 else nullcontext
        self._network = Fused(net, preprocess, device, dtype)
        self._memory = torch.cuda.graph_pool_handle()  # shared: graphs run one after the other
        self._stream = torch.cuda.Stream(device)  # for capturing; torch's own would be the first device's
        self._ladder = Ladder(self._captured)
        self.backend = "CUDA graphs, Triton involution"

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, stages: Stages = (), kernel_sums: Stages = ()) -> Output:
        with torch.cuda.device(self._device):
            usual = pixels.dtype == torch.uint8 and pixels.shape[2:] == (self._side, self._side)
            if usual and len(pixels) and not (stages or kernel_sums):
                logits, features = self._ladder(pixels)
                return Output(logits, features)
            return self._at_once(pixels, stages, kernel_sums)

    def _at_once(self, pixels: Tensor, stages: Stages, kernel_sums: Stages) -> Output:
        """Without a graph, in a batch size of the ladder: for those, cuDNN has its plans already."""
        images = len(pixels)
        missing = rung(images) - images if images else 0
        with self._arithmetic():
            padded = F.pad(pixels.to(self._device, non_blocking=True), (0, 0, 0, 0, 0, 0, 0, missing))
            logits, features, maps, sums = self._network(padded)
            return Output(
                logits[:images],
                features[:images],
                tuple(maps[stage][:images].float() for stage in sorted(stages)) if stages else None,
                tuple(sums(stage)[:images].float() for stage in sorted(kernel_sums)) if kernel_sums else None,
            )

    def _captured(self, size: int) -> Program:
        """A program that replays the network's graph for `size` images."""
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream()
        try:
            inputs = torch.zeros(size, 3, self._side, self._side, dtype=torch.uint8, device=self._device)
            with self._arithmetic():
                self._run_aside(inputs)  # what happens only once: compiling, choosing algorithms
                capture = torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local")
                with _capturing, torch.cuda.stream(here), capture:  # `here` again, also if the end of a capture fails
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
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
