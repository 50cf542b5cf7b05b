"""Shares decode time fairly among requests: start-time fair queueing.

Every image has a virtual start time: that of the previous image of its request plus the cost of that image. The first
image of a new request starts at the current virtual time. The image with the earliest start time is next, so that a
request with hundreds of images delays another request by no more than one of them.
(P. Goyal, H. Vin, H. Cheng: Start-time Fair Queueing, 1996.)

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
        ends: deadline of the request, by the event loop's clock.
        on_set_aside: called with the change in the number of images that wait for slow decoding.
        used_s: decode time that the images have taken so far.
        decoded: number of images that have taken it.
        waiting: number of images that wait for slow decoding.
    """

    ends: float = float("inf")
    on_set_aside: Callable[[int], None] = field(default=lambda _: None)
    used_s: float = 0.0
    decoded: int = 0
    waiting: int = 0


class Queued(Protocol):
    """What the queue needs to know about an image."""

    flow: Flow
    cost_s: float  # expected decode time
    ticket: int  # identifies the entry in the queue; 0: not queued


Item = TypeVar("Item", bound=Queued)


@dataclass(slots=True)
class _Backlog:
    """The images of one flow that are queued."""

    finish: float  # virtual time at which the last one ends
    count: int = 0
    work_s: float = 0.0


class FairQueue(Generic[Item]):
    """The images that wait for one pool of workers."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Item]] = []  # discarded entries stay until they reach the top
        self._backlogs: dict[Flow, _Backlog] = {}
        self._now = 0.0  # virtual time
        self._tickets = itertools.count(1)
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def put(self, item: Item, first: bool = False) -> None:
        """Queue an image, ahead of all others if `first`."""
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
        """The next image, which stays queued."""
        while self._heap:
            _, ticket, item = self._heap[0]
            if item.ticket == ticket:
                return item
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Item | None:
        """Remove and return the next image."""
        item = self.peek()
        if item:
            start = heapq.heappop(self._heap)[0]
            # Virtual time also passes while every request has a single image. Otherwise a request with many images
            # would never have a turn.
            self._now = max(self._now, start) + item.cost_s / len(self._backlogs)
            self._remove(item)
        return item

    def discard(self, item: Item) -> None:
        """Remove an image, if it is queued."""
        if item.ticket:
            self._remove(item)
            if len(self._heap) > 2 * self._live + 100:
                self._heap = [entry for entry in self._heap if entry[2].ticket == entry[1]]
                heapq.heapify(self._heap)

    def wait_s(self, item: Item) -> float:
        """Decode time until the item would be finished if it were queued now, its own included."""
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
