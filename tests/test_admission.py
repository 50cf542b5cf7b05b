"""Who is let in, as pure state with a clock of the test's own."""

from contextlib import ExitStack, suppress
from itertools import pairwise

import pytest

from rednet.service.engine.admission import SMOOTHING, Admission
from rednet.service.errors import Overloaded
from rednet.service.types import Permit

FAR = 1e9


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(clock: Clock) -> Admission:
    """Room for ten images that take a second each."""
    return Admission(10, float, clock)


def accepted(permit: Permit, stack: ExitStack, images: int = 1) -> None:
    stack.enter_context(permit).hold(images)


def test_places_are_held_while_a_request_lasts(admission: Admission) -> None:
    """None while its images are not counted, then one for each, none when it has ended, in whatever way."""
    with admission.admit(FAR) as permit:
        assert (admission.requests, admission.accepted) == (1, 0)
        permit.hold(4)
        assert (admission.requests, admission.accepted) == (1, 4)
        assert admission.backlog_s == 4
    with suppress(KeyError), admission.admit(FAR) as permit:
        permit.hold(2)
        raise KeyError
    assert (admission.requests, admission.accepted) == (0, 0)


def test_a_full_queue_says_when_there_is_room(admission: Admission) -> None:
    """The time is that of the images that would have to go first, and at least a second."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=10)
        with pytest.raises(Overloaded) as refused, admission.admit(FAR):
            pass
        assert refused.value.retry_after_s == 1
        assert admission.accepted == 10


def test_a_large_request_waits_for_room_for_all_of_it(admission: Admission) -> None:
    """Nine are waiting and seven more would come: six have to go first."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=9)
        with pytest.raises(Overloaded) as refused, admission.admit(FAR) as permit:
            permit.hold(7)
        assert refused.value.retry_after_s == 6
        assert admission.accepted == 9


def test_who_would_be_late_is_refused(admission: Admission, clock: Clock) -> None:
    """With five seconds of work ahead an answer comes after six; a deadline must leave twice that, for predictions are
    right only on average. Whoever comes back after the time that was given is let in."""
    clock.now = 100.0
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=3)
        with ExitStack() as others:
            accepted(admission.admit(FAR), others, images=2)
            with pytest.raises(Overloaded) as refused, admission.admit(109.0):
                pass
            assert refused.value.retry_after_s == 3
            accepted(admission.admit(112.0), others)
        clock.now += 3  # in which three images were answered
        accepted(admission.admit(112.0), stack)


def refusal(admission: Admission) -> Overloaded:
    with pytest.raises(Overloaded) as refused, admission.admit(FAR):
        pass
    return refused.value


def test_retry_after_is_spread_as_images_are_answered(admission: Admission, clock: Clock) -> None:
    """Requests that are refused in the same moment come back one after the other."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=10)
        clock.now = 60.0  # it has been busy for a while
        waits = [refusal(admission).retry_after_s for _ in range(5)]
    assert waits[0] == 1
    assert all(4 <= later - earlier <= 8 for earlier, later in pairwise(waits))


def test_retry_after_grows_faster_while_most_requests_are_rejected(admission: Admission, clock: Clock) -> None:
    """In a flood those who come back compete with newcomers: they are sent to its end."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=10)
        clock.now = 60.0
        calm = [refusal(admission).retry_after_s for _ in range(3)]
        for _ in range(100):
            refusal(admission)
        clock.now = 1000.0
        flooded = [refusal(admission).retry_after_s for _ in range(3)]
    assert flooded[2] - flooded[1] > 2 * (calm[2] - calm[1])


def test_a_deadline_that_no_idle_server_meets_takes_no_slot(admission: Admission) -> None:
    """One caller that polls with a hopeless deadline moves nobody's Retry-After."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=10)
        for _ in range(1000):
            with pytest.raises(Overloaded) as refused, admission.admit(1.9):
                pass
            assert refused.value.retry_after_s <= 21  # when its deadline would be met
        assert refusal(admission).retry_after_s == 1


def test_retry_after_follows_the_backlog_down(admission: Admission, clock: Clock) -> None:
    """Hundreds were refused and do not come back: some seconds later a caller of an idle server waits for no slot of
    theirs. While the server stays busy they are expected."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=10)
        clock.now = 60.0
        for _ in range(200):
            refusal(admission)
        assert refusal(admission).retry_after_s > 55
        clock.now += 5
        assert refusal(admission).retry_after_s > 55
    clock.now += 5
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack)
        with pytest.raises(Overloaded) as refused, admission.admit(clock.now + 3.5):
            pass
    assert refused.value.retry_after_s <= 3


def test_a_free_device_tries_anything(admission: Admission) -> None:
    """A prediction may be wrong; with nobody ahead there is nothing to wait for."""
    with admission.admit(0.1) as permit:
        permit.hold(1)


def test_predictions_learn_from_answers(admission: Admission, clock: Clock) -> None:
    """Where answers take three times the device's time, so do predictions, before long; failures teach nothing."""
    for _ in range(100):
        with admission.admit(FAR) as permit:
            permit.hold(2)
            clock.now += 6
    assert admission.predicted_s(2) == pytest.approx(6, rel=0.1)
    for _ in range(100):
        with suppress(KeyError), admission.admit(FAR):
            clock.now += 100
            raise KeyError
    assert admission.predicted_s(2) == pytest.approx(6, rel=0.1)


def test_images_set_aside_or_answered_hold_no_place(admission: Admission, clock: Clock) -> None:
    """Others are admitted meanwhile; at the end all places are free, and its time teaches nothing."""
    with admission.admit(FAR) as permit:
        permit.hold(10)
        permit.set_aside(6)
        assert admission.accepted == 4
        with admission.admit(FAR) as other:
            other.hold(6)
            permit.set_aside(-6)  # decoded: they are taken back without a check
            assert admission.accepted == 16
        permit.release(3)
        assert admission.accepted == 7
        predicted_s = admission.predicted_s(1)
        clock.now += 1000
    assert admission.accepted == 0
    assert admission.predicted_s(1) == predicted_s


def test_offered_seconds_count_admitted_and_refused_images(admission: Admission) -> None:
    """A request that is refused before its body is read counts as many images as requests have had lately."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=9)
        assert admission.offered_s == 9.0
        with pytest.raises(Overloaded), admission.admit(FAR) as permit:
            permit.hold(7)
        assert admission.offered_s == 16.0
        accepted(admission.admit(FAR), stack)
        with pytest.raises(Overloaded):
            admission.admit(FAR)
        mean = 1 + 8 * SMOOTHING * (1 - SMOOTHING)
        assert admission.offered_s == pytest.approx(17 + mean)


def test_offered_seconds_leave_out_requests_that_no_queue_could_answer(admission: Admission, clock: Clock) -> None:
    """Late even with an empty queue: another replica would not help them."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack)
        with pytest.raises(Overloaded):
            admission.admit(clock.now + 0.5)
        assert admission.offered_s == pytest.approx(1.0)
