"""The batcher as pure state."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rednet.service.cost_table import SAFETY_FACTOR
from rednet.service.engine.batcher import RESPONSE_S, Batcher
from rednet.service.errors import DeadlineExceeded, Internal, ServiceError
from rednet.service.types import Inference, Job

PIXELS = np.zeros((3, 1, 1), np.uint8)
ANSWER = Inference(np.zeros(1, np.float32), np.zeros(1, np.float32), 0.0, 0.0, 1)


def job(id_: int, enqueued: float = 0.0, deadline: float = 100.0, reply: Callable[..., None] = lambda _: None) -> Job:
    return Job(id_, PIXELS, enqueued, deadline, reply)


def test_batch_is_cut_immediately_and_in_order_without_a_window() -> None:
    """A single job does not wait, and a full batch takes the oldest jobs."""
    batcher = Batcher(max_batch_size=2)
    for id_ in (7, 3, 5):
        batcher.add(job(id_))
    assert [job.id for job in batcher.next_batch(0.0)] == [7, 3]
    assert [job.id for job in batcher.next_batch(0.0)] == [5]
    assert batcher.next_batch(0.0) == []


def test_batch_takes_the_earliest_deadlines_first() -> None:
    """Jobs with equal deadlines keep their order."""
    batcher = Batcher(max_batch_size=2)
    for id_, deadline in ((1, 50.0), (2, 20.0), (3, 50.0), (4, 10.0)):
        batcher.add(job(id_, deadline=deadline))
    assert [job.id for job in batcher.next_batch(0.0)] == [4, 2]
    assert [job.id for job in batcher.next_batch(0.0)] == [1, 3]


def test_batch_holds_pixels_of_one_dtype() -> None:
    """It is the dtype of the most urgent job. The other jobs come next, by their deadlines."""
    batcher = Batcher(max_batch_size=2)
    floats = np.zeros((3, 1, 1), np.float32)
    for id_ in range(5):
        batcher.add(replace(job(id_, deadline=10.0 + id_), pixels=floats if id_ % 2 else PIXELS))
    assert [job.id for job in batcher.next_batch(0.0)] == [0, 2]
    assert [job.id for job in batcher.next_batch(0.0)] == [1, 3]
    assert [job.id for job in batcher.next_batch(0.0)] == [4]


def test_batching_window_starts_with_the_oldest_job() -> None:
    """A partial batch waits until its oldest job has waited for the window. A full batch does not wait."""
    batcher = Batcher(max_batch_size=3, max_wait_s=5.0)
    batcher.add(job(1, enqueued=10.0))
    batcher.add(job(2, enqueued=14.0))
    assert batcher.next_batch(14.9) == []
    assert batcher.wake_at() == 15.0
    assert len(batcher.next_batch(15.0)) == 2
    for id_ in (3, 4, 5):
        batcher.add(job(id_, enqueued=20.0))
    assert len(batcher.next_batch(20.0)) == 3


def test_wake_time_is_the_earliest_deadline_within_the_window() -> None:
    """With an empty queue there is no wake time."""
    batcher = Batcher(max_batch_size=8, max_wait_s=50.0)
    assert batcher.wake_at() is None
    batcher.add(job(1, deadline=90.0))
    batcher.add(job(2, deadline=20.0))
    assert batcher.wake_at() == 20.0 - RESPONSE_S
    assert [job.id for job in batcher.expire(20.0)] == [2]
    assert batcher.wake_at() == 50.0


def test_batching_window_ends_early_enough_for_the_earliest_deadline() -> None:
    """It ends when twice the predicted time of the batch is left, or immediately if there is less."""
    batcher = Batcher(max_batch_size=8, max_wait_s=50.0)
    batcher.batch_s = lambda images: 2.0 * images
    batcher.add(job(1, deadline=90.0))
    batcher.add(job(2, deadline=20.0))
    due = 20.0 - SAFETY_FACTOR * 4.0 - RESPONSE_S
    assert batcher.wake_at() == due
    assert batcher.next_batch(due - 0.001) == []
    assert [job.id for job in batcher.next_batch(due)] == [2, 1]
    batcher.add(job(3, enqueued=100.0, deadline=103.0))
    assert [job.id for job in batcher.next_batch(100.0)] == [3]


@pytest.mark.parametrize(("size", "wait_s"), [(0, 0.0), (1, -1.0)])
def test_invalid_batch_size_and_window_are_rejected(size: int, wait_s: float) -> None:
    """The constructor raises, not the first job."""
    with pytest.raises(ValueError, match="max_batch_size"):
        Batcher(size, wait_s)


class Interleavings(RuleBasedStateMachine):
    """Adds, cancels, expires, batches and fails jobs in any order: every waiting job is answered exactly once.

    Jobs are answered as the engine answers them. The invariants are what callers rely on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.batcher = Batcher(max_batch_size=3, max_wait_s=2.0)
        self.jobs: dict[int, Job] = {}
        self.answers: dict[int, list[Inference | ServiceError]] = {}
        self.left: set[int] = set()  # cancelled in the queue
        self.queued: list[int] = []

    @rule(patience=st.integers(0, 10))
    def add(self, patience: int) -> None:
        id_ = len(self.jobs)
        answers = self.answers[id_] = []
        self.jobs[id_] = job(id_, self.now, self.now + patience, answers.append)
        self.batcher.add(self.jobs[id_])
        self.queued.append(id_)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.jobs)))
        cancelled = self.batcher.cancel(id_)
        assert (cancelled is not None) == (id_ in self.queued)
        if cancelled:
            self.queued.remove(id_)
            self.left.add(id_)

    @rule(passed=st.integers(0, 4))
    def time_passes(self, passed: int) -> None:
        self.now += passed

    @rule()
    def expire(self) -> None:
        late = self.batcher.expire(self.now)
        assert {job.id for job in late} == {id_ for id_ in self.queued if self.jobs[id_].deadline <= self.now}
        for each in late:
            self.queued.remove(each.id)
            each.reply(DeadlineExceeded("late"))

    @rule(fails=st.booleans())
    def run_batch(self, fails: bool) -> None:
        self.expire()
        batch = self.batcher.next_batch(self.now)
        urgent_at = min((self.jobs[id_].deadline for id_ in self.queued), default=0.0) - RESPONSE_S
        waited = bool(self.queued) and self.jobs[self.queued[0]].enqueued + 2.0 <= self.now
        due = len(self.queued) >= 3 or waited or (bool(self.queued) and urgent_at <= self.now)
        urgent = sorted(self.queued, key=lambda id_: self.jobs[id_].deadline)[:3]
        assert [job.id for job in batch] == (urgent if due else [])
        for each in batch:
            self.queued.remove(each.id)
            assert each.deadline > self.now
            assert each.id not in self.left
            each.reply(Internal() if fails else ANSWER)

    @invariant()
    def every_job_is_queued_cancelled_or_answered_once(self) -> None:
        assert len(self.batcher) == len(self.queued)
        for id_, answers in self.answers.items():
            assert len(answers) == (0 if id_ in self.queued or id_ in self.left else 1)

    def teardown(self) -> None:
        for each in self.batcher.clear():
            self.queued.remove(each.id)
            each.reply(Internal())
        self.every_job_is_queued_cancelled_or_answered_once()
        assert not self.queued


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
