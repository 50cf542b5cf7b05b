"""The values that travel through the server, and the seams along the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from rednet.service.cost_table import CostTable
from rednet.service.errors import ServiceError

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8] | Floats  # [3, H, W], RGB; float32: normalised already
# An image as it arrives: an encoded photo, or normalised and checked pixels [3, side, side]; or why it cannot be read.
Upload = bytes | memoryview | Floats | ServiceError


class ClassActivation(NamedTuple):
    """Asks what each position adds to the logit of a class."""

    class_index: int | None = None  # None: of the class that is predicted


class KernelSums(NamedTuple):
    """Asks for the sum of each position's kernel, of the last involution of a stage."""

    stage: int  # counted from 0
    group: int | None = None  # of channels that share a kernel; None: the mean of all groups


ExplainSpec = ClassActivation | KernelSums  # which map to compute for an image, in the same forward pass


class RunnerOutput(NamedTuple):
    """One forward pass over B images."""

    logits: Floats  # [B, num_classes]
    features: Floats  # [B, feature_channels]
    grids: Mapping[int, Floats] = {}  # [h, w] each, by position in the batch, of images that asked for one

    def finite(self, index: int) -> bool:
        """Whether everything that was computed for this image is a finite number.

        Images of a batch do not mix: values that overflow for one of them leave the rows of the others as they are.
        """
        rows = [self.logits[index], self.features[index]]
        if index in self.grids:
            rows.append(self.grids[index])
        return all(bool(np.isfinite(row).all()) for row in rows)


@dataclass(frozen=True, slots=True)
class Inference:
    """The network's answer for one image, and what it took."""

    logits: Floats  # [num_classes]
    features: Floats  # [feature_channels]
    queue_s: float
    inference_s: float
    batch_size: int
    grid: Floats | None = None  # [h, w], if one was asked for


@dataclass(frozen=True, slots=True)
class Job:
    """One image on its way to the device. Times are those of the engine's clock, in seconds."""

    id: int
    pixels: Pixels
    enqueued: float
    deadline: float
    reply: Callable[[Inference | ServiceError], None]  # called once, unless the job is cancelled; must not raise
    explain: ExplainSpec | None = None


class State(StrEnum):
    """Where a server is in its life; only `ready` takes work."""

    STARTING = "starting"
    READY = "ready"
    NO_DECODER = "decoder_unavailable"
    DRAINING = "draining"
    FAILED = "failed"


class DeviceLost(Exception):
    """The device answers nothing any more; only a new process can have it back."""


class Running(Protocol):
    """A batch that was given to the device."""

    def done(self) -> bool:
        """Whether `wait` returns at once."""

    def wait(self) -> RunnerOutput:
        """The answers; may raise what `ModelRunner.launch` may."""


class ModelRunner(Protocol):
    """The device. Used from one thread only."""

    def warm_up(self, begin: Callable[[float], None]) -> CostTable:
        """Do everything that makes a first call slower than later ones, and measure what batches cost.

        Args:
            begin: called before each step with the seconds that it should take, going by those before it.
        """

    def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
        """Begin one forward pass over images of one size and dtype, behind those that were launched before.

        Args:
            pixels: of each image.
            specs: by position in the batch, of those who have one. A batch without costs nothing more.

        Raises:
            MemoryError: there is no memory for so many.
            DeviceLost: nothing will run any more.
        """


class EngineEvents(Protocol):
    """What the engine tells those who watch it. Called on the engine's thread; must be quick and must not raise."""

    def batch_done(self, queue_s: Sequence[float], inference_s: float, starved_s: float) -> None:
        """A batch has run: how long each of its images waited for that, how long it kept the device busy, and how long
        the device had nothing to do before although one of its images was there."""

    def dropped(self, stage: Literal["queue"], count: int) -> None: ...


class Permit(Protocol):
    """The share of the queue that an admitted request holds. It is given back when the context ends."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def hold(self, images: int) -> None:
        """Hold a slot for each of the request's images; raises `Overloaded` if they do not fit."""

    def release(self, images: int) -> None:
        """Give back the slots of so many images: they are answered."""

    def set_aside(self, change: int) -> None:
        """Change by how many images wait for slow decoding, during which they hold no slots."""


class EngineClient(Protocol):
    """The engine, or several, as the routes see it, wherever it runs."""

    def start(self) -> None:
        """Load and warm up; until that has ended, requests are refused."""

    @property
    def state(self) -> State: ...

    @property
    def queue_depth(self) -> int:
        """Images accepted and not yet answered."""

    @property
    def requests(self) -> int:
        """Requests admitted and not yet answered, also those whose images are still on their way."""

    @property
    def backlog_s(self) -> float:
        """Predicted time to answer all of them."""

    @property
    def offered_s(self) -> float:
        """Predicted device time of all images so far, refused ones included, in seconds."""

    @property
    def costs(self) -> CostTable:
        """The measured time of batches; empty before warm-up has ended."""

    @property
    def max_images(self) -> int:
        """How many images one request may hold: for more there would never be room."""

    def admit(self, deadline: float) -> Permit:
        """Admit a request before its body is read. An admitted request is answered even if a drain begins.

        Args:
            deadline: of the request, by `time.monotonic()`.

        Raises:
            Refused: the queue is full, the answer would come too late, or the server takes no work.
        """

    async def infer(self, pixels: Pixels, deadline: float, explain: ExplainSpec | None = None) -> Inference:
        """Run the network on one image. Cancelling takes the image out of the queue.

        Args:
            pixels: the image.
            deadline: by `time.monotonic()`; no device time is spent on the image after it.
            explain: the map to compute with it.

        Raises:
            DeadlineExceeded, DeviceFailed, Draining, Internal, NumericalOverflow: there is no answer.
        """

    def begin_drain(self) -> None:
        """Take no more work; what was accepted is still answered."""

    async def close(self) -> None:
        """Stop, and fail what is still waiting. May be called again."""
