"""One thread that owns the batcher and the device: schedule, launch, answer. Others hand it messages.

A device that computes by itself (a GPU) is given the next batch shortly before it has finished one, so that it never
waits for the host; one that computes in the call (a CPU) has always finished.
"""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable

from rednet.service.cost_table import CostTable
from rednet.service.engine.batcher import Batcher
from rednet.service.engine.executor import Executor
from rednet.service.engine.watchdog import HangWatch
from rednet.service.errors import DeadlineExceeded, DeviceFailed, Draining, ServiceError
from rednet.service.types import EngineEvents, ExplainSpec, Inference, Job, ModelRunner, Pixels, State

log = logging.getLogger(__name__)

# A first batch of a new size compiles kernels and grows memory pools: it may take that many times `hung_s` at least.
WARM_UP_PATIENCE = 10.0
HUNG_S = 30.0


class Engine:
    """Runs batches of images through the network.

    Args:
        load: makes the runner; called, like everything of the runner's, on the engine's thread.
        batcher: the queue; nobody else may touch it. Warm-up decides how large its batches are.
        events: told what happens.
        hung_s: a batch that takes longer, and far longer than it should, is taken for one that never ends.
    """

    def __init__(
        self, load: Callable[[], ModelRunner], batcher: Batcher, events: EngineEvents, hung_s: float = HUNG_S
    ) -> None:
        self._load = load
        self._batcher = batcher
        self._events = events
        self._inbox: queue.SimpleQueue[Job | int | None] = queue.SimpleQueue()  # a job, an id to cancel, None: stop
        self._ids = itertools.count()
        self._closing = threading.Lock()  # held while a message is sent, and while the engine decides to read no more
        self._closed = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._state = State.STARTING
        self._watch = HangWatch(self._thread, hung_s)
        self._executor = Executor(events, self._answer, self._shrink)
        self._cut: dict[int, Job] = {}  # jobs of batches, until they are answered
        batcher.batch_s = self._executor.predicted_s

    @property
    def state(self) -> State:
        """Where it is in its life; failed also when a batch takes so long that the device must hang.

        Whether it does is found by those who ask: a server does so ten times a second.
        """
        return State.FAILED if self._watch.look() else self._state

    @property
    def costs(self) -> CostTable:
        """The measured time of batches; empty before warm-up has ended."""
        return self._executor.costs

    @property
    def slowdown(self) -> float:
        """Running estimate of how much longer than that batches take."""
        return self._executor.slowdown

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """End the thread after the batch that is running; what is still queued is answered with `Draining`.

        Nothing waits for a warm-up: it has no answer for anybody.
        """
        self._send(None)
        self._thread.join(0.0 if timeout_s is not None and self._state is State.STARTING else timeout_s)

    def submit(
        self,
        pixels: Pixels,
        deadline: float,
        reply: Callable[[Inference | ServiceError], None],
        explain: ExplainSpec | None = None,
    ) -> int:
        """Queue an image; `reply` is called exactly once, unless it is cancelled. Returns the id to cancel it by."""
        job = Job(next(self._ids), pixels, time.monotonic(), deadline, reply, explain)
        if not self._send(job):
            reply(self._why_closed())
        return job.id

    def backlog_s(self, images: int) -> float:
        """Predicted time for so many images."""
        return self.costs.queue_s(images) * self.slowdown

    def cancel(self, job_id: int) -> None:
        """Drop an image, if its batch has not been cut; nobody waits for its answer any more."""
        self._send(job_id)

    def _send(self, message: Job | int | None) -> bool:
        with self._closing:
            if not self._closed:
                self._inbox.put(message)
            return not self._closed

    def _run(self) -> None:
        try:
            runner = self._load()
            self._executor.costs = runner.warm_up(lambda expected_s: self._watch.begin(expected_s, WARM_UP_PATIENCE))
            self._watch.end()
            self._batcher.max_batch_size = self.costs.max_batch_size
            self._state = State.READY
            log.info("ready")
            while not self._stopping:
                self._step(runner)
            self._executor.finish(runner)
        except BaseException:
            self._state = State.FAILED
            log.exception("the engine has failed")
        finally:
            self._close()

    def _step(self, runner: ModelRunner) -> None:
        self._receive()
        if self._stopping:
            return
        late = self._batcher.expire(time.monotonic())
        for job in late:
            job.reply(DeadlineExceeded("the deadline passed while the image waited in the queue"))
        if late:
            self._events.dropped("queue", len(late))
        now = time.monotonic()
        if now < self._executor.due():
            return
        self._watch.begin(self.costs.batch_s(self.costs.max_batch_size))
        batch = self._batcher.next_batch(now)
        self._cut.update((job.id, job) for job in batch)
        self._executor.run(runner, batch)
        self._watch.end()

    def _receive(self) -> None:
        """Take in all messages; where there is nothing to do, wait for one, or until there is."""
        wake_at = self._batcher.wake_at()
        if (look_at := self._executor.look_at()) is not None:
            wake_at = look_at
        try:
            self._handle(self._inbox.get(timeout=None if wake_at is None else max(0.0, wake_at - time.monotonic())))
            while True:
                self._handle(self._inbox.get_nowait())
        except queue.Empty:
            pass

    def _handle(self, message: Job | int | None) -> None:
        match message:
            case Job():
                self._batcher.add(message)
            case int():
                if self._batcher.cancel(message):
                    self._events.dropped("queue", 1)
            case None:
                self._stopping = True

    def _answer(self, job: Job, outcome: Inference | ServiceError) -> None:
        del self._cut[job.id]
        job.reply(outcome)

    def _shrink(self, largest: int) -> None:
        self._batcher.max_batch_size = min(self._batcher.max_batch_size, largest)

    def _close(self) -> None:
        """From here on nothing is accepted; nothing that was accepted stays unanswered."""
        with self._closing:
            self._closed = True
        while True:
            try:
                self._handle(self._inbox.get_nowait())
            except queue.Empty:
                break
        for job in (*self._cut.values(), *self._batcher.clear()):
            job.reply(self._why_closed())

    def _why_closed(self) -> ServiceError:
        return DeviceFailed() if self.state is State.FAILED else Draining()
