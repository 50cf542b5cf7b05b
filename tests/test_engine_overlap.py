"""The engine with a device that computes by itself, as a GPU does: batches are launched behind one another."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from rednet.service.cost_table import CostTable
from rednet.service.errors import DeviceFailed, Internal
from rednet.service.types import DeviceLost, ExplainSpec, Inference, Pixels, RunnerOutput, Running, State
from tests.servers import PATIENCE_S, FakeRunner, wait_until
from tests.test_engine import running


@dataclass
class Ticket:
    """A batch on the device."""

    output: RunnerOutput
    error: Exception | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def done(self) -> bool:
        return self.over.is_set()

    def wait(self) -> RunnerOutput:
        assert self.over.wait(PATIENCE_S)
        if self.error:
            raise self.error
        return self.output


class Device(FakeRunner):
    """Never holds up the host. Every batch is thought to take `batch_s`, and does; with `held`, until the test says."""

    def __init__(self, batch_s: float = 0.05, room: int = 8, held: bool = False) -> None:
        super().__init__()
        self.batch_s, self.room, self.held = batch_s, room, held
        self.tickets: list[Ticket] = []

    def warm_up(self, begin: Callable[[float], None]) -> CostTable:
        return CostTable({1: self.batch_s, 8: self.batch_s}, self.max_batch_size)

    def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
        output = super().launch(pixels, specs).wait()
        ticket = Ticket(output, MemoryError() if len(pixels) > self.room else None)
        self.tickets.append(ticket)
        if not self.held:
            threading.Timer(self.batch_s, ticket.over.set).start()
        return ticket


def test_the_next_batch_is_launched_before_the_device_has_finished_one() -> None:
    """While it computes one it has another, never a third; every image gets its own answer."""
    device = Device(held=True)
    with running(device) as caller:
        ids = [caller.submit(value) for value in range(40)]
        for finished in range(4):
            wait_until(lambda finished=finished: len(device.tickets) == finished + 2, "a batch behind the other")  # type: ignore[misc]
            assert not device.tickets[finished].done()
            device.tickets[finished].over.set()
        device.held = False
        for ticket in device.tickets:
            ticket.over.set()
        outcomes = [caller.outcome(id_) for id_ in ids]
    for value, outcome in enumerate(outcomes):
        assert isinstance(outcome, Inference)
        assert outcome.logits.tolist() == [value] * 3


def test_a_batch_grows_until_the_device_wants_it() -> None:
    """Images that come while it computes share the next batch, instead of being launched one by one."""
    device = Device(batch_s=1.0)
    with running(device) as caller:
        first = caller.submit(1)
        assert device.running.wait(PATIENCE_S)
        ids = []
        for value in range(4):
            ids.append(caller.submit(value))
            time.sleep(0.02)
        for id_ in (first, *ids):
            assert isinstance(caller.outcome(id_), Inference)
        assert device.batches == [1, 4]


def test_a_batch_too_large_for_the_device_is_halved_once() -> None:
    """The engine remembers: later batches are no larger than what fitted."""
    device = Device(room=4)
    with running(device) as caller:
        ids = [caller.submit(value) for value in range(32)]
        outcomes = [caller.outcome(id_) for id_ in ids]
    assert all(isinstance(outcome, Inference) for outcome in outcomes)
    too_large = [size for size in device.batches if size > 4]
    assert len(too_large) <= 2  # the one that failed, and one that was launched behind it


def test_one_stall_is_soon_forgotten() -> None:
    """A device that once took a hundred times as long is noticed to be quick again, not waited for as long as that."""
    device = Device(batch_s=0.02)
    with running(device) as caller:
        assert isinstance(caller.outcome(caller.submit(0)), Inference)
        device.batch_s = 2.0
        assert isinstance(caller.outcome(caller.submit(0)), Inference)
        device.batch_s = 0.02
        for value in range(40):
            assert isinstance(caller.outcome(caller.submit(value)), Inference)
        assert caller.engine.slowdown < 2  # the stall alone would make it 21, and 2% less with each batch


def test_a_device_that_is_lost_ends_the_engine() -> None:
    """Nothing will run on it any more: whoever has a batch there is answered, and the process can be started anew."""

    class LostTicket:
        def done(self) -> bool:
            raise DeviceLost

        def wait(self) -> RunnerOutput:
            raise AssertionError

    class Lost(Device):
        def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
            return LostTicket()

    with running(Lost()) as caller:
        assert isinstance(caller.outcome(caller.submit(1)), DeviceFailed)
        wait_until(lambda: caller.engine.state is State.FAILED, "the failure")
        assert isinstance(caller.outcome(caller.submit(2)), DeviceFailed)


def test_stopping_waits_for_what_the_device_works_on() -> None:
    """A batch that was launched is answered."""
    device = Device()
    with running(device) as caller:
        id_ = caller.submit(7)
        assert device.running.wait(PATIENCE_S)
        caller.engine.stop()
        assert isinstance(caller.outcome(id_), Inference)


def test_whoever_tells_the_engine_nonsense_leaves_nobody_waiting() -> None:
    """When the engine itself fails, what is on the device and what is in the queue are both answered."""
    device = Device()
    with running(device) as caller:
        first = caller.submit(1)
        assert device.running.wait(PATIENCE_S)
        second = caller.engine.submit(np.zeros((3, 2, 2), np.uint8), None, caller.answers.setdefault(99, []).append)  # type: ignore[arg-type]
        wait_until(lambda: caller.engine.state is State.FAILED, "the failure")
        assert second is not None
        assert isinstance(caller.outcome(first), DeviceFailed)
        assert isinstance(caller.outcome(99), DeviceFailed)


@pytest.mark.parametrize("bad", [0, 3])
def test_a_failing_image_fails_alone(bad: int) -> None:
    """Also where it shows only when the device has run."""

    class Poisoned(Device):
        def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
            ticket = super().launch(pixels, specs)
            assert isinstance(ticket, Ticket)
            if any(image[0, 0, 0] == 66 for image in pixels):
                ticket.error = RuntimeError("a failure that the test asked for")
            return ticket

    device = Poisoned()
    with running(device) as caller:
        ids = [caller.submit(66 if index == bad else index) for index in range(4)]
        outcomes = [caller.outcome(id_) for id_ in ids]
        assert [isinstance(outcome, Internal) for outcome in outcomes] == [index == bad for index in range(4)]
