"""Admission control: bounds the queue, and rejects requests that would miss their deadline. Pure state; used from one
thread."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from rednet.service.cost_table import SAFETY_FACTOR
from rednet.service.engine.retry_scheduler import RetryScheduler
from rednet.service.errors import Overloaded
from rednet.service.types import QueueCounts

SMOOTHING = 0.05  # weight of the newest answer in the running estimate
# Time constants of the running estimate of the load. It rises quickly when a flood begins, and outlasts short pauses.
BUSIER_S, IDLER_S = 0.5, 2.0
# While two of three requests are rejected, a retry is likely to be rejected, too. Retries are then scheduled further
# apart, so that most clients return after the flood; this bounds how far.
MAX_REJECTED_SHARE = 0.75
# Bounds on what one answer teaches: more is an outlier, less an answer that did not need the device (a damaged photo).
MAX_RATIO, MIN_RATIO = 10.0, 0.5


@dataclass(slots=True)
class OwnCounts:
    """The `QueueCounts` of the only process."""

    processes: int = 1
    accepted: int = 0
    offered_s: float = 0.0

    def total_accepted(self) -> int:
        return self.accepted

    def total_offered_s(self) -> float:
        return self.offered_s


class Permit:
    """The share of the queue that an admitted request holds: a `rednet.service.types.Permit`.

    Args:
        admission: to which it is given back.
        deadline: of the request, by the admission's clock.
    """

    def __init__(self, admission: "Admission", deadline: float) -> None:
        self._admission = admission
        self._deadline = deadline
        self._slots = 0
        self._since, self._work_s = 0.0, 0.0
        self._was_set_aside = False

    def __enter__(self) -> "Permit":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._admission.end(self._slots)
        # The time of a request that waited for slow decoding says nothing about the queue.
        if kind is None and not self._was_set_aside:
            self._admission.learn(self._since, self._work_s)

    def hold(self, images: int) -> None:
        self._since, self._work_s = self._admission.hold(images, self._deadline)
        self._change(images)

    def release(self, images: int) -> None:
        self._change(-images)

    def set_aside(self, change: int) -> None:
        self._was_set_aside = True
        self._change(-change)

    def _change(self, slots: int) -> None:
        self._slots += slots
        self._admission.count(slots)


class Admission:
    """Counts the images that are accepted and not yet answered, and predicts when the next one would be answered.

    Args:
        max_images: the queue's capacity.
        work_s: predicts the device time of a number of images. Whatever else an answer takes (decoding, sending,
            waiting for a core) is learned from the answers, as a factor.
        clock: returns the time, in seconds.
        counts: shared with other processes that admit images to the same devices; None: there are none.
    """

    def __init__(
        self,
        max_images: int,
        work_s: Callable[[int], float],
        clock: Callable[[], float] = time.monotonic,
        counts: QueueCounts | None = None,
    ) -> None:
        self.max_images = max_images
        self.requests = 0  # admitted and not yet answered; images of those whose body is still arriving are not counted
        self._counts = counts or OwnCounts()
        self._images_per_request = 1.0  # running estimate, for requests that are refused before their body is read
        self._work_s = work_s
        self._clock = clock
        self._factor = 1.0
        self._retries = RetryScheduler()
        self._rejected_share = 0.0  # of requests, a running estimate
        self._load = 0.0  # share of the last seconds during which images were accepted and unanswered
        self._load_known_at = clock()

    @property
    def accepted(self) -> int:
        """Images that are accepted and not yet answered, by all processes."""
        return self._counts.total_accepted()

    @property
    def offered_s(self) -> float:
        """Predicted device time of all images that were admitted or refused by all processes, in seconds."""
        return self._counts.total_offered_s()

    @property
    def backlog_s(self) -> float:
        """Predicted time to answer everything that is accepted."""
        return self.predicted_s(self.accepted)

    def predicted_s(self, images: int) -> float:
        """Predicted time to answer a number of images."""
        return self._work_s(images) * self._factor

    def admit(self, deadline: float) -> Permit:
        """Admit a request if there is room for an image. Its permit holds a slot for each image, once they are counted.

        Until then, while the body is arriving, it holds none: slow uploads would keep other requests out. If the queue
        is empty, every deadline is tried.

        Raises:
            Overloaded: there is no room, or no answer before the deadline; also from `Permit.hold`.
        """
        self._check(1, deadline, self._images_per_request)
        self._rejected_share -= self._rejected_share * SMOOTHING
        self.requests += 1
        return Permit(self, deadline)

    def hold(self, images: int, deadline: float) -> tuple[float, float]:
        """The present time, and the device time until these images are answered, too.

        Raises:
            Overloaded: they do not fit, or would be answered after the deadline.
        """
        now = self._check(images, deadline, images)
        self._offer(images)
        self._images_per_request += (images - self._images_per_request) * SMOOTHING
        return now, self._work_s(self.accepted + images)

    def end(self, slots: int) -> None:
        """An admitted request has ended, and gives back the slots that it still holds."""
        self.requests -= 1
        self.count(-slots)

    def count(self, images: int) -> None:
        """Add to the images that are accepted and not yet answered."""
        now = self._clock()
        self._load = self._load_at(now)
        self._load_known_at = now
        self._counts.accepted += images

    def _load_at(self, now: float) -> float:
        is_busy = self.accepted > 0
        share = math.exp((self._load_known_at - now) / (BUSIER_S if is_busy else IDLER_S))
        return self._load * share + (1 - share if is_busy else 0.0)

    def _offer(self, images: float) -> None:
        self._counts.offered_s += images * self._work_s(self.max_images) / self.max_images

    def _check(self, images: int, deadline: float, offered: float) -> float:
        """The present time, if these images fit behind those that are accepted.

        Args:
            images: to be checked.
            deadline: of their request.
            offered: how many count as offered if they are refused.

        Raises:
            Overloaded: they do not; it says when to try again.
        """
        now = self._clock()
        accepted = self.accepted
        if not accepted:
            return now
        if accepted > self.max_images - images:
            reason = f"{accepted} images are waiting"
            wait_s = self.backlog_s - self.predicted_s(self.max_images - images)
        # A queue of half a deadline keeps the device as busy as a longer one.
        elif (late_s := now + SAFETY_FACTOR * self.predicted_s(accepted + images) - deadline) > 0:
            reason, wait_s = "the answer would come after the deadline", late_s
        else:
            return now
        alone_s = SAFETY_FACTOR * self.predicted_s(images)
        hopeless = now + alone_s > deadline
        work_s = 0.0  # a request that would be late with an empty queue takes no retry slot from others
        if not hopeless:
            self._offer(offered)
            self._rejected_share += (1 - self._rejected_share) * SMOOTHING
            room = 1 - min(MAX_REJECTED_SHARE, self._rejected_share)
            # Every process schedules its own share of the rejected requests.
            work_s = self._counts.processes * images * self.predicted_s(self.max_images) / self.max_images / room
        retry_after_s = self._retries.schedule(now, wait_s, work_s, self._load_at(now))
        if hopeless:
            left = f"{1000 * max(0.0, deadline - now):.0f} ms are left until the deadline"
            message = f"{left}, but an answer may take {1000 * alone_s:.0f} ms even without a queue"
            raise Overloaded(message, retry_after_s).for_short_deadline()
        raise Overloaded(f"{reason}; try again later", retry_after_s)

    def learn(self, since: float, work_s: float) -> None:
        """Compare the time of an answer with the device's work that was ahead when its images were counted."""
        if work_s > 0:
            ratio = min(MAX_RATIO, max(MIN_RATIO, (self._clock() - since) / work_s))
            self._factor += (ratio - self._factor) * SMOOTHING


class AdmittingClient:
    """What every `EngineClient` that has an admission says about its queue."""

    _admission: Admission

    @property
    def max_images(self) -> int:
        return self._admission.max_images

    @property
    def queue_depth(self) -> int:
        return self._admission.accepted

    @property
    def requests(self) -> int:
        return self._admission.requests

    @property
    def backlog_s(self) -> float:
        return self._admission.backlog_s
