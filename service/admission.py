"""Who is let in: no more than may wait, and nobody who would be answered too late. Pure state; used from one thread."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import Overloaded

SHORTEST_RETRY_S = 1.0  # the header counts whole seconds
LONGEST_RETRY_S = 30.0  # by then most things have changed
SMOOTHING = 0.05  # weight of the newest answer in the running estimate
# More in one answer is an accident, not a rule; less is an answer that did not need the device, as to a damaged photo.
LARGEST_FACTOR, SMALLEST_FACTOR = 10.0, 0.5
# A prediction is right on average; whoever is let in shall be answered in time nearly always. A queue of half a
# deadline keeps the device as busy as a longer one.
CAUTION = 2.0


class Admission:
    """Counts the images that were accepted and not yet answered, and predicts when another would be.

    Args:
        most: how many there may be.
        work_s: the device's time for so many images. What else an answer takes (decoding, sending, waiting for a core)
            is learned from the answers themselves, as a factor.
        clock: tells the time, in seconds.
    """

    def __init__(self, most: int, work_s: Callable[[int], float], clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.accepted = 0
        self._work_s = work_s
        self._clock = clock
        self._factor = 1.0
        self._promised = 0.0  # until when the device has work if all who were refused come back as they were told

    @property
    def backlog_s(self) -> float:
        """Predicted time to answer everything that was accepted."""
        return self.predicted_s(self.accepted)

    def predicted_s(self, images: int) -> float:
        """Predicted time until the last of so many images is answered."""
        return self._work_s(images) * self._factor

    @contextmanager
    def admit(self, deadline: float) -> Iterator[Callable[[int], None]]:
        """Hold a place for a request while it lasts; the function sets for how many images, once they are counted.

        Where nobody is ahead, every deadline is tried.

        Raises:
            Overloaded: there is no room, or no answer before the deadline; also from the function.
        """
        held, since, work_s = 0, 0.0, 0.0

        def hold(images: int) -> None:
            nonlocal held, since, work_s
            others = self.accepted - held
            if others + images > self.most:
                wait_s = self.predicted_s(others) - self.predicted_s(max(0, self.most - images))
                raise self._overloaded(f"{others} images are waiting", wait_s, images)
            since, work_s = self._clock(), self._work_s(others + images)
            late_s = since + CAUTION * work_s * self._factor - deadline
            if others and late_s > 0:
                raise self._overloaded("the answer would come after the deadline", late_s, images)
            self.accepted += images - held
            held = images

        hold(1)
        try:
            yield hold
            self._learn(self._clock() - since, work_s)
        finally:
            self.accepted -= held

    def _learn(self, took_s: float, work_s: float) -> None:
        """Compare an answer's time with the device's work that was ahead when its images were counted."""
        if work_s > 0:
            ratio = min(LARGEST_FACTOR, max(SMALLEST_FACTOR, took_s / work_s))
            self._factor += (ratio - self._factor) * SMOOTHING

    def _overloaded(self, reason: str, wait_s: float, images: int) -> Overloaded:
        """A refusal that tells when to come back: not all who were refused at the same moment, but one after the other,
        as fast as they can be answered."""
        now = self._clock()
        back = max(now + max(SHORTEST_RETRY_S, wait_s), min(self._promised, now + LONGEST_RETRY_S))
        self._promised = back + images * self.predicted_s(self.most) / self.most
        return Overloaded(f"{reason}; try again later", back - now)
