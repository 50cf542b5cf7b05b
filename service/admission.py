"""Who is let in: no more than may wait, and nobody who would be answered too late. Pure state; used from one thread."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import Overloaded
from service.promises import Promises

SMOOTHING = 0.05  # weight of the newest answer in the running estimate
# More in one answer is an accident, not a rule; less is an answer that did not need the device, as to a damaged photo.
LARGEST_FACTOR, SMALLEST_FACTOR = 10.0, 0.5
# A prediction is right on average; whoever is let in shall be answered in time nearly always. A queue of half a
# deadline keeps the device as busy as a longer one.
CAUTION = 2.0
OTHERS_SHARE = 0.5  # of all room, for everyone else while places are kept


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
        self._promises = Promises()

    @property
    def backlog_s(self) -> float:
        """Predicted time to answer everything that was accepted."""
        return self.predicted_s(self.accepted)

    def predicted_s(self, images: int) -> float:
        """Predicted time until the last of so many images is answered."""
        return self._work_s(images) * self._factor

    @contextmanager
    def admit(self, deadline: float, name: bytes | None = None) -> Iterator[Callable[[int], None]]:
        """Hold a place for a request while it lasts; the function sets for how many images, once they are counted.

        Where nobody is ahead, every deadline is tried. Who was refused, and comes back when told under the same name,
        is let in before others.

        Raises:
            Overloaded: there is no room, or no answer before the deadline; also from the function.
        """
        held, since, work_s = 0, 0.0, 0.0
        now = self._clock()
        share = 1.0 if self._promises.take(name, now) or not self._promises.any_kept(now) else OTHERS_SHARE

        def hold(images: int) -> None:
            nonlocal held, since, work_s
            others = self.accepted - held
            if others and others + images > share * self.most:
                wait_s = self.predicted_s(others) - self.predicted_s(max(0, int(share * self.most) - images))
                raise self._overloaded(f"{others} images are waiting", name, wait_s, images)
            since, work_s = self._clock(), self._work_s(others + images)
            late_s = since + CAUTION / share * work_s * self._factor - deadline
            if others and late_s > 0:
                raise self._overloaded("the answer would come after the deadline", name, late_s, images)
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

    def _overloaded(self, reason: str, name: bytes | None, wait_s: float, images: int) -> Overloaded:
        """A refusal that tells when to come back."""
        work_s = images * self.predicted_s(self.most) / self.most
        return Overloaded(f"{reason}; try again later", self._promises.give(name, self._clock(), wait_s, work_s))
