"""The schedule of `Retry-After` for rejected requests."""

from collections import Counter

import pytest

from rednet.service.engine.retry_scheduler import MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S, RetryScheduler


@pytest.mark.parametrize("at_once", [True, False])
def test_retries_are_scheduled_no_faster_than_they_are_answered(at_once: bool) -> None:
    """In every half second, although clients wait whole seconds, and at least one."""
    retries, work_s, count = RetryScheduler(), 0.01, 1000
    times = [0.3 if at_once else 0.001 * index for index in range(count)]
    waits = [retries.schedule(now=now, wait_s=0.1, work_s=work_s, load=1.0) for now in times]
    assert min(waits) == MIN_RETRY_AFTER_S
    back = sorted(now + wait for now, wait in zip(times, waits, strict=True))
    in_time = int(0.5 / work_s)
    gaps = [later - earlier for earlier, later in zip(back[: -in_time - 1], back[in_time + 1 :], strict=True)]
    assert min(gaps) > 0.4


def test_first_slot_is_as_early_as_there_is_room() -> None:
    """Slots in the past delay no later ones."""
    retries = RetryScheduler()
    assert retries.schedule(now=100, wait_s=8.5, work_s=1, load=1.0) == 9
    for _ in range(10):
        retries.schedule(now=100, wait_s=0, work_s=1, load=1.0)
    assert retries.schedule(now=300, wait_s=0, work_s=1, load=1.0) == MIN_RETRY_AFTER_S


def test_retry_after_is_at_most_two_minutes_and_spread() -> None:
    """If there are more requests than slots in two minutes, the second minute is used again, evenly."""
    retries = RetryScheduler()
    waits = [retries.schedule(now=0, wait_s=0, work_s=1, load=1.0) for _ in range(1000)]
    assert max(waits) <= MAX_RETRY_AFTER_S
    assert waits[:20] == sorted(waits[:20])
    assert max(Counter(waits).values()) <= 2 + 1000 // (MAX_RETRY_AFTER_S // 2)


@pytest.mark.parametrize(("load", "least_s", "most_s"), [(1.0, 45, 50), (0.7, 20, 40), (0.5, 1, 1), (0.0, 1, 1)])
def test_slots_expire_when_the_server_is_idle(load: float, least_s: int, most_s: int) -> None:
    """Clients that retry in their slots keep the server busy, so on an idle server they did not retry."""
    retries = RetryScheduler()
    for _ in range(10):
        retries.schedule(now=0, wait_s=0, work_s=1, load=1.0)
    assert least_s <= retries.schedule(now=0, wait_s=0, work_s=1, load=load) <= most_s


def test_request_without_work_takes_no_slot() -> None:
    """The next request gets the same time."""
    retries = RetryScheduler()
    assert [retries.schedule(now=0, wait_s=3, work_s=0, load=1.0) for _ in range(100)] == [3] * 100
