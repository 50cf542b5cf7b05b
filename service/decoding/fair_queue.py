"""A queue that shares decoding time fairly among requests: start-time fair queueing.

Every image has a virtual start time: its request's images follow one another at a distance of what each costs, and a
new request begins at the present. The image with the earliest start is next, so that a request with hundreds of images
delays another one by no more than one of them. (P. Goyal, H. Vin, H. Cheng: Start-time Fair Queueing, 1996.)

Pure state: no clock, no processes.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

FIRST = float("-inf")


@dataclass(slots=True, eq=False)
class Flow:
    """The images of one request.

    Attributes:
        ends: the request's deadline, by the event loop's clock.
        aside: called with how many images more, or fewer, wait for slow decoding.
        used_s: decoding time that its images have taken.
        decoded: images that have taken it.
        waiting: its images that wait for slow decoding.
    """

    ends: float = float("inf")
    aside: Callable[[int], None] = field(default=lambda _: None)
    used_s: float = 0.0
    decoded: int = 0
    waiting: int = 0


class Queued(Protocol):
    """What a queue needs to know of an image."""

    flow: Flow
    cost_s: float  # expected
    ticket: int  # of its place in the queue; 0: none


Item = TypeVar("Item", bound=Queued)


@dataclass(slots=True)
class _Backlog:
    """What one flow has in the queue."""

    finish: float
    count: int = 0
    work_s: float = 0.0


class FairQueue(Generic[Item]):
    """Images that wait for one kind of process."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Item]] = []  # entries that were discarded stay until they come up
        self._backlogs: dict[Flow, _Backlog] = {}
        self._now = 0.0  # in virtual time
        self._tickets = itertools.count(1)
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def put(self, item: Item, first: bool = False) -> None:
        """Queue an image, or put it before all others."""
        backlog = self._backlogs.get(item.flow)
        if backlog is None:
            backlog = self._backlogs[item.flow] = _Backlog(self._now)
        start = FIRST if first else max(self._now, backlog.finish)
        if not first:
            backlog.finish = start + item.cost_s
        backlog.count += 1
        backlog.work_s += item.cost_s
        item.ticket = next(self._tickets)
        self._live += 1
        heapq.heappush(self._heap, (start, item.ticket, item))

    def peek(self) -> Item | None:
        """The image that is next."""
        while self._heap:
            _, ticket, item = self._heap[0]
            if item.ticket == ticket:
                return item
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Item | None:
        """Take the image that is next."""
        item = self.peek()
        if item:
            start = heapq.heappop(self._heap)[0]
            # Virtual time passes also where each request has one image: else one with many would never have a turn.
            self._now = max(self._now, start) + item.cost_s / len(self._backlogs)
            self._remove(item)
        return item

    def discard(self, item: Item) -> None:
        """Take an image out, if it is in the queue."""
        if item.ticket:
            self._remove(item)
            if len(self._heap) > 2 * self._live + 100:
                self._heap = [entry for entry in self._heap if entry[2].ticket == entry[1]]
                heapq.heapify(self._heap)

    def wait_s(self, item: Item) -> float:
        """Decoding time of all that will come before the item's end, were it queued now."""
        backlog = self._backlogs.get(item.flow)
        own_s = (backlog.work_s if backlog else 0.0) + item.cost_s
        return own_s + sum(min(each.work_s, own_s) for flow, each in self._backlogs.items() if flow is not item.flow)

    def _remove(self, item: Item) -> None:
        item.ticket = 0
        self._live -= 1
        backlog = self._backlogs[item.flow]
        backlog.count -= 1
        backlog.work_s -= item.cost_s
        if not backlog.count:
            del self._backlogs[item.flow]
