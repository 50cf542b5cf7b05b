"""A decode job: one image on its way through the pools of worker processes."""

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rednet.service.decoding.failures import FailureHistory
from rednet.service.decoding.fair_queue import Flow
from rednet.service.errors import ServiceError
from rednet.service.types import Floats, Pixels

if TYPE_CHECKING:
    from rednet.service.decoding.pool import Pool

DEFAULT_COST_S = 0.002  # assumed while an image's header has not been read


@dataclass(slots=True, eq=False)
class DecodeJob:
    """One image to decode, or to draw a map over.

    Attributes:
        data: the encoded image.
        grid: the map [h, w] to draw over the image; None: the image is decoded.
        result: the pixels or a PNG, and the time that the work took, in seconds.
        flow: of the request that the image belongs to.
        cost_s: expected decode time.
        memory_bytes: expected peak memory, for large images; 0: not counted.
        ticket: set by the queue that the job is in.
        set_aside: the job waits for one of the slow pools.
        pool: the pool that the job is in.
        history: the workers that have died over the image.
    """

    data: bytes | memoryview
    grid: Floats | None
    result: asyncio.Future[tuple[Pixels | bytes, float]]
    flow: Flow
    cost_s: float = DEFAULT_COST_S
    memory_bytes: int = 0
    ticket: int = 0
    set_aside: bool = False
    pool: "Pool | None" = None
    history: FailureHistory = field(default_factory=FailureHistory)

    def fail(self, error: ServiceError) -> None:
        if not self.result.done():
            self.result.set_exception(error)
