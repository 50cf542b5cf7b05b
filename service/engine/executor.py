"""Batches on the device: launched, waited for, and every job in them answered."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rednet.service.cost_table import CostTable
from rednet.service.errors import Internal, NumericalOverflow, ServiceError
from rednet.service.types import DeviceLost, EngineEvents, Inference, Job, ModelRunner, RunnerOutput, Running

log = logging.getLogger(__name__)

SMOOTHING = 0.2  # weight of the newest batch in running estimates

# How long before a device has finished a batch it gets the next one: for predictions and wake-ups that come late. What
# arrives after that waits for one batch more; a device that waits for the host loses as much for everybody.
LEAD_S, LEAD_SHARE = 0.001, 0.1
LOOK_SHARE = 0.25  # of the time of a batch, after which the engine looks whether it is over already
LARGEST_SLOWDOWN = 10.0  # more in one batch is an accident, not a rule


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch on the device."""

    jobs: Sequence[Job]
    running: Running
    launched: float


class Executor:
    """Runs batches on one device, at most one at a time but for the moment in which the next one is launched.

    Args:
        events: told of every batch that has run.
        answer: called with each job and what came of it.
        shrink: called with the largest batch size that may still fit, after memory has ended.
    """

    def __init__(
        self,
        events: EngineEvents,
        answer: Callable[[Job, Inference | ServiceError], None],
        shrink: Callable[[int], None],
    ) -> None:
        self.costs = CostTable()  # set when warm-up has ended
        self.slowdown = 1.0  # running estimate of how much longer than that batches take
        self._events, self._answer, self._shrink = events, answer, shrink
        self._launch_s = 0.0  # running estimate of what it takes to launch a batch while another one runs
        self._flight: Flight | None = None  # what the device works on
        self._landed = time.monotonic()  # when it had finished the one before

    def predicted_s(self, images: int) -> float:
        """The time of a batch of so many images."""
        return self.costs.batch_s(images) * self.slowdown

    def due(self) -> float:
        """When the device wants its next batch: until then the one in the queue can grow."""
        if self._flight is None or self._flight.running.done():
            return 0.0
        predicted_s = self.predicted_s(len(self._flight.jobs))
        lead_s = self._launch_s + max(LEAD_S, LEAD_SHARE * predicted_s)
        return self._began(self._flight) + predicted_s - lead_s

    def look_at(self) -> float | None:
        """When to look at the batch that is running, which may be over sooner than predicted; None: none is."""
        if self._flight is None:
            return None
        look_s = max(LEAD_S, LOOK_SHARE * self.costs.batch_s(len(self._flight.jobs)))
        return min(self.due(), time.monotonic() + look_s)

    def run(self, runner: ModelRunner, batch: Sequence[Job]) -> None:
        """Launch a batch, if it is not empty, and finish the one before it."""
        launched = self._launch(runner, batch) if batch else None
        self.finish(runner)
        self._flight = launched

    def finish(self, runner: ModelRunner) -> None:
        """Wait for what the device works on, if it does."""
        flight, self._flight = self._flight, None
        if flight:
            self._land(runner, flight)

    def _began(self, flight: Flight) -> float:
        """When the device came to a batch: it runs one after the other."""
        return max(flight.launched, self._landed)

    def _launch(self, runner: ModelRunner, batch: Sequence[Job]) -> Flight | None:
        """Give a batch to the device; None if that is over already."""
        launched = time.monotonic()
        try:
            specs = {index: job.explain for index, job in enumerate(batch) if job.explain is not None}
            running = runner.launch([job.pixels for job in batch], specs)
            over = running.done()
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  (whatever it is, it is logged, and its neighbours go on)
            self.finish(runner)  # first come, first answered
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
        except Exception as error:  # noqa: BLE001  (as above)
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
            self._shrink(half)
        for part in (batch[:half], batch[half:]):
            if flight := self._launch(runner, part):
                self._land(runner, flight)


def _check(output: RunnerOutput, jobs: Sequence[Job]) -> None:
    if not len(output.logits) == len(output.features) == len(jobs):
        raise RuntimeError(f"this is a bug: {len(output.logits)} answers for {len(jobs)} images")
    if output.grids.keys() != {index for index, job in enumerate(jobs) if job.explain is not None}:
        raise RuntimeError("this is a bug: maps for other images than those that asked for one")
