"""The engine: one thread that owns the batcher and the device. Other threads send it messages.

An asynchronous device (a GPU) is given its next batch shortly before it has finished the current one, so that it never
waits for the host. A synchronous one (a CPU) has always finished.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable

from rednet.service.cost_table import CostTable
from rednet.service.engine.batcher import Batcher
from rednet.service.engine.executor import Executor
from rednet.service.engine.inbox import Inbox, Message, QueueInbox
from rednet.service.engine.watchdog import Watchdog
from rednet.service.errors import Cancelled, DeadlineExceeded, DeviceFailed, Draining, ServiceError
from rednet.service.types import EngineEvents, ExplainSpec, Inference, Job, ModelRunner, Pixels, State

log = logging.getLogger(__name__)

WARM_UP_FACTOR = 10.0  # a warm-up batch may take that many times `hung_s`: it compiles kernels and grows memory pools
HUNG_S = 30.0


class Engine:
    """Runs batches of images through the network.

    A job is queued in the batcher, then in flight on the device, then completed. Its state is starting during warm-up,
    then ready, and failed if the device hangs or the thread raises.

    Args:
        load: creates the runner. Called on the engine's thread, like all methods of the runner.
        batcher: the queue, used only by this engine. Warm-up sets its batch size.
        events: notified of batches and dropped images.
        hung_s: a batch that takes longer than this, and far longer than predicted, counts as hung.
        inbox: where messages arrive; None: from this process only.
    """

    def __init__(
        self,
        load: Callable[[], ModelRunner],
        batcher: Batcher,
        events: EngineEvents,
        hung_s: float = HUNG_S,
        inbox: Inbox | None = None,
    ) -> None:
        self._load = load
        self._batcher = batcher
        self._events = events
        self._inbox = inbox or QueueInbox()
        self._ids = itertools.count()
        self._closing = threading.Lock()  # held to send a message, and to decide that no more messages are read
        self._closed = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._state = State.STARTING
        self._watchdog = Watchdog(self._thread, hung_s)
        self._executor = Executor(events, self._complete, self._limit_batch_size)
        self._in_flight: dict[int, Job] = {}  # jobs in batches that are not completed
        batcher.batch_s = self._executor.predicted_s

    @property
    def state(self) -> State:
        """The engine's state. It is also failed if a batch takes so long that the device must hang.

        Hangs are only detected when this property is read, which the server does ten times a second.
        """
        return State.FAILED if self._watchdog.check() else self._state

    @property
    def costs(self) -> CostTable:
        """The measured times of batches; empty before warm-up has ended."""
        return self._executor.costs

    @property
    def slowdown(self) -> float:
        """Running estimate of the factor by which batches take longer than measured."""
        return self._executor.slowdown

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """Stop the thread after the current batch; queued jobs are answered with `Draining`.

        Does not wait for a warm-up to end, as no job is waiting for it.
        """
        self._send(None)
        if self._thread.ident is not None:  # it has been started
            self._thread.join(0.0 if timeout_s is not None and self._state is State.STARTING else timeout_s)

    def submit(
        self,
        pixels: Pixels,
        deadline: float,
        reply: Callable[[Inference | ServiceError], None],
        explain: ExplainSpec | None = None,
    ) -> int:
        """Queue an image; returns an id for `cancel`. `reply` is called exactly once."""
        job = Job(next(self._ids), pixels, time.monotonic(), deadline, reply, explain)
        if not self._send(job):
            reply(self._why_closed())
        return job.id

    def backlog_s(self, images: int) -> float:
        """Predicted time to run `images` images."""
        return self.costs.queue_s(images) * self.slowdown

    def cancel(self, job_id: int) -> None:
        """Drop an image if its batch has not been cut yet."""
        self._send(job_id)

    def _send(self, message: Message) -> bool:
        with self._closing:
            if not self._closed:
                self._inbox.put(message)
            return not self._closed

    def _run(self) -> None:
        try:
            runner = self._load()
            del self._load  # it may hold the network, which is then freed when the thread ends
            self._executor.costs = runner.warm_up(lambda expected_s: self._watchdog.begin(expected_s, WARM_UP_FACTOR))
            self._watchdog.end()
            self._batcher.max_batch_size = self.costs.max_batch_size
            self._state = State.READY
            log.info("ready")
            while not self._stopping:
                self._step(runner)
            self._executor.finish(runner)
        except BaseException:
            self._state = State.FAILED
            log.exception("the engine failed")
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
        if now < self._executor.next_due():
            return
        self._watchdog.begin(self.costs.batch_s(self.costs.max_batch_size))
        batch = self._batcher.next_batch(now)
        self._in_flight.update((job.id, job) for job in batch)
        self._executor.run(runner, batch)
        self._watchdog.end()

    def _receive(self) -> None:
        """Handle all messages. Wait for one, or until there is other work to do."""
        wake_at = self._batcher.wake_at()
        if (poll_at := self._executor.poll_at()) is not None:
            wake_at = poll_at
        for message in self._inbox.get(None if wake_at is None else max(0.0, wake_at - time.monotonic())):
            self._handle(message)

    def _handle(self, message: Message) -> None:
        match message:
            case Job():
                self._batcher.add(message)
            case int():
                if job := self._batcher.cancel(message):
                    self._events.dropped("queue", 1)
                    job.reply(Cancelled())
            case None:
                self._stopping = True

    def _complete(self, job: Job, outcome: Inference | ServiceError) -> None:
        del self._in_flight[job.id]
        job.reply(outcome)

    def _limit_batch_size(self, max_batch_size: int) -> None:
        self._batcher.max_batch_size = min(self._batcher.max_batch_size, max_batch_size)

    def _close(self) -> None:
        """Accept no more jobs, and answer all that were accepted."""
        with self._closing:
            self._closed = True
        while messages := self._inbox.get(0.0):
            for message in messages:
                self._handle(message)
        for job in (*self._in_flight.values(), *self._batcher.clear()):
            job.reply(self._why_closed())
        self._inbox.close()

    def _why_closed(self) -> ServiceError:
        return DeviceFailed() if self.state is State.FAILED else Draining()
