"""Copies pixels to the device and outputs back to the host."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rednet.model.inference.backend import Output
from rednet.service.types import DeviceLost, Floats, Pixels, RunnerOutput, Running


@contextmanager
def translated_errors() -> Iterator[None]:
    """Translate torch's device errors to those that `ModelRunner` declares."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError("the batch needs more memory than the device has") from error
    except torch.AcceleratorError as error:  # every later call fails, too
        raise DeviceLost(str(error)) from error


@dataclass(frozen=True, slots=True)
class Finished:
    """A batch that has already run when `launch` returns."""

    output: RunnerOutput

    def done(self) -> bool:
        return True

    def wait(self) -> RunnerOutput:
        return self.output


class HostTransfer:
    """For the CPU, where the network computes in the host's memory."""

    def upload(self, pixels: Sequence[Pixels]) -> Tensor:
        return torch.from_numpy(np.stack(pixels))

    def download(self, pixels: Tensor, output: Output, grids: Mapping[int, Tensor]) -> Running:
        return Finished(RunnerOutput(output.logits.numpy(), output.features.numpy(), _arrays(grids)))


@dataclass(frozen=True, slots=True)
class PendingDownload:
    """A batch whose outputs are being copied to the host.

    It holds the pixels, whose memory belongs to the stream of uploads: if it were freed before the computation has read
    it, the next upload could overwrite it.
    """

    pixels: Tensor
    logits: Tensor
    features: Tensor
    grids: Mapping[int, Tensor]
    arrived: torch.cuda.Event

    def done(self) -> bool:
        with translated_errors():
            return bool(self.arrived.query())

    def wait(self) -> RunnerOutput:
        with translated_errors():
            self.arrived.synchronize()
        return RunnerOutput(self.logits.numpy(), self.features.numpy(), _arrays(self.grids))


class CudaTransfer:
    """For a CUDA device: pixels are copied on a stream of their own while the device computes another batch.

    Both directions use pinned memory, which torch caches and reuses after each transfer.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._uploads = torch.cuda.Stream(device)

    def upload(self, pixels: Sequence[Pixels]) -> Tensor:
        one = torch.from_numpy(pixels[0])
        host = torch.empty((len(pixels), *one.shape), dtype=one.dtype, pin_memory=True)
        np.stack(pixels, out=host.numpy())
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._uploads):
            uploaded = host.to(self._device, non_blocking=True)
        computing.wait_stream(self._uploads)
        return uploaded

    def download(self, pixels: Tensor, output: Output, grids: Mapping[int, Tensor]) -> Running:
        logits, features = (each.to("cpu", non_blocking=True) for each in (output.logits, output.features))
        grids = {index: grid.to("cpu", non_blocking=True) for index, grid in grids.items()}
        arrived = torch.cuda.Event(blocking=True)  # who waits sleeps, where it would otherwise keep a core busy
        arrived.record(torch.cuda.current_stream(self._device))
        return PendingDownload(pixels, logits, features, grids, arrived)


def _arrays(grids: Mapping[int, Tensor]) -> dict[int, Floats]:
    return {index: grid.numpy() for index, grid in grids.items()}
