"""Who is let in, as pure state with a clock of the test's own."""

from contextlib import AbstractContextManager, ExitStack, suppress

import pytest

from service.admission import Admission
from service.errors import Overloaded
from service.types import Place

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


Holding = AbstractContextManager[Place]


def accepted(holding: Holding, stack: ExitStack, images: int = 1) -> None:
    stack.enter_context(holding)(images)


def test_places_are_held_while_a_request_lasts(admission: Admission) -> None:
    """None while its images are not counted, then one for each, none when it has ended, in whatever way."""
    with admission.admit(FAR) as hold:
        assert (admission.requests, admission.accepted) == (1, 0)
        hold(4)
        assert (admission.requests, admission.accepted) == (1, 4)
        assert admission.backlog_s == 4
    with suppress(KeyError), admission.admit(FAR) as hold:
        hold(2)
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
        with pytest.raises(Overloaded) as refused, admission.admit(FAR) as hold:
            hold(7)
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


def refusal(admission: Admission, name: bytes | None = None) -> Overloaded:
    with pytest.raises(Overloaded) as refused, admission.admit(FAR, name):
        pass
    return refused.value


def test_who_is_refused_together_comes_back_one_after_the_other(admission: Admission) -> None:
    """As fast as images are answered, at most."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=10)
        waits = [refusal(admission).retry_after_s for _ in range(5)]
    assert waits == [1, 5, 10, 15, 20]


def test_a_place_is_kept_for_who_has_a_name(admission: Admission, clock: Clock) -> None:
    """Nobody else gets it; who comes when told does; too soon, or again, they get no more than everyone."""
    with ExitStack() as stack, ExitStack() as first:
        accepted(admission.admit(FAR), stack, images=9)
        accepted(admission.admit(FAR), first)
        assert refusal(admission, b"me").retry_after_s == 1
        first.close()
        refusal(admission, b"me too")
        refusal(admission)
        clock.now += 2
        accepted(admission.admit(FAR, b"me"), stack)
        refusal(admission, b"me")
        stack.close()
        clock.now += 100
        accepted(admission.admit(FAR), stack, images=10)  # nobody has come, and nobody will


def test_a_kept_place_is_kept_while_the_body_comes(admission: Admission, clock: Clock) -> None:
    """Whoever has come for it need not fear others, however slow the line is; whoever leaves again gives it up."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=8)
        with ExitStack() as first:
            accepted(admission.admit(FAR), first, images=2)
            for name in (b"me", b"you"):
                refusal(admission, name)
        clock.now += 6
        with suppress(KeyError), admission.admit(FAR, b"you"):
            hold = stack.enter_context(admission.admit(FAR, b"me"))
            refusal(admission)
            raise KeyError
        accepted(admission.admit(FAR), stack)
        refusal(admission)
        hold(1)
        assert admission.accepted == 10


def test_half_of_the_room_is_for_those_without_a_place(admission: Admission) -> None:
    """However many are kept: most of their owners may never come."""
    with ExitStack() as stack:
        with ExitStack() as first:
            accepted(admission.admit(FAR), first, images=10)
            for index in range(20):
                refusal(admission, b"%d" % index)
        accepted(admission.admit(FAR), stack, images=4)
        accepted(admission.admit(FAR), stack)
        refusal(admission)


def test_a_deadline_leaves_more_time_while_places_are_kept(admission: Admission, clock: Clock) -> None:
    """As if an image for each place were waiting, but no more than there are; not so for who has a place."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack, images=3)
        for index in range(20):
            with pytest.raises(Overloaded), admission.admit(7.0, b"%d" % index):
                pass
            late_s = 2 * (3 + 1 + min(index + 1, 4))
            with pytest.raises(Overloaded), admission.admit(late_s - 0.1):
                pass
            with suppress(KeyError), admission.admit(late_s):
                raise KeyError  # from which nothing is learned
        clock.now += 2
        accepted(admission.admit(clock.now + 8, b"0"), stack)


def test_no_place_is_kept_for_who_would_be_late_anyway(admission: Admission) -> None:
    """A deadline that cannot be met with nobody ahead must not keep others out, be the queue full or not."""
    with ExitStack() as stack:
        accepted(admission.admit(FAR), stack)
        with pytest.raises(Overloaded), admission.admit(1.9, b"hasty"):
            pass
        with ExitStack() as others:
            accepted(admission.admit(FAR), others, images=9)
            with pytest.raises(Overloaded), admission.admit(1.9, b"hasty too"):
                pass
        accepted(admission.admit(FAR), stack, images=9)


def test_a_free_device_tries_anything(admission: Admission) -> None:
    """A prediction may be wrong; with nobody ahead there is nothing to wait for."""
    with admission.admit(0.1) as hold:
        hold(1)


def test_predictions_learn_from_answers(admission: Admission, clock: Clock) -> None:
    """Where answers take three times the device's time, so do predictions, before long; failures teach nothing."""
    for _ in range(100):
        with admission.admit(FAR) as hold:
            hold(2)
            clock.now += 6
    assert admission.predicted_s(2) == pytest.approx(6, rel=0.1)
    for _ in range(100):
        with suppress(KeyError), admission.admit(FAR):
            clock.now += 100
            raise KeyError
    assert admission.predicted_s(2) == pytest.approx(6, rel=0.1)


def test_images_set_aside_or_answered_hold_no_place(admission: Admission, clock: Clock) -> None:
    """Others are admitted meanwhile; at the end all places are free, and its time teaches nothing."""
    with admission.admit(FAR) as place:
        place(10)
        place.aside(6)
        assert admission.accepted == 4
        with admission.admit(FAR) as other:
            other(6)
            place.aside(-6)  # decoded: they are taken back without a check
            assert admission.accepted == 16
        place.add(-3)
        assert admission.accepted == 7
        predicted_s = admission.predicted_s(1)
        clock.now += 1000
    assert admission.accepted == 0
    assert admission.predicted_s(1) == predicted_s
