"""The engines of this process behind asyncio."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from rednet.service.cost_table import CostTable, together_s
from rednet.service.engine.admission import Admission, AdmittingClient
from rednet.service.engine.engine import Engine
from rednet.service.errors import DeviceFailed, Draining, NotReady, ServiceError
from rednet.service.types import ExplainSpec, Inference, Permit, Pixels, QueueCounts, State

STARTING_RETRY_S = 2.0
LAST_BATCH_S = 1.0  # how long closing waits for the running batch, whose requests have already failed


class LocalClient(AdmittingClient):
    """An `EngineClient` for engines in threads of this process, one for each device. Used from one event loop.

    Args:
        engines: at least one; started by `start`, stopped by `close`. An image goes to the engine that is expected to
            answer it first.
        max_queue: the most images that may be accepted and unanswered.
        counts: of the server; None: this is its only client.
    """

    def __init__(self, engines: Sequence[Engine], max_queue: int, counts: QueueCounts | None = None) -> None:
        self._engines = engines
        self._admission = Admission(max_queue, self._work_s, counts=counts)
        self._loads: Counter[Engine] = Counter()  # images given to each engine and not yet answered
        self._draining = False
        self._closed = False
        self._waiting: set[asyncio.Future[Inference]] = set()

    def start(self) -> None:
        for engine in self._engines:
            engine.start()

    @property
    def state(self) -> State:
        states = {engine.state for engine in self._engines}
        if State.FAILED in states:
            return State.FAILED
        if self._draining:
            return State.DRAINING
        return State.STARTING if State.STARTING in states else State.READY

    @property
    def costs(self) -> CostTable:
        return self._engines[0].costs

    def admit(self, deadline: float) -> Permit:
        self._refuse_unless_ready()
        return self._admission.admit(deadline)

    async def infer(self, pixels: Pixels, deadline: float, explain: ExplainSpec | None = None) -> Inference:
        if self._closed:
            raise self._why_closed()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Inference] = loop.create_future()
        self._waiting.add(future)

        def reply(outcome: Inference | ServiceError) -> None:
            with suppress(RuntimeError):  # the loop is closed: the process ends, and nothing waits for this answer
                loop.call_soon_threadsafe(_settle, future, outcome)

        engine = min(self._engines, key=lambda engine: engine.backlog_s(self._loads[engine] + 1))
        self._loads[engine] += 1
        job_id = engine.submit(pixels, deadline, reply, explain)
        try:
            return await future
        except asyncio.CancelledError:
            engine.cancel(job_id)
            raise
        finally:
            self._loads[engine] -= 1
            self._waiting.discard(future)

    def begin_drain(self) -> None:
        self._draining = True

    async def close(self) -> None:
        self.begin_drain()
        self._closed = True
        for future in self._waiting:  # not left to the engine, which may hang
            _settle(future, self._why_closed())
        await asyncio.gather(*(asyncio.to_thread(engine.stop, LAST_BATCH_S) for engine in self._engines))

    def _why_closed(self) -> ServiceError:
        return DeviceFailed() if self.state is State.FAILED else Draining()

    def _work_s(self, images: int) -> float:
        return together_s(images, self._engines)

    def _refuse_unless_ready(self) -> None:
        match self.state:
            case State.STARTING:
                raise NotReady("the model is being loaded", STARTING_RETRY_S)
            case State.DRAINING:
                raise Draining
            case State.FAILED:
                raise DeviceFailed


def _settle(future: "asyncio.Future[Inference]", outcome: Inference | ServiceError) -> None:
    if future.done():  # cancelled, or failed because the server is stopping
        return
    if isinstance(outcome, ServiceError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
