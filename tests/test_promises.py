"""When who was refused shall come back, and for whom a place is kept."""

import pytest

from service.promises import LATE_S, LONGEST_KEPT_S, LONGEST_S, MOST_KEPT, SHORTEST_S, Promises


@pytest.mark.parametrize("at_once", [True, False])
def test_they_come_back_no_faster_than_they_are_answered(at_once: bool) -> None:
    """In every half of a second, though they come back after whole ones; nobody within a second."""
    promises, work_s, count = Promises(), 0.01, 1000
    times = [0.3 if at_once else 0.001 * index for index in range(count)]
    waits = [promises.give(None, now=now, wait_s=0.1, work_s=work_s) for now in times]
    assert min(waits) == SHORTEST_S
    back = sorted(now + wait for now, wait in zip(times, waits, strict=True))
    in_time = int(0.5 / work_s)
    gaps = [later - earlier for earlier, later in zip(back[: -in_time - 1], back[in_time + 1 :], strict=True)]
    assert min(gap for gap, wait in zip(gaps, sorted(waits), strict=False) if wait < LONGEST_S) > 0.4


def test_where_there_is_room_they_are_told_so() -> None:
    """The first ones after no longer than there is none; what was promised long ago delays nobody."""
    promises = Promises()
    assert promises.give(None, now=100, wait_s=8.5, work_s=1) == 9
    for _ in range(100):
        promises.give(None, now=100, wait_s=0, work_s=1)
    assert promises.give(None, now=300, wait_s=0, work_s=1) == SHORTEST_S


def test_nobody_is_told_a_time_that_nobody_can_know() -> None:
    """Half a minute at most, two minutes where a place is kept."""
    promises = Promises()
    assert max(promises.give(None, now=0, wait_s=0, work_s=1) for _ in range(100)) == LONGEST_S
    promises = Promises()
    waits = [promises.give(b"%d" % index, now=0, wait_s=0, work_s=1) for index in range(100)]
    assert LONGEST_KEPT_S - 5 < max(waits) <= LONGEST_KEPT_S
    assert waits[-1] == LONGEST_S
    assert not promises.take(b"99", LONGEST_S)


def test_a_place_is_taken_once_and_in_time() -> None:
    """Neither sooner than told, nor much later, nor by others."""
    promises = Promises()
    promises.give(b"a", now=0, wait_s=10, work_s=1)
    promises.give(b"b", now=0, wait_s=20, work_s=1)
    assert not promises.take(b"a", 9.9)
    assert not promises.take(b"c", 10)
    assert not promises.take(None, 10)
    assert promises.take(b"a", 10)
    assert not promises.take(b"a", 10)
    assert promises.kept(20 + LATE_S) == 1
    assert promises.kept(20.1 + LATE_S) == 0
    assert not promises.take(b"b", 20.1 + LATE_S)


def test_one_place_far_ahead_keeps_no_others() -> None:
    """Those that were not taken in time are gone, in whatever order they were given."""
    promises = Promises()
    promises.give(b"far", now=0, wait_s=100, work_s=0.001)
    for index in range(50):
        promises.give(b"%d" % index, now=0.3, wait_s=0, work_s=0.001)
    assert promises.kept(1) == 51
    assert promises.kept(20) == 1
    assert not promises.take(b"0", 20)
    assert promises.take(b"far", 100)


def test_who_is_refused_again_under_the_same_name_has_one_place() -> None:
    """The later one."""
    promises = Promises()
    promises.give(b"a", now=0, wait_s=10, work_s=1)
    promises.give(b"a", now=10, wait_s=20, work_s=1)
    assert not promises.take(b"a", 15)
    assert promises.take(b"a", 30)
    assert promises.kept(30) == 0


def test_places_are_not_kept_without_end() -> None:
    """Names cost memory."""
    promises = Promises()
    for index in range(MOST_KEPT + 1):
        promises.give(b"%d" % index, now=0, wait_s=0, work_s=1e-6)
    assert promises.take(b"%d" % (MOST_KEPT - 1), 5)
    assert not promises.take(b"%d" % MOST_KEPT, 5)
