"""The memory budget of bodies and responses: bounds, the share of small bodies, and eviction of stalled uploads."""

from contextlib import suppress

import pytest

from rednet.service.errors import Overloaded
from rednet.service.parsing.memory_budget import SMALL_BYTES, UPLOAD_GRACE_S, MemoryBudget, MemoryLease

MB = 1_000_000


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def upload(lease: MemoryLease, revoked: list[MemoryLease]) -> MemoryLease:
    """The lease of a body that is being received."""
    lease.on_revoke = lambda: revoked.append(lease)
    return lease


def test_memory_is_released_at_the_end_of_a_request() -> None:
    """Also after an error."""
    budget = MemoryBudget(8 * MB)
    with suppress(RuntimeError), budget.lease() as lease:
        lease.take(5 * MB)
        lease.take(2 * MB)
        assert budget.used == 7 * MB
        raise RuntimeError
    assert budget.used == 0


def test_full_memory_budget_rejects_with_retry_after() -> None:
    """Existing leases keep their memory."""
    budget = MemoryBudget(8 * MB)
    with budget.lease() as first, budget.lease() as second:
        first.take(6 * MB)
        with pytest.raises(Overloaded) as caught:
            second.take(2 * MB)
        assert caught.value.retry_after_s > 0
        assert (budget.used, first.revoked) == (6 * MB, False)
    assert budget.used == 0


def test_small_bodies_have_a_reserved_share_of_the_budget() -> None:
    """An eighth of the budget is only for leases that are small in total."""
    budget = MemoryBudget(80 * MB)
    with budget.lease() as large, budget.lease() as small, budget.lease() as growing:
        large.take(70 * MB)
        with pytest.raises(Overloaded):
            large.take(1)
    with budget.lease() as large, budget.lease() as small, budget.lease() as growing:
        large.take(70 * MB)
        small.take(SMALL_BYTES)
        growing.take(SMALL_BYTES)
        with pytest.raises(Overloaded):
            growing.take(1)


def test_stalled_upload_is_evicted_when_the_budget_is_full() -> None:
    """The upload with the most memory over time is evicted. Its memory is free immediately, and its next bytes are
    rejected."""
    clock, revoked = Clock(), list[MemoryLease]()
    budget = MemoryBudget(16 * MB, clock)
    with budget.lease() as stalled, budget.lease() as slow, budget.lease() as fresh:
        upload(stalled, revoked).take(10 * MB)
        upload(slow, revoked).take(3 * MB)
        with pytest.raises(Overloaded):  # within the grace time
            upload(fresh, revoked).take(4 * MB)
        assert revoked == [fresh]
    with budget.lease() as stalled, budget.lease() as slow, budget.lease() as fresh:
        revoked.clear()
        upload(stalled, revoked).take(10 * MB)
        upload(slow, revoked).take(3 * MB)
        clock.now += UPLOAD_GRACE_S + 1
        upload(fresh, revoked).take(4 * MB)
        assert revoked == [stalled]
        assert budget.used == 7 * MB
        with pytest.raises(Overloaded):
            stalled.take(1)
        assert budget.used == 7 * MB
    assert budget.used == 0


def test_complete_body_is_never_evicted() -> None:
    """Its request is being answered, however long that takes."""
    clock = Clock()
    budget = MemoryBudget(16 * MB, clock)
    with budget.lease() as complete, budget.lease() as fresh:
        complete.take(14 * MB)
        clock.now += 1000
        with pytest.raises(Overloaded):
            fresh.take(4 * MB)
        assert not complete.revoked


def test_upload_that_holds_the_most_is_rejected_itself() -> None:
    """A smaller upload stays, even if it is slower."""
    clock, revoked = Clock(), list[MemoryLease]()
    budget = MemoryBudget(16 * MB, clock)
    with budget.lease() as slow, budget.lease() as greedy:
        upload(slow, revoked).take(1 * MB)
        upload(greedy, revoked).take(13 * MB)
        clock.now += UPLOAD_GRACE_S + 1
        with pytest.raises(Overloaded):
            greedy.take(1 * MB)
        assert revoked == [greedy]
