"""The values that parts of the server exchange, and the interfaces between the parts."""

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
    """Requests a class activation map: what each position adds to the logit of a class."""

    class_index: int | None = None  # None: the predicted class


class KernelSums(NamedTuple):
    """Requests a map of kernel sums: the sum of each position's kernel, in the last involution of a stage."""

    stage: int  # from 0
    group: int | None = None  # of channels that share a kernel; None: the mean of all groups


ExplainSpec = ClassActivation | KernelSums  # which map to compute for an image, in the same forward pass


class RunnerOutput(NamedTuple):
    """One forward pass over B images."""

    logits: Floats  # [B, num_classes]
    features: Floats  # [B, feature_channels]
    grids: Mapping[int, Floats] = {}  # [h, w] each, by position in the batch, of images that asked for one

    def finite(self) -> Sequence[bool]:
        """Whether all values computed for each image are finite.

        Images of a batch are independent: an overflow in one of them does not affect the rows of the others.
        """
        logits, features = (np.isfinite(rows).all(axis=1) for rows in (self.logits, self.features))
        finite: list[bool] = np.logical_and(logits, features).tolist()
        for index, grid in self.grids.items():
            finite[index] &= bool(np.isfinite(grid).all())
        return finite


@dataclass(frozen=True, slots=True)
class Inference:
    """The network's output for one image, and the time it took."""

    logits: Floats  # [num_classes]
    features: Floats  # [feature_channels]
    queue_s: float
    inference_s: float
    batch_size: int
    grid: Floats | None = None  # [h, w], if one was asked for


@dataclass(frozen=True, slots=True)
class Job:
    """One image on its way to the device. Times are in seconds, by the engine's clock."""

    id: int
    pixels: Pixels
    enqueued: float
    deadline: float
    reply: Callable[[Inference | ServiceError], None]  # called exactly once; must not raise
    explain: ExplainSpec | None = None


class State(StrEnum):
    """The state of a server. Only `ready` takes requests."""

    STARTING = "starting"
    READY = "ready"
    NO_DECODER = "decoder_unavailable"
    DRAINING = "draining"
    FAILED = "failed"


class DeviceLost(Exception):
    """The device does not respond any more. Only a new process can use it again."""


class Running(Protocol):
    """A batch that was launched on the device."""

    def done(self) -> bool:
        """Whether `wait` returns at once."""

    def wait(self) -> RunnerOutput:
        """Wait for the output. Raises what `ModelRunner.launch` raises."""


class ModelRunner(Protocol):
    """Runs batches on the device. Used from one thread only."""

    def warm_up(self, begin: Callable[[float], None]) -> CostTable:
        """Run whatever makes a first call slower than later ones, and measure batches.

        Args:
            begin: called before each step with its expected time in seconds.
        """

    def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
        """Begin one forward pass over images of one size and dtype, behind those that were launched before.

        Args:
            pixels: of each image.
            specs: the requested maps, by position in the batch. A batch without maps costs nothing more.

        Raises:
            MemoryError: there is not enough memory for this many images.
            DeviceLost: the device has failed.
        """


class EngineEvents(Protocol):
    """Receives events of the engine, on the engine's thread. Methods must be quick, and must not raise."""

    def batch_done(self, queue_s: Sequence[float], inference_s: float, starved_s: float) -> None:
        """A batch has run.

        Args:
            queue_s: the time that each image waited.
            inference_s: the time that the batch kept the device busy.
            starved_s: the time before it that the device was idle although one of its images had arrived.
        """

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


class QueueCounts(Protocol):
    """What all processes that admit requests count together.

    Attributes:
        processes: how many there are.
        accepted: images that this one has accepted and not yet answered.
        offered_s: predicted device time of all images that this one has admitted or refused, in seconds. A request
            that would be late even with an empty queue does not count: more devices would not help it.
    """

    processes: int
    accepted: int
    offered_s: float

    def total_accepted(self) -> int: ...

    def total_offered_s(self) -> float: ...


class EngineClient(Protocol):
    """One engine or several, wherever they run."""

    def start(self) -> None:
        """Load and warm up. Requests are refused until that is done."""

    @property
    def state(self) -> State: ...

    @property
    def queue_depth(self) -> int:
        """Images accepted and not yet answered."""

    @property
    def requests(self) -> int:
        """Requests admitted and not yet answered, including those whose body is still arriving."""

    @property
    def backlog_s(self) -> float:
        """Predicted time to answer all accepted images."""

    @property
    def costs(self) -> CostTable:
        """The measured time of batches; empty before the end of warm-up."""

    @property
    def max_images(self) -> int:
        """The most images that one request may have: the capacity of the queue."""

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
        """Refuse new requests; admitted ones are still answered."""

    async def close(self) -> None:
        """Stop, and fail what is still waiting. May be called again."""
