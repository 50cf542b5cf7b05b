"""One thread that owns the batcher and the device: schedule, run, answer. Others hand it messages."""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from service.batcher import Batcher
from service.cost import CostTable
from service.errors import DeadlineExceeded, Draining, Internal, ServiceError
from service.types import EngineEvents, Inference, Job, ModelRunner, Pixels, RunnerOutput, State

log = logging.getLogger(__name__)

SMOOTHING = 0.2  # weight of the newest batch in the running estimate of the slowdown


class Engine:
    """Runs batches of images through the network.

    Args:
        load: makes the runner; called, like everything of the runner's, on the engine's thread.
        batcher: the queue; nobody else may touch it. Warm-up decides how large its batches are.
        events: told what happens.
    """

    def __init__(self, load: Callable[[], ModelRunner], batcher: Batcher, events: EngineEvents) -> None:
        self._load = load
        self._batcher = batcher
        self._events = events
        self._inbox: queue.SimpleQueue[Job | int | None] = queue.SimpleQueue()  # a job, an id to cancel, None: stop
        self._ids = itertools.count()
        self._closing = threading.Lock()  # held while a message is sent, and while the engine decides to read no more
        self._closed = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.state = State.STARTING
        self.costs = CostTable()  # filled when warm-up has ended
        self.slowdown = 1.0  # running estimate of how much longer than that batches take

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """End the thread after the batch that is running; what is still queued is answered with `Draining`."""
        self._send(None)
        self._thread.join(timeout_s)

    def submit(self, pixels: Pixels, deadline: float, reply: Callable[[Inference | ServiceError], None]) -> int:
        """Queue an image; `reply` is called exactly once, unless it is cancelled. Returns the id to cancel it by."""
        job = Job(next(self._ids), pixels, time.monotonic(), deadline, reply)
        if not self._send(job):
            reply(self._why_closed())
        return job.id

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
            self.state = State.READY
            log.info("ready")
            while not self._stopping:
                self._step(runner)
        except BaseException:
            self.state = State.FAILED
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
        if batch := self._batcher.next_batch(time.monotonic()):
            self._execute(runner, batch)

    def _receive(self) -> None:
        """Take in all messages; where there is nothing to do, wait for one, or until the batcher has something."""
        wake_at = self._batcher.wake_at()
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

    def _execute(self, runner: ModelRunner, batch: list[Job]) -> None:
        """Run a batch and answer every job in it. A batch that fails is halved, until what fails is alone."""
        started = time.monotonic()
        try:
            output = runner.run([job.pixels for job in batch])
            _check(output, len(batch))
        except Exception:
            if len(batch) == 1:
                log.exception("the network failed on one image")
                batch[0].reply(Internal())
            else:
                log.warning("a batch of %d failed; running its halves", len(batch), exc_info=True)
                self._execute(runner, batch[: len(batch) // 2])
                self._execute(runner, batch[len(batch) // 2 :])
            return
        inference_s = time.monotonic() - started
        queue_s = [started - job.enqueued for job in batch]
        for index, job in enumerate(batch):
            logits, features = output.logits[index], output.features[index]
            job.reply(Inference(logits, features, queue_s[index], inference_s, len(batch)))
        self.slowdown += (inference_s / max(self.costs.batch_s(len(batch)), 1e-6) - self.slowdown) * SMOOTHING
        self._events.batch_done(batch, queue_s, inference_s)

    def _close(self) -> None:
        """From here on nothing is accepted; nothing that was accepted stays unanswered."""
        with self._closing:
            self._closed = True
        while True:
            try:
                self._handle(self._inbox.get_nowait())
            except queue.Empty:
                break
        for job in self._batcher.clear():
            job.reply(self._why_closed())

    def _why_closed(self) -> ServiceError:
        return Internal() if self.state is State.FAILED else Draining()


def _check(output: RunnerOutput, images: int) -> None:
    if not len(output.logits) == len(output.features) == images:
        raise RuntimeError(f"this is a bug: {len(output.logits)} answers for {images} images")
    if not np.isfinite(output.logits).all():
        raise RuntimeError("the network's logits are not finite")
