"""Who is let in: no more than may wait, and nobody who would be answered too late. Pure state; used from one thread.

Places that are kept for those who were refused count as images that wait already, but never as more than half of all:
many of those who were told to come do not.
"""

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


class Place:
    """What an admitted request holds in the queue: a `service.types.Place`.

    Args:
        hold: called with the number of images; raises `Overloaded` where they do not fit.
        count: adds to the images that are accepted.
    """

    def __init__(self, hold: Callable[[int], None], count: Callable[[int], None]) -> None:
        self._hold = hold
        self._count = count
        self.held = 0
        self.set_aside = False

    def __call__(self, images: int) -> None:
        self._hold(images)
        self.add(images)

    def add(self, images: int) -> None:
        self.held += images
        self._count(images)

    def aside(self, images: int) -> None:
        # Nothing is learned from how long such a request takes: it says nothing about the queue.
        self.set_aside = True
        self.add(-images)


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
        self.requests = 0  # let in and not yet answered; images of those whose body is still coming are not counted
        self._work_s = work_s
        self._clock = clock
        self._factor = 1.0
        self._promises = Promises()
        self._arriving = 0  # requests that have come for their place, but hold no images yet

    @property
    def backlog_s(self) -> float:
        """Predicted time to answer everything that was accepted."""
        return self.predicted_s(self.accepted)

    def predicted_s(self, images: int) -> float:
        """Predicted time until the last of so many images is answered."""
        return self._work_s(images) * self._factor

    @contextmanager
    def admit(self, deadline: float, name: bytes | None = None) -> Iterator[Place]:
        """Let a request in if there is room for an image; calling the place holds one for each image until the end.

        Until they are counted, as long as the body is coming, it holds none: slow uploads would keep all others out.
        Where nobody is ahead, every deadline is tried. Who was refused, and comes back when told under the same name,
        is let in before others.

        Raises:
            Overloaded: there is no room, or no answer before the deadline; also from the function.
        """
        since, work_s = 0.0, 0.0
        expected = arriving = self._promises.take(name, self._clock())

        def check(images: int) -> None:
            nonlocal since, work_s
            since, work_s = self._clock(), self._work_s(self.accepted + images)
            if self.accepted:
                self._check(images, since, deadline, name, expected)

        def hold(images: int) -> None:
            check(images)
            arrive()

        def count(images: int) -> None:
            self.accepted += images

        def arrive() -> None:
            nonlocal arriving
            self._arriving -= arriving
            arriving = False

        check(1)
        self.requests += 1
        self._arriving += arriving
        place = Place(hold, count)
        try:
            yield place
            if not place.set_aside:
                self._learn(self._clock() - since, work_s)
        finally:
            arrive()
            self.requests -= 1
            self.accepted -= place.held

    def _check(self, images: int, now: float, deadline: float, name: bytes | None, expected: bool) -> None:
        """Raises `Overloaded`, which tells when to come back, unless so many images may wait behind those accepted."""
        kept = 0 if expected else self._promises.kept(now) + self._arriving
        room = max(self.most // 2, self.most - kept) - images
        ahead = self.accepted + images
        if self.accepted > room:
            reason = f"{self.accepted} images are waiting"
            wait_s = self.backlog_s - self.predicted_s(max(0, room))
        elif (late_s := now + CAUTION * self.predicted_s(ahead + min(kept, ahead)) - deadline) > 0:
            reason, wait_s = "the answer would come after the deadline", late_s
        else:
            return
        hopeless = now + CAUTION * self.predicted_s(images) > deadline
        if hopeless:
            name = None  # they would be late if nobody were ahead: no place is kept for them
        work_s = images * self.predicted_s(self.most) / self.most
        error = Overloaded(f"{reason}; try again later", self._promises.give(name, now, wait_s, work_s))
        raise error.for_short_deadline() if hopeless else error

    def _learn(self, took_s: float, work_s: float) -> None:
        """Compare an answer's time with the device's work that was ahead when its images were counted."""
        if work_s > 0:
            ratio = min(LARGEST_FACTOR, max(SMALLEST_FACTOR, took_s / work_s))
            self._factor += (ratio - self._factor) * SMOOTHING
