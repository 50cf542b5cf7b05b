"""Decoder processes of one kind, and the photos that wait for them."""

import asyncio
import contextvars
import logging
from collections.abc import Sequence
from typing import Protocol

from rednet.service.decoding.failures import came_from_outside, exceeded_cpu_limit
from rednet.service.decoding.fair_queue import FairQueue
from rednet.service.decoding.limits import Cost
from rednet.service.decoding.worker import SLOTS
from rednet.service.decoding.worker_handle import Link, Photo, fail
from rednet.service.errors import DecoderUnavailable, ServiceError

log = logging.getLogger(__name__)

STUCK_S = 0.05  # after which the photo behind another one is given to the next free process, too
CHECK_S = 1.0  # between looks at processes that work on the same photo for long
DOWN_AFTER = 3  # failed starts in a row
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0  # before a process is started after one that was of no use


class PoolOwner(Protocol):
    """What a pool reports to."""

    def decoded(self, pool: "Pool", photo: Photo, took_s: float) -> None:
        """A photo was finished, with or without success."""

    def too_costly(self, photo: Photo, cost: Cost | None) -> None:
        """A photo is for another pool; None: it has exceeded a limit, and nothing else is known of it."""

    def moves(self, pool: "Pool", photo: Photo) -> bool:
        """Give a photo that is next to another pool, if that is better; returns whether it was done."""


