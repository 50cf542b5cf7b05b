"""The engine as asyncio sees it."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from service.cost import CostTable
from service.engine import Engine
from service.errors import Draining, Internal, NotReady, Overloaded, ServiceError
from service.types import Inference, Pixels, State

STARTING_RETRY_S = 2.0
LAST_BATCH_S = 1.0  # how long closing waits for the batch that is running, whose callers have been told already


class LocalClient:
    """An `EngineClient` for an engine in a thread of this process. Used from one event loop.

    Args:
        engine: started by `start`, stopped by `close`.
        max_queue: how many images may be accepted and unanswered at once.
    """

    def __init__(self, engine: Engine, max_queue: int) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._draining = False
        self._admitted = 0
        self._waiting: set[asyncio.Future[Inference]] = set()

    def start(self) -> None:
        self._engine.start()

    @property
    def state(self) -> State:
        if self._draining and self._engine.state is not State.FAILED:
            return State.DRAINING
        return self._engine.state

    @property
    def max_images(self) -> int:
        return self._max_queue

    @property
    def queue_depth(self) -> int:
        return self._admitted

    @property
    def backlog_s(self) -> float:
        return self.costs.queue_s(self._admitted) * self._engine.slowdown

    @property
    def costs(self) -> CostTable:
        return self._engine.costs

    @contextmanager
    def admit(self) -> Iterator[Callable[[int], None]]:
        self._refuse_unless_ready()
        held = 0

        def hold(images: int) -> None:
            nonlocal held
            if self._admitted - held + images > self._max_queue:
                raise Overloaded(f"{self._admitted} images are waiting; try again later", max(1.0, self.backlog_s))
            self._admitted += images - held
            held = images

        hold(1)
        try:
            yield hold
        finally:
            self._admitted -= held

    async def infer(self, pixels: Pixels, deadline: float) -> Inference:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Inference] = loop.create_future()
        self._waiting.add(future)

        def reply(outcome: Inference | ServiceError) -> None:
            with suppress(RuntimeError):  # the loop is closed: the process ends and nobody waits for this answer
                loop.call_soon_threadsafe(_settle, future, outcome)

        job_id = self._engine.submit(pixels, deadline, reply)
        try:
            return await future
        except asyncio.CancelledError:
            self._engine.cancel(job_id)
            raise
        finally:
            self._waiting.discard(future)

    def begin_drain(self) -> None:
        self._draining = True

    async def close(self) -> None:
        self.begin_drain()
        for future in self._waiting:  # not left to the engine, which may hang
            _settle(future, Draining())
        await asyncio.to_thread(self._engine.stop, LAST_BATCH_S)

    def _refuse_unless_ready(self) -> None:
        match self.state:
            case State.STARTING:
                raise NotReady("the model is being loaded", STARTING_RETRY_S)
            case State.DRAINING:
                raise Draining
            case State.FAILED:
                raise Internal


def _settle(future: "asyncio.Future[Inference]", outcome: Inference | ServiceError) -> None:
    if future.done():  # cancelled, or told that the server is stopping
        return
    if isinstance(outcome, ServiceError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
