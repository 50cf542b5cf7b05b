"""A pool of worker processes of one kind, and the queue of jobs in front of it."""

import asyncio
import contextvars
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rednet.service.decoding.failures import exceeded_cpu_limit, is_external
from rednet.service.decoding.fair_queue import FairQueue
from rednet.service.decoding.jobs import DecodeJob
from rednet.service.decoding.limits import Cost
from rednet.service.decoding.worker import SLOTS
from rednet.service.decoding.worker_handle import WorkerHandle
from rednet.service.errors import DecoderUnavailable, ServiceError

if TYPE_CHECKING:
    from rednet.service.decoding.decoder import Decoder

log = logging.getLogger(__name__)

STEAL_AFTER_S = 0.05  # a job that waits this long behind another one is given to the next free worker as well
MAX_FAILED_STARTS = 3  # in a row, before the pool counts as down
MIN_RESTART_DELAY_S, MAX_RESTART_DELAY_S = 0.05, 5.0  # after a worker that has answered no job


class Pool:
    """Up to `size` worker processes behind a fair queue.

    Workers that exit are replaced: at once if they have answered a job, otherwise after a delay, which doubles with
    every worker in a row that does not even start.

    Args:
        decoder: what it reports to.
        command: starts a worker.
        side: of the decoded pixels, [3, side, side].
        size: number of workers.
        memory_bytes: bounds the expected memory of all images that are decoded at the same time. An image that needs
            more is decoded alone.
        prefetch: give a worker its next job while it works on one.
    """

    def __init__(
        self,
        decoder: "Decoder",
        command: Sequence[str],
        side: int,
        size: int,
        memory_bytes: int = 0,
        prefetch: bool = True,
    ) -> None:
        self._decoder, self.command, self._side = decoder, [*command], side
        self._size, self._memory_bytes, self._prefetch = size, memory_bytes, prefetch
        self._keep_idle = False  # run all workers, even without jobs
        self._workers: set[WorkerHandle] = set()
        self._idle: list[WorkerHandle] = []
        self._queue: FairQueue[DecodeJob] = FairQueue()
        self._reserved_bytes = 0
        self._failed_starts = 0  # in a row
        self._restart_timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def available(self) -> bool:
        """Whether at least one worker is ready."""
        return any(worker.is_ready for worker in self._workers)

    @property
    def is_down(self) -> bool:
        """Whether no worker is ready and starting one has failed repeatedly."""
        return self._failed_starts >= MAX_FAILED_STARTS and not self.available

    async def start(self, timeout_s: float) -> None:
        """Start all workers and keep them running; returns when they are ready, or the pool is down."""
        self.start_all()
        try:
            async with asyncio.timeout(timeout_s):
                while not (self.is_down or (self._workers and all(worker.is_ready for worker in self._workers))):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            log.error("the decoder processes did not start within %.0f s", timeout_s)

    def start_all(self) -> None:
        if not self._keep_idle:
            self._keep_idle = True
            self._start_missing()

    def submit(self, job: DecodeJob, first: bool = False) -> None:
        """Queue a job, ahead of all others if `first`."""
        job.pool = self
        if self._idle and self._fits_memory(job):
            self._assign(self._idle.pop(), job)
        elif self.is_down:
            job.fail(DecoderUnavailable())
        else:
            self._queue.put(job, first)
            self._start_missing()

    def cancel(self, job: DecodeJob, kill_above_s: float) -> None:
        """Drop a job. If a worker is on it, and it is expected to take longer than `kill_above_s`, kill the worker."""
        self._queue.discard(job)
        if job.cost_s > kill_above_s:
            for worker in self._workers:
                if worker.jobs and worker.jobs[0] is job:
                    self._kill(worker)
                    break

    def wait_s(self, job: DecodeJob) -> float:
        """Expected time until a worker would take the job, in seconds."""
        return (self._queue.wait_s(job) - job.cost_s) / self._size

    def close(self, error: ServiceError) -> Sequence[WorkerHandle]:
        """Kill the workers and fail all jobs with the error; returns the workers, whose processes are about to exit."""
        self._closed = True
        if self._restart_timer:
            self._restart_timer.cancel()
        self._fail_queued(error)
        workers = [*self._workers]
        for worker in workers:
            for job in worker.kill():
                job.fail(error.with_message(error.message))
        return workers

    def on_decoded(self, job: DecodeJob, took_s: float) -> None:
        self._decoder.on_decoded(self, job, took_s)

    def on_too_costly(self, job: DecodeJob, cost: Cost) -> None:
        if job.pool is self:  # otherwise a second worker that had the job has reported it before
            self._decoder.on_too_costly(job, cost)

    def on_ready(self, worker: WorkerHandle) -> None:
        """Give a worker its next job, and if many are queued the one after that."""
        if worker.reserved_bytes:
            self._release_memory(worker)
        if not worker.has_answered:
            self._failed_starts = 0
            self._changed.set()
        if not worker.jobs:
            job = self._steal(STEAL_AFTER_S) or self._next_queued() or self._steal(0.0)
            if job is None:
                self._idle.append(worker)
                return
            self._assign(worker, job)
        has_room = self._prefetch and len(worker.jobs) < SLOTS and len(self._queue) > self._size
        if has_room and (job := self._next_queued()):
            worker.submit(job)

    def on_stall(self, worker: WorkerHandle) -> None:
        log.error("a decoder process made no progress and was killed")
        self._kill(worker)

    def on_closing(self, worker: WorkerHandle) -> None:
        if worker in self._idle:
            self._idle.remove(worker)

    def on_exit(self, worker: WorkerHandle, status: int | OSError) -> None:
        self._workers.discard(worker)
        self._changed.set()
        if self._closed:
            return
        if not worker.was_ready and (isinstance(status, OSError) or not is_external(status)):
            self._failed_starts += 1
        if isinstance(status, OSError):
            log.error("a decoder process could not be started: %s", status)
        else:
            log.error("a decoder process exited with status %d", status)
            jobs = [*worker.jobs]
            if jobs and exceeded_cpu_limit(status) and self._prefetch and not jobs[0].result.done():
                self._decoder.on_too_costly(jobs.pop(0), None)
                self._retry(jobs)
            else:
                self._retry(jobs, jobs[0].history.on_exit(status) if jobs else None)
        self._release_memory(worker)
        self._start_missing(delayed=not worker.has_answered)
        if self.is_down:
            if self._failed_starts == MAX_FAILED_STARTS:
                log.error("no decoder process can be started: images get 503 until one can")
            self._fail_queued(DecoderUnavailable())

    def _kill(self, worker: WorkerHandle) -> None:
        """Kill a worker, and queue its unfinished jobs again."""
        jobs = worker.kill()
        self._retry(jobs, jobs[0].history.on_kill() if jobs else None)

    def _retry(self, jobs: Sequence[DecodeJob], error: ServiceError | None = None) -> None:
        """Queue the unfinished jobs of a dead worker again, ahead of all others, or fail the first one with the error:
        it is the one that the worker died over."""
        if error:
            jobs[0].fail(error)
        for job in reversed(jobs):
            if job.pool is self and not job.result.done():
                self.submit(job, first=True)

    def _assign(self, worker: WorkerHandle, job: DecodeJob) -> None:
        if job.memory_bytes:
            worker.reserved_bytes = job.memory_bytes
            self._reserved_bytes += job.memory_bytes
        worker.submit(job)

    def _release_memory(self, worker: WorkerHandle) -> None:
        """Release the memory reserved for a worker's job, and assign jobs that were waiting for it."""
        self._reserved_bytes -= worker.reserved_bytes
        worker.reserved_bytes = 0
        while self._idle and (job := self._next_queued()):
            self._assign(self._idle.pop(), job)

    def _fits_memory(self, job: DecodeJob) -> bool:
        total_bytes = self._reserved_bytes + job.memory_bytes
        return not job.memory_bytes or not self._reserved_bytes or total_bytes <= self._memory_bytes

    def _next_queued(self) -> DecodeJob | None:
        while (job := self._queue.peek()) and self._fits_memory(job):
            self._queue.pop()
            if not self._decoder.reassign(self, job):
                return job
        return None

    def _steal(self, longer_than_s: float) -> DecodeJob | None:
        """A job prefetched by a worker that has been on another one for longer than that. Both workers may then decode
        the image; the first answer counts."""
        stuck_since = asyncio.get_running_loop().time() - longer_than_s
        for worker in self._workers:
            if worker.prefetched and worker.job_since <= stuck_since:
                job, worker.prefetched = worker.prefetched, None
                if not job.result.done():
                    return job
        return None

    def _fail_queued(self, error: ServiceError) -> None:
        while job := self._queue.pop():
            job.fail(error.with_message(error.message))

    def _start_missing(self, delayed: bool = False) -> None:
        if self._closed or self._restart_timer or len(self._workers) >= self._size:
            return
        if delayed:
            delay_s = min(MAX_RESTART_DELAY_S, MIN_RESTART_DELAY_S * 2 ** min(self._failed_starts, 10))
            context = contextvars.Context()
            self._restart_timer = asyncio.get_running_loop().call_later(delay_s, self._restart, context=context)
            return
        wanted = len(self._queue) + sum(1 for worker in self._workers if worker.jobs)
        while len(self._workers) < (self._size if self._keep_idle else min(self._size, wanted)):
            self._workers.add(WorkerHandle(self, self.command, self._side))

    def _restart(self) -> None:
        self._restart_timer = None
        self._start_missing()
