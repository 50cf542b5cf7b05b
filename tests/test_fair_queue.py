"""Fair shares of decoding time, as pure state."""

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
    """Although hundreds were there before it."""
    queue, large, single = FairQueue[Item](), Flow(), Flow()
    for _ in range(250):
        queue.put(Item(large))
    assert queue.pop() is not None
    queue.put(Item(single))
    order = [item.flow for item in drained(queue)]
    assert order.index(single) <= 1


def test_requests_share_time_by_cost_not_by_number() -> None:
    """While one image of three seconds is decoded, the other request decodes three of one second."""
    queue, slow, quick = FairQueue[Item](), Flow(), Flow()
    for _ in range(20):
        queue.put(Item(slow, 3.0))
        queue.put(Item(quick, 1.0))
    first = [queue.pop() for _ in range(16)]
    assert sum(item is not None and item.flow is slow for item in first) == 4


def test_large_request_is_served_while_single_images_keep_coming() -> None:
    """New requests come first, but not for ever."""
    queue, large = FairQueue[Item](), Flow()
    for _ in range(10):
        queue.put(Item(large))
    served = 0
    for _ in range(100):
        queue.put(Item(Flow()))
        item = queue.pop()
        served += item is not None and item.flow is large
    assert served == 10


def test_discarded_image_is_not_served_and_counts_no_more() -> None:
    """Thousands of them leave nothing behind."""
    queue, flow = FairQueue[Item](), Flow()
    stays = Item(flow)
    queue.put(stays)
    for _ in range(10_000):
        item = Item(Flow())
        queue.put(item)
        queue.discard(item)
        queue.discard(item)  # once more does not matter
    assert len(queue) == 1
    assert len(queue._heap) < 500
    assert queue.wait_s(Item(Flow())) == 2.0
    assert drained(queue) == [stays]


def test_image_put_first_is_next() -> None:
    """It has waited before."""
    queue = FairQueue[Item]()
    for _ in range(3):
        queue.put(Item(Flow()))
    again = Item(Flow())
    queue.put(again, first=True)
    assert queue.pop() is again


def test_predicted_wait_counts_of_other_requests_only_what_comes_first() -> None:
    """A request with a hundred seconds of work delays a single second by about one."""
    queue, large = FairQueue[Item](), Flow()
    for _ in range(100):
        queue.put(Item(large))
    assert queue.wait_s(Item(Flow())) == 2.0
    assert queue.wait_s(Item(large)) == 101.0