class Pool:
    """Up to `size` processes, and a fair queue in front of them.

    Processes that end are replaced: at once if they have answered a photo, else after a pause, which grows with every
    one that does not even start.

    Args:
        owner: what it reports to.
        command: starts a process.
        side: of the pixels, [3, side, side].
        size: processes.
        memory_bytes: for all photos that are being decoded, by their expected memory. A larger photo is decoded alone.
        ahead: whether a process is given the next photo while it works on one.
    """

    def __init__(
        self, owner: PoolOwner, command: Sequence[str], side: int, size: int, memory_bytes: int = 0, ahead: bool = True
    ) -> None:
        self._owner, self.command, self._side = owner, [*command], side
        self._size, self._memory_bytes, self._ahead = size, memory_bytes, ahead
        self._all_wanted = False  # also those that have nothing to do
        self._links: set[Link] = set()
        self._idle: list[Link] = []
        self._queue: FairQueue[Photo] = FairQueue()
        self._reserved_bytes = 0
        self._failed_starts = 0  # in a row
        self._pause: asyncio.TimerHandle | None = None
        self._checking: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def available(self) -> bool:
        """Whether a process is alive and has shown it."""
        return any(link.ready for link in self._links)

    @property
    def is_down(self) -> bool:
        """Whether there are no processes, and none can be had at the moment."""
        return self._failed_starts >= DOWN_AFTER and not self.available

    async def start(self, timeout_s: float) -> None:
        """Keep all processes running from now on; returns when they do, or none does."""
        self.keep_all()
        try:
            async with asyncio.timeout(timeout_s):
                while not (self.is_down or (self._links and all(link.ready for link in self._links))):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            log.error("the decoders have not started within %.0f s", timeout_s)

    def keep_all(self) -> None:
        if not self._all_wanted:
            self._all_wanted = True
            self._start_missing()

    def submit(self, photo: Photo, first: bool = False) -> None:
        """Have a photo decoded, before all others if `first`."""
        photo.pool = self
        if self._idle and self._fits(photo):
            self._begin(self._idle.pop(), photo)
        elif self.is_down:
            fail(photo, DecoderUnavailable())
        else:
            self._queue.put(photo, first)
            self._start_missing()

    def leave(self, photo: Photo, kill_over: float) -> None:
        self._queue.discard(photo)
        if photo.cost_s > kill_over:
            for link in self._links:
                if link.photos and link.photos[0] is photo:
                    self._hand_back(link)
                    break

    def wait_s(self, photo: Photo) -> float:
        """When a photo's turn would come, in seconds, by what is expected of all that wait."""
        return (self._queue.wait_s(photo) - photo.cost_s) / self._size

    def close(self, error: ServiceError) -> None:
        """End the processes, and all photos with the error. Blocks until they have ended."""
        self._closed = True
        for timer in (self._pause, self._checking):
            if timer:
                timer.cancel()
        self._fail_waiting(error)
        links = [*self._links]
        for link in links:
            for photo in link.kill():
                fail(photo, error.with_message(error.message))
        for link in links:
            link.join()

    def decoded(self, photo: Photo, took_s: float) -> None:
        self._owner.decoded(self, photo, took_s)

    def too_costly(self, photo: Photo, cost: Cost) -> None:
        if photo.pool is self:  # else another process has said so already
            self._owner.too_costly(photo, cost)

    def fill(self, link: Link) -> None:
        """Give a process its next photo, and where many wait the one after that."""
        if link.reserved_bytes:
            self._release(link)
        if not link.useful:
            self._failed_starts = 0
            self._changed.set()
        if not link.photos:
            photo = self._overtake(STUCK_S) or self._next_waiting() or self._overtake(0.0)
            if photo is None:
                self._idle.append(link)
                return
            self._begin(link, photo)
        has_room = self._ahead and len(link.photos) < SLOTS and len(self._queue) > self._size
        if has_room and (photo := self._next_waiting()):
            link.begin(photo)

    def unusable(self, link: Link) -> None:
        link.ready = False
        if link in self._idle:
            self._idle.remove(link)

    def ended(self, link: Link, status: int | OSError) -> None:
        self._links.discard(link)
        self._changed.set()
        if self._closed:
            return
        if not link.was_ready and (isinstance(status, OSError) or not came_from_outside(status)):
            self._failed_starts += 1
        if isinstance(status, OSError):
            log.error("a decoder cannot be started: %s", status)
        else:
            log.error("a decoder has ended with status %d", status)
            self._judge(link, status)
        self._release(link)
        self._start_missing(paced=not link.useful)
        if self.is_down:
            if self._failed_starts == DOWN_AFTER:
                log.error("no decoder can be started: photos get 503 until one can")
            self._fail_waiting(DecoderUnavailable())

    def _judge(self, link: Link, status: int) -> None:
        """Decode again what a process had, unless the first of its photos was the reason for its end."""
        photos = [*link.photos]
        for photo in reversed(photos[1:]):
            self._again(photo)
        if photos:
            if exceeded_cpu_limit(status) and self._ahead:
                self._owner.too_costly(photos[0], None)
            elif error := photos[0].history.ended(status):
                fail(photos[0], error)
            else:
                self._again(photos[0])

    def _hand_back(self, link: Link) -> None:
        """End a process, and decode again what it had."""
        photos = link.kill()
        for photo in reversed(photos[1:]):
            self._again(photo)
        if photos and not photos[0].done.done():
            if error := photos[0].history.lost():
                fail(photos[0], error)
            else:
                self._again(photos[0])

    def _again(self, photo: Photo) -> None:
        if photo.pool is self and not photo.done.done():
            self.submit(photo, first=True)

    def _begin(self, link: Link, photo: Photo) -> None:
        if photo.memory_bytes:
            link.reserved_bytes = photo.memory_bytes
            self._reserved_bytes += photo.memory_bytes
        link.begin(photo)
        if not self._checking:
            self._check_later()

    def _release(self, link: Link) -> None:
        """A process holds no photo's memory any more; photos that have waited for it may begin."""
        self._reserved_bytes -= link.reserved_bytes
        link.reserved_bytes = 0
        while self._idle and (photo := self._next_waiting()):
            self._begin(self._idle.pop(), photo)

    def _fits(self, photo: Photo) -> bool:
        return (
            not photo.memory_bytes
            or not self._reserved_bytes
            or self._reserved_bytes + photo.memory_bytes <= self._memory_bytes
        )

    def _next_waiting(self) -> Photo | None:
        while (photo := self._queue.peek()) and self._fits(photo):
            self._queue.pop()
            if not self._owner.moves(self, photo):
                return photo
        return None

    def _overtake(self, longer_s: float) -> Photo | None:
        """A photo that waits behind another one, which has been decoded for longer than that. Both processes may then
        decode it, and the first one answers."""
        stuck_since = asyncio.get_running_loop().time() - longer_s
        for link in self._links:
            if link.next and link.since <= stuck_since:
                photo, link.next = link.next, None
                if not photo.done.done():
                    return photo
        return None

    def _fail_waiting(self, error: ServiceError) -> None:
        while photo := self._queue.pop():
            fail(photo, error.with_message(error.message))

    def _start_missing(self, paced: bool = False) -> None:
        if self._closed or self._pause or len(self._links) >= self._size:
            return
        if paced:
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._failed_starts, 10))
            self._pause = asyncio.get_running_loop().call_later(pause_s, self._resume, context=contextvars.Context())
            return
        wanted = len(self._queue) + sum(1 for link in self._links if link.photos)
        while len(self._links) < (self._size if self._all_wanted else min(self._size, wanted)):
            self._links.add(Link(self, self.command, self._side))
            if not self._checking:
                self._check_later()

    def _resume(self) -> None:
        self._pause = None
        self._start_missing()

    def _check_later(self) -> None:
        self._checking = asyncio.get_running_loop().call_later(CHECK_S, self._check, context=contextvars.Context())

    def _check(self) -> None:
        self._checking = None
        for link in [*self._links]:
            if link.is_stalled():
                log.error("a decoder was ended: it made no progress")
                self._hand_back(link)
        if any(link.photos or not link.ready for link in self._links):
            self._check_later()
