"""Fair scheduling of decode work, as pure state."""

from dataclasses import dataclass

from rednet.service.decoding.fair_queue import FairQueue, Flow


@dataclass(eq=False)
class Item:
    flow: Flow
    cost_s: float = 1.0
    ticket: int = 0


def drained(queue: FairQueue[Item]) -> list[Item]:
    items = []
    while item := queue.pop():
        items.append(item)
    return items


def test_request_with_one_image_waits_for_one_image_of_a_large_request() -> None:
    """It does not wait for the hundreds that were queued before it."""
    queue, large, single = FairQueue[Item](), Flow(), Flow()
    for _ in range(250):
        queue.put(Item(large))
    assert queue.pop() is not None
    queue.put(Item(single))
    order = [item.flow for item in drained(queue)]
    assert order.index(single) <= 1


def test_requests_share_decode_time_by_cost() -> None:
    """While one image of three seconds is decoded, the other request decodes three images of one second."""
    queue, slow, quick = FairQueue[Item](), Flow(), Flow()
    for _ in range(20):
        queue.put(Item(slow, 3.0))
        queue.put(Item(quick, 1.0))
    first = [queue.pop() for _ in range(16)]
    assert sum(item is not None and item.flow is slow for item in first) == 4


def test_large_request_is_served_while_single_images_keep_coming() -> None:
    """New requests have priority only for a limited time."""
    queue, large = FairQueue[Item](), Flow()
    for _ in range(10):
        queue.put(Item(large))
    served = 0
    for _ in range(100):
        queue.put(Item(Flow()))
        item = queue.pop()
        served += item is not None and item.flow is large
    assert served == 10


def test_discarded_image_is_neither_served_nor_counted() -> None:
    """Thousands of discarded images leave nothing behind."""
    queue, flow = FairQueue[Item](), Flow()
    stays = Item(flow)
    queue.put(stays)
    for _ in range(10_000):
        item = Item(Flow())
        queue.put(item)
        queue.discard(item)
        queue.discard(item)  # discarding twice has no effect
    assert len(queue) == 1
    assert len(queue._heap) < 500
    assert queue.wait_s(Item(Flow())) == 2.0
    assert drained(queue) == [stays]


def test_image_put_in_front_is_next() -> None:
    """It has waited before."""
    queue = FairQueue[Item]()
    for _ in range(3):
        queue.put(Item(Flow()))
    again = Item(Flow())
    queue.put(again, first=True)
    assert queue.pop() is again


def test_predicted_wait_counts_only_earlier_work_of_other_requests() -> None:
    """A request with a hundred seconds of work delays one second of another request's work by about one second."""
    queue, large = FairQueue[Item](), Flow()
    for _ in range(100):
        queue.put(Item(large))
    assert queue.wait_s(Item(Flow())) == 2.0
    assert queue.wait_s(Item(large)) == 101.0
