"""Queues jobs and cuts them into batches. Pure state: no clock, no threads, no tensors; time is an argument."""

from collections.abc import Callable  # noqa: TC003  (types are imported plainly throughout)

from rednet.service.cost_table import SAFETY_FACTOR
from rednet.service.types import Job

RESPONSE_S = 0.01  # to wake up and send the response


class Batcher:
    """Queues jobs and cuts batches. Jobs with the earliest deadline come first; of those, the oldest.

    Args:
        max_batch_size: may be changed at any time.
        max_wait_s: how long a batch that is not full may wait for more jobs, counted from its oldest job. 0: a batch is
            cut whenever the device can take one, and grows only while the device is busy. A batch never waits so long
            that a job in it would miss its deadline.
    """

    def __init__(self, max_batch_size: int, max_wait_s: float = 0.0) -> None:
        if max_batch_size < 1 or max_wait_s < 0:
            raise ValueError(
                f"max_batch_size must be at least 1 and max_wait_s at least 0: {max_batch_size}, {max_wait_s}"
            )
        self.max_batch_size = max_batch_size
        self.batch_s: Callable[[int], float] = lambda _: 0.0  # predicted time of a batch; may be changed at any time
        self._max_wait_s = max_wait_s
        self._jobs: dict[int, Job] = {}  # by id, oldest first

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job) -> None:
        """Append a job; its id must be new."""
        assert job.id not in self._jobs, "this is a bug: a job was added twice"
        self._jobs[job.id] = job

    def cancel(self, job_id: int) -> Job | None:
        """Remove and return a job; None if it is not queued any more."""
        return self._jobs.pop(job_id, None)

    def expire(self, now: float) -> list[Job]:
        """Remove and return all jobs whose deadline has passed."""
        late = [job for job in self._jobs.values() if job.deadline <= now]
        for job in late:
            del self._jobs[job.id]
        return late

    def next_batch(self, now: float) -> list[Job]:
        """Remove and return the batch to run now; empty if none is due. Does not check deadlines: call `expire` first.

        All pixels of a batch have the dtype of the most urgent job: uint8 pixels in a batch with float32 pixels would
        be converted to float32, which takes longer.
        """
        if not self._jobs or now < self._due():
            return []
        jobs = sorted(self._jobs.values(), key=lambda job: job.deadline)
        dtype = jobs[0].pixels.dtype
        batch = [job for job in jobs if job.pixels.dtype == dtype][: self.max_batch_size]
        for job in batch:
            del self._jobs[job.id]
        return batch

    def clear(self) -> list[Job]:
        """Remove and return all jobs."""
        jobs, self._jobs = list(self._jobs.values()), {}
        return jobs

    def wake_at(self) -> float | None:
        """The time at which `expire` or `next_batch` has work to do even if no job arrives; None: never."""
        if not self._jobs:
            return None
        return min(self._due(), *(job.deadline for job in self._jobs.values()))

    def _due(self) -> float:
        """The time at which the next batch may be cut."""
        oldest = next(iter(self._jobs.values())).enqueued
        if self._max_wait_s == 0 or len(self._jobs) >= self.max_batch_size:
            return oldest
        urgent = min(job.deadline for job in self._jobs.values())
        return min(oldest + self._max_wait_s, urgent - SAFETY_FACTOR * self.batch_s(len(self._jobs)) - RESPONSE_S)
