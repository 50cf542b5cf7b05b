"""Runs batches on the device: launches them, waits for the results and completes every job."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rednet.service.cost_table import CostTable
from rednet.service.errors import Internal, NumericalOverflow, ServiceError
from rednet.service.types import DeviceLost, EngineEvents, Inference, Job, ModelRunner, RunnerOutput, Running

log = logging.getLogger(__name__)

SMOOTHING = 0.2  # weight of the newest batch in running estimates

# The device gets its next batch this long before it is expected to finish the current one, as predictions and wake-ups
# may be late. A longer lead makes images that arrive after the launch wait for another batch; with a shorter one the
# device may wait for the host, which delays all images.
MIN_LEAD_S, LEAD_SHARE = 0.001, 0.1
POLL_SHARE = 0.25  # of a batch's time, after which the engine checks whether the batch has already finished
MAX_SLOWDOWN = 10.0  # of one batch in the running estimate; more is an outlier


@dataclass(frozen=True, slots=True)
class InFlightBatch:
    """A batch on the device."""

    jobs: Sequence[Job]
    running: Running
    launched: float


class Executor:
    """Runs batches on one device, one at a time except that the next one is launched before the current one ends.

    Args:
        events: notified of every batch that has run.
        complete: called with each job and its outcome.
        limit_batch_size: called with a new limit after the device has run out of memory.
    """

    def __init__(
        self,
        events: EngineEvents,
        complete: Callable[[Job, Inference | ServiceError], None],
        limit_batch_size: Callable[[int], None],
    ) -> None:
        self.costs = CostTable()  # set after warm-up
        self.slowdown = 1.0  # running estimate of the factor by which batches take longer than measured
        self._events, self._complete_job, self._limit_batch_size = events, complete, limit_batch_size
        self._launch_s = 0.0  # running estimate of the time to launch a batch while another one runs
        self._in_flight: InFlightBatch | None = None
        self._last_completed = time.monotonic()  # end of the batch before

    def predicted_s(self, images: int) -> float:
        """The predicted time of a batch."""
        return self.costs.batch_s(images) * self.slowdown

    def next_due(self) -> float:
        """The time at which the device needs its next batch. Until then the batch in the queue can grow."""
        if self._in_flight is None or self._in_flight.running.done():
            return 0.0
        predicted_s = self.predicted_s(len(self._in_flight.jobs))
        lead_s = self._launch_s + max(MIN_LEAD_S, LEAD_SHARE * predicted_s)
        return self._started(self._in_flight) + predicted_s - lead_s

    def poll_at(self) -> float | None:
        """The time to check whether the batch in flight has finished, perhaps earlier than predicted; None: no batch is
        in flight."""
        if self._in_flight is None:
            return None
        poll_s = max(MIN_LEAD_S, POLL_SHARE * self.costs.batch_s(len(self._in_flight.jobs)))
        return min(self.next_due(), time.monotonic() + poll_s)

    def run(self, runner: ModelRunner, batch: Sequence[Job]) -> None:
        """Launch a batch, unless it is empty, and finish the one before it."""
        launched = self._launch(runner, batch) if batch else None
        self.finish(runner)
        self._in_flight = launched

    def finish(self, runner: ModelRunner) -> None:
        """Wait for the batch in flight, if any."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight:
            self._complete(runner, in_flight)

    def _started(self, batch: InFlightBatch) -> float:
        """When the device began to compute a batch: batches run one after the other."""
        return max(batch.launched, self._last_completed)

    def _launch(self, runner: ModelRunner, batch: Sequence[Job]) -> InFlightBatch | None:
        """Launch a batch; returns None if it has already been completed."""
        launched = time.monotonic()
        try:
            specs = {index: job.explain for index, job in enumerate(batch) if job.explain is not None}
            running = runner.launch([job.pixels for job in batch], specs)
            is_done = running.done()
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  (any error is logged, and other jobs continue)
            self.finish(runner)  # earlier jobs are answered first
            self._bisect_failed_batch(runner, batch, error)
            return None
        in_flight = InFlightBatch(batch, running, launched)
        if is_done:
            self._complete(runner, in_flight)
            return None
        self._launch_s += (time.monotonic() - launched - self._launch_s) * SMOOTHING
        return in_flight

    def _complete(self, runner: ModelRunner, batch: InFlightBatch) -> None:
        """Wait for a batch and complete every job in it."""
        jobs = batch.jobs
        try:
            output = batch.running.wait()
            _check(output, jobs)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  (as above)
            self._bisect_failed_batch(runner, jobs, error)
            return
        completed = time.monotonic()
        started = self._started(batch)
        inference_s = completed - started
        queue_s = [started - job.enqueued for job in jobs]
        for index, (job, finite) in enumerate(zip(jobs, output.finite(), strict=True)):
            if not finite:
                log.warning("the network's output for one image is not finite")
                self._complete_job(job, NumericalOverflow())
                continue
            logits, features, grid = output.logits[index], output.features[index], output.grids.get(index)
            self._complete_job(job, Inference(logits, features, queue_s[index], inference_s, len(jobs), grid))
        ratio = min(MAX_SLOWDOWN, inference_s / max(self.costs.batch_s(len(jobs)), 1e-6))
        self.slowdown += (ratio - self.slowdown) * SMOOTHING
        starved_s = max(0.0, started - max(self._last_completed, min(job.enqueued for job in jobs)))
        self._last_completed = completed
        self._events.batch_done(queue_s, inference_s, starved_s)

    def _bisect_failed_batch(self, runner: ModelRunner, jobs: Sequence[Job], error: Exception) -> None:
        """Run the halves of a failed batch, one after the other, and so on until the image that fails is alone."""
        if len(jobs) == 1:
            log.error("the network failed on one image", exc_info=error)
            self._complete_job(jobs[0], Internal())
            return
        log.warning("a batch of %d failed; running its halves", len(jobs), exc_info=error)
        half = len(jobs) // 2
        if isinstance(error, MemoryError):  # batches of this size would fail every time
            self._limit_batch_size(half)
        for part in (jobs[:half], jobs[half:]):
            if in_flight := self._launch(runner, part):
                self._complete(runner, in_flight)


def _check(output: RunnerOutput, jobs: Sequence[Job]) -> None:
    if not len(output.logits) == len(output.features) == len(jobs):
        raise RuntimeError(f"this is a bug: {len(output.logits)} outputs for {len(jobs)} images")
    if output.grids.keys() != {index for index, job in enumerate(jobs) if job.explain is not None}:
        raise RuntimeError("this is a bug: the output has maps for other images than those that requested one")
