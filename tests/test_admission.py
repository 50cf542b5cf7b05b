"""Admission control as pure state, with the test's own clock."""

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
    """At most ten images, which take a second each."""
    return Admission(10, float, clock)


def accepted(permit: Permit, stack: ExitStack, images: int = 1) -> None:
    stack.enter_context(permit).hold(images)


def test_permit_holds_one_slot_per_image_until_the_request_ends(admission: Admission) -> None:
    """A request holds no slots before its images are counted, and none after it has ended or failed."""
    with admission.admit(FAR) as permit:
        assert (admission.requests, admission.accepted) == (1, 0)
        permit.hold(4)
        assert (admission.requests, admission.accepted) == (1, 4)
        assert admission.backlog_s == 4
    with suppress(KeyError), admission.admit(FAR) as permit:
        permit.hold(2)
        raise KeyError
    assert (admission.requests, admission.accepted) == (0, 0)


def test_retry_after_of_a_full_queue_is_the_time_until_there_is_room(admission: Admission) -> None:
    """It is the predicted time of the images that have to be answered first, and at least a second."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=10)
        with pytest.raises(Overloaded) as refused, admission.admit(FAR):
            pass
        assert refused.value.retry_after_s == 1
        assert admission.accepted == 10


def test_retry_after_of_a_large_request_covers_all_of_its_images(admission: Admission) -> None:
    """With nine of ten slots held, six images have to be answered before seven more fit."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=9)
        with pytest.raises(Overloaded) as refused, admission.admit(FAR) as permit:
            permit.hold(7)
        assert refused.value.retry_after_s == 6
        assert admission.accepted == 9


def test_request_that_would_miss_its_deadline_is_rejected(admission: Admission, clock: Clock) -> None:
    """With five seconds of work queued, an answer takes six seconds. Predictions are right only on average, so a
    deadline must allow twice that. A retry after `Retry-After` is admitted."""
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
    """Requests that are rejected at the same moment get different times."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=10)
        clock.now = 60.0  # after a busy minute
        waits = [refusal(admission).retry_after_s for _ in range(5)]
    assert waits[0] == 1
    assert all(4 <= later - earlier <= 8 for earlier, later in pairwise(waits))


def test_retry_after_grows_faster_while_most_requests_are_rejected(admission: Admission, clock: Clock) -> None:
    """Retries compete with new requests, so they are scheduled for after the flood."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=10)
        clock.now = 60.0
        calm = [refusal(admission).retry_after_s for _ in range(3)]
        for _ in range(100):
            refusal(admission)
        clock.now = 1000.0
        flooded = [refusal(admission).retry_after_s for _ in range(3)]
    assert flooded[2] - flooded[1] > 2 * (calm[2] - calm[1])


def test_hopeless_deadline_takes_no_retry_slot(admission: Admission) -> None:
    """A client that polls with a deadline that even an idle server misses does not delay the retries of other
    clients."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=10)
        for _ in range(1000):
            with pytest.raises(Overloaded) as refused, admission.admit(1.9):
                pass
            assert refused.value.retry_after_s <= 21  # by then, the deadline could be met
            assert refused.value.message.startswith("1900 ms are left until the deadline, but an answer may take ")
        assert refusal(admission).retry_after_s == 1


def test_retry_after_follows_the_backlog_down(admission: Admission, clock: Clock) -> None:
    """When hundreds of rejected clients do not retry, an idle server soon gives short times again. A busy server keeps
    their slots."""
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


def test_idle_device_admits_any_deadline(admission: Admission) -> None:
    """The prediction may be wrong, and with an empty queue there is nothing to wait for."""
    with admission.admit(0.1) as permit:
        permit.hold(1)


def test_predicted_time_follows_measured_times_of_answers(admission: Admission, clock: Clock) -> None:
    """When answers take three times the device time, predictions do, too. Failed requests are not counted."""
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


def test_images_set_aside_or_answered_hold_no_slot(admission: Admission, clock: Clock) -> None:
    """Other requests are admitted meanwhile. At the end all slots are free, and the request's duration is not
    counted."""
    with admission.admit(FAR) as permit:
        permit.hold(10)
        permit.set_aside(6)
        assert admission.accepted == 4
        with admission.admit(FAR) as other:
            other.hold(6)
            permit.set_aside(-6)  # decoded: their slots are taken back without a check
            assert admission.accepted == 16
        permit.release(3)
        assert admission.accepted == 7
        predicted_s = admission.predicted_s(1)
        clock.now += 1000
    assert admission.accepted == 0
    assert admission.predicted_s(1) == predicted_s


def test_offered_seconds_count_admitted_and_rejected_images(admission: Admission) -> None:
    """A request that is rejected before its body is read counts as the recent mean number of images."""
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


def test_offered_seconds_leave_out_hopeless_deadlines(admission: Admission, clock: Clock) -> None:
    """More replicas would not help a request that is late even with an empty queue."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack)
        with pytest.raises(Overloaded):
            admission.admit(clock.now + 0.5)
        assert admission.offered_s == pytest.approx(1.0)
