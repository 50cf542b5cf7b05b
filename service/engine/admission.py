"""Which requests are admitted: no more than may wait, and none that would be answered too late. Pure state; used from
one thread."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rednet.service.engine.retry_scheduler import RetryScheduler
from rednet.service.errors import Overloaded

SMOOTHING = 0.05  # weight of the newest answer in the running estimate
# Time constants of the running estimate of the load: a flood is seen at once, while a moment without work is no end.
BUSIER_S, IDLER_S = 0.5, 2.0
# As long as two of three requests are rejected, one that comes back is, too. So slots are given away more slowly then,
# so that most callers come back when the flood is over; but not without end.
MAX_REJECTED_SHARE = 0.75
# More in one answer is an accident, not a rule; less is an answer that did not need the device, as to a damaged photo.
LARGEST_FACTOR, SMALLEST_FACTOR = 10.0, 0.5
# Predictions are unbiased, so half of them are too low. This factor makes nearly all admitted requests meet their
# deadline. A queue of half a deadline keeps the device as busy as a longer one.
CAUTION = 2.0


class Place:
    """What an admitted request holds in the queue: a `rednet.service.types.Place`.

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
        self._retries = RetryScheduler()
        self._rejected_share = 0.0  # running estimate, of requests
        self._load = 0.0  # share of the last seconds in which there were accepted images
        self._load_known_at = clock()

    @property
    def backlog_s(self) -> float:
        """Predicted time to answer everything that was accepted."""
        return self.predicted_s(self.accepted)

    def predicted_s(self, images: int) -> float:
        """Predicted time until the last of so many images is answered."""
        return self._work_s(images) * self._factor

    @contextmanager
    def admit(self, deadline: float) -> Iterator[Place]:
        """Let a request in if there is room for an image; calling the place holds one for each image until the end.

        Until they are counted, as long as the body is coming, it holds none: slow uploads would keep all others out.
        Where nobody is ahead, every deadline is tried.

        Raises:
            Overloaded: there is no room, or no answer before the deadline; also from the place.
        """
        since, work_s = 0.0, 0.0

        def check(images: int) -> None:
            nonlocal since, work_s
            since, work_s = self._clock(), self._work_s(self.accepted + images)
            if self.accepted:
                self._check(images, since, deadline)

        check(1)
        self._rejected_share -= self._rejected_share * SMOOTHING
        self.requests += 1
        place = Place(check, self._count)
        try:
            yield place
            if not place.set_aside:
                self._learn(self._clock() - since, work_s)
        finally:
            self.requests -= 1
            self._count(-place.held)

    def _count(self, images: int) -> None:
        now = self._clock()
        self._load = self._load_at(now)
        self._load_known_at = now
        self.accepted += images

    def _load_at(self, now: float) -> float:
        share = math.exp((self._load_known_at - now) / (BUSIER_S if self.accepted else IDLER_S))
        return self._load * share + (1 - share if self.accepted else 0.0)

    def _check(self, images: int, now: float, deadline: float) -> None:
        """Raises `Overloaded`, which says when to come back, unless so many images may wait behind those accepted."""
        if self.accepted > self.most - images:
            reason = f"{self.accepted} images are waiting"
            wait_s = self.backlog_s - self.predicted_s(self.most - images)
        elif (late_s := now + CAUTION * self.predicted_s(self.accepted + images) - deadline) > 0:
            reason, wait_s = "the answer would come after the deadline", late_s
        else:
            return
        hopeless = now + CAUTION * self.predicted_s(images) > deadline
        work_s = 0.0  # a request that would be late if nobody were ahead takes no slot from others
        if not hopeless:
            self._rejected_share += (1 - self._rejected_share) * SMOOTHING
            room = 1 - min(MAX_REJECTED_SHARE, self._rejected_share)
            work_s = images * self.predicted_s(self.most) / self.most / room
        error = Overloaded(
            f"{reason}; try again later", self._retries.schedule(now, wait_s, work_s, self._load_at(now))
        )
        raise error.for_short_deadline() if hopeless else error

    def _learn(self, took_s: float, work_s: float) -> None:
        """Compare an answer's time with the device's work that was ahead when its images were counted."""
        if work_s > 0:
            ratio = min(LARGEST_FACTOR, max(SMALLEST_FACTOR, took_s / work_s))
            self._factor += (ratio - self._factor) * SMOOTHING
