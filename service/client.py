"""The engine as asyncio sees it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from service.engine import Engine
from service.errors import Draining, Internal, NotReady, Overloaded, PayloadTooLarge, ServiceError
from service.types import Inference, Pixels, State

STARTING_RETRY_S = 2.0
DRAINING_RETRY_S = 5.0


class LocalClient:
    """An `EngineClient` for an engine in a thread of this process. Used from one event loop.

    Args:
        engine: started by `start`, stopped by `close`.
        max_queue: how many images may be accepted and unanswered at once.
        shutdown_s: how long `close` waits for the batch that is running.
    """

    def __init__(self, engine: Engine, max_queue: int, shutdown_s: float = 5.0) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._shutdown_s = shutdown_s
        self._draining = False
        self._admitted = 0

    def start(self) -> None:
        self._engine.start()

    @property
    def state(self) -> State:
        if self._draining and self._engine.state is not State.FAILED:
            return State.DRAINING
        return self._engine.state

    @property
    def queue_depth(self) -> int:
        return self._admitted

    @property
    def backlog_s(self) -> float:
        return self._admitted * self._engine.seconds_per_image

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        self._refuse_unless_ready()
        if images > self._max_queue:
            raise PayloadTooLarge(f"{images} images in one request; at most {self._max_queue} fit into the queue")
        if self._admitted + max(1, images) > self._max_queue:
            raise Overloaded(f"{self._admitted} images are waiting; try again later", max(1.0, self.backlog_s))
        self._admitted += images
        try:
            yield
        finally:
            self._admitted -= images

    async def infer(self, pixels: Pixels, deadline: float) -> Inference:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Inference] = loop.create_future()

        def reply(outcome: Inference | ServiceError) -> None:
            with suppress(RuntimeError):  # the loop is closed: the process ends and nobody waits for this answer
                loop.call_soon_threadsafe(_settle, future, outcome)

        job_id = self._engine.submit(pixels, deadline, reply)
        try:
            return await future
        except asyncio.CancelledError:
            self._engine.cancel(job_id)
            raise

    def begin_drain(self) -> None:
        self._draining = True

    async def close(self) -> None:
        self.begin_drain()
        await asyncio.to_thread(self._engine.stop, self._shutdown_s)

    def _refuse_unless_ready(self) -> None:
        match self.state:
            case State.STARTING:
                raise NotReady("the model is being loaded", STARTING_RETRY_S)
            case State.DRAINING:
                raise Draining("the server is stopping", DRAINING_RETRY_S)
            case State.FAILED:
                raise Internal


def _settle(future: "asyncio.Future[Inference]", outcome: Inference | ServiceError) -> None:
    if future.done():  # cancelled in the meantime
        return
    if isinstance(outcome, ServiceError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
