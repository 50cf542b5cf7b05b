"""One thread that owns the batcher and the device: schedule, launch, answer. Others hand it messages.

A device that computes by itself (a GPU) is given the next batch shortly before it has finished one, so that it never
waits for the host; one that computes in the call (a CPU) has always finished.
"""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.batcher import Batcher
from service.cost import CostTable
from service.errors import DeadlineExceeded, Draining, Internal, NumericalOverflow, ServiceError
from service.types import (
    DeviceLost,
    EngineEvents,
    Inference,
    Job,
    ModelRunner,
    Pixels,
    RunnerOutput,
    Running,
    State,
    Wish,
)

log = logging.getLogger(__name__)

SMOOTHING = 0.2  # weight of the newest batch in running estimates

# How long before a device has finished a batch it gets the next one: for predictions and wake-ups that come late. What
# arrives after that waits for one batch more; a device that waits for the host loses as much for everybody.
LEAD_S, LEAD_SHARE = 0.001, 0.1
LOOK_SHARE = 0.25  # of the time of a batch, after which the engine looks whether it is over already
LARGEST_SLOWDOWN = 10.0  # more in one batch is an accident, not a rule


HUNG_FACTOR = 20  # a batch that takes so many times what it should will not end: the process is better started anew


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch on the device."""

    jobs: Sequence[Job]
    running: Running
    launched: float


class Engine:
    """Runs batches of images through the network.

    Args:
        load: makes the runner; called, like everything of the runner's, on the engine's thread.
        batcher: the queue; nobody else may touch it. Warm-up decides how large its batches are.
        events: told what happens.
        hung_s: a batch that takes longer, and far longer than it should, is taken for one that never ends.
    """

    def __init__(
        self, load: Callable[[], ModelRunner], batcher: Batcher, events: EngineEvents, hung_s: float = 30.0
    ) -> None:
        self._load = load
        self._hung_s = hung_s
        self._batcher = batcher
        self._events = events
        self._inbox: queue.SimpleQueue[Job | int | None] = queue.SimpleQueue()  # a job, an id to cancel, None: stop
        self._ids = itertools.count()
        self._closing = threading.Lock()  # held while a message is sent, and while the engine decides to read no more
        self._closed = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._state = State.STARTING
        self._at_work_since: float | None = None  # on one batch; None: it waits for work, or warms up
        self.costs = CostTable()  # filled when warm-up has ended
        self.slowdown = 1.0  # running estimate of how much longer than that batches take
        self._launch_s = 0.0  # running estimate of what it takes to launch a batch while another one runs
        self._flight: Flight | None = None  # what the device works on
        self._cut: dict[int, Job] = {}  # jobs of batches, until they are answered
        self._landed = time.monotonic()  # when it had finished the one before

    @property
    def state(self) -> State:
        """Where it is in its life; failed also when a batch takes so long that the device must hang."""
        since = self._at_work_since
        longest_s = max(self._hung_s, HUNG_FACTOR * self.costs.batch_s(self.costs.max_batch_size))
        if since is not None and time.monotonic() - since > longest_s:
            return State.FAILED
        return self._state

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
        wish: Wish | None = None,
    ) -> int:
        """Queue an image; `reply` is called exactly once, unless it is cancelled. Returns the id to cancel it by."""
        job = Job(next(self._ids), pixels, time.monotonic(), deadline, reply, wish)
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
            self.costs = runner.warm_up()
            self._batcher.max_batch_size = self.costs.max_batch_size
            self._state = State.READY
            log.info("ready")
            while not self._stopping:
                self._step(runner)
            self._finish(runner)
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
        if now < self._due():
            return
        self._at_work_since = now
        batch = self._batcher.next_batch(now)
        self._cut.update((job.id, job) for job in batch)
        launched = self._launch(runner, batch) if batch else None
        self._finish(runner)
        self._flight = launched
        self._at_work_since = None

    def _finish(self, runner: ModelRunner) -> None:
        """Wait for what the device works on, if it does."""
        flight, self._flight = self._flight, None
        if flight:
            self._land(runner, flight)

    def _due(self) -> float:
        """When the device wants its next batch: until then the one in the queue can grow."""
        if self._flight is None or self._flight.running.done():
            return 0.0
        predicted_s = self.costs.batch_s(len(self._flight.jobs)) * self.slowdown
        lead_s = self._launch_s + max(LEAD_S, LEAD_SHARE * predicted_s)
        return self._began(self._flight) + predicted_s - lead_s

    def _began(self, flight: Flight) -> float:
        """When the device came to a batch: it runs one after the other."""
        return max(flight.launched, self._landed)

    def _receive(self) -> None:
        """Take in all messages; where there is nothing to do, wait for one, or until there is."""
        wake_at = self._batcher.wake_at()
        if self._flight:  # which may be over sooner than predicted
            look_s = max(LEAD_S, LOOK_SHARE * self.costs.batch_s(len(self._flight.jobs)))
            wake_at = min(self._due(), time.monotonic() + look_s)
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

    def _launch(self, runner: ModelRunner, batch: Sequence[Job]) -> Flight | None:
        """Give a batch to the device; None if that is over already."""
        launched = time.monotonic()
        try:
            wishes = {index: job.wish for index, job in enumerate(batch) if job.wish is not None}
            running = runner.launch([job.pixels for job in batch], wishes)
            over = running.done()
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  (whatever it is, it is logged, and its neighbours go on)
            self._finish(runner)  # first come, first answered
            self._halve(runner, batch, error)
            return None
        flight = Flight(batch, running, launched)
        if over:
            self._land(runner, flight)
            return None
        self._launch_s += (time.monotonic() - launched - self._launch_s) * SMOOTHING
        return flight

    def _land(self, runner: ModelRunner, flight: Flight) -> None:
        """Wait for a batch and answer every job in it."""
        jobs = flight.jobs
        try:
            output = flight.running.wait()
            _check(output, jobs)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  (likewise)
            self._halve(runner, jobs, error)
            return
        landed = time.monotonic()
        began = self._began(flight)
        inference_s = landed - began
        queue_s = [began - job.enqueued for job in jobs]
        for index, job in enumerate(jobs):
            if not output.finite(index):
                log.warning("the network's answer for one image is not finite")
                self._answer(job, NumericalOverflow())
                continue
            logits, features, grid = output.logits[index], output.features[index], output.grids.get(index)
            self._answer(job, Inference(logits, features, queue_s[index], inference_s, len(jobs), grid))
        ratio = min(LARGEST_SLOWDOWN, inference_s / max(self.costs.batch_s(len(jobs)), 1e-6))
        self.slowdown += (ratio - self.slowdown) * SMOOTHING
        starved_s = max(0.0, began - max(self._landed, min(job.enqueued for job in jobs)))
        self._landed = landed
        self._events.batch_done(queue_s, inference_s, starved_s)

    def _halve(self, runner: ModelRunner, batch: Sequence[Job], error: Exception) -> None:
        """Run the halves of a batch that failed, one after the other, until what fails is alone."""
        if len(batch) == 1:
            log.error("the network failed on one image", exc_info=error)
            self._answer(batch[0], Internal())
            return
        log.warning("a batch of %d failed; running its halves", len(batch), exc_info=error)
        half = len(batch) // 2
        if isinstance(error, MemoryError):  # it would fail every time
            self._batcher.max_batch_size = min(self._batcher.max_batch_size, half)
        for part in (batch[:half], batch[half:]):
            if flight := self._launch(runner, part):
                self._land(runner, flight)

    def _answer(self, job: Job, outcome: Inference | ServiceError) -> None:
        del self._cut[job.id]
        job.reply(outcome)

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
        return Internal() if self.state is State.FAILED else Draining()


def _check(output: RunnerOutput, jobs: Sequence[Job]) -> None:
    if not len(output.logits) == len(output.features) == len(jobs):
        raise RuntimeError(f"this is a bug: {len(output.logits)} answers for {len(jobs)} images")
    if output.grids.keys() != {index for index, job in enumerate(jobs) if job.wish is not None}:
        raise RuntimeError("this is a bug: maps for other images than those that wished for one")
