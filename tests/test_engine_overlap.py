"""The engine with an asynchronous device, such as a GPU: the next batch is launched while one is running."""

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
class InFlightBatch:
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
    """Never blocks the host. Each batch takes `batch_s`, as the cost table predicts, or with `held` until the test ends
    it."""

    def __init__(self, batch_s: float = 0.05, room: int = 8, held: bool = False) -> None:
        super().__init__()
        self.batch_s, self.room, self.held = batch_s, room, held
        self.in_flight: list[InFlightBatch] = []

    def warm_up(self, begin: Callable[[float], None]) -> CostTable:
        return CostTable({1: self.batch_s, 8: self.batch_s}, self.max_batch_size)

    def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
        output = super().launch(pixels, specs).wait()
        batch = InFlightBatch(output, MemoryError() if len(pixels) > self.room else None)
        self.in_flight.append(batch)
        if not self.held:
            threading.Timer(self.batch_s, batch.over.set).start()
        return batch


def test_next_batch_is_launched_while_one_is_running() -> None:
    """The device has two batches at most, and every image gets its own result."""
    device = Device(held=True)
    with running(device) as caller:
        ids = [caller.submit(value) for value in range(40)]
        for finished in range(4):
            wait_until(lambda finished=finished: len(device.in_flight) == finished + 2, "a batch behind the other")  # type: ignore[misc]
            assert not device.in_flight[finished].done()
            device.in_flight[finished].over.set()
        device.held = False
        for batch in device.in_flight:
            batch.over.set()
        outcomes = [caller.outcome(id_) for id_ in ids]
    for value, outcome in enumerate(outcomes):
        assert isinstance(outcome, Inference)
        assert outcome.logits.tolist() == [value] * 3


def test_batch_is_not_launched_before_the_device_needs_it() -> None:
    """Images that arrive while the device is busy share the next batch instead of being launched one by one."""
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


def test_batch_size_is_reduced_after_running_out_of_memory() -> None:
    """Later batches are not larger than the one that fitted."""
    device = Device(room=4)
    with running(device) as caller:
        ids = [caller.submit(value) for value in range(32)]
        outcomes = [caller.outcome(id_) for id_ in ids]
    assert all(isinstance(outcome, Inference) for outcome in outcomes)
    too_large = [size for size in device.batches if size > 4]
    assert len(too_large) <= 2  # the batch that failed, and one that was launched behind it


def test_slowdown_estimate_recovers_after_one_stall() -> None:
    """After one batch that took a hundred times as long, the estimate soon follows the normal times."""
    device = Device(batch_s=0.02)
    with running(device) as caller:
        assert isinstance(caller.outcome(caller.submit(0)), Inference)
        device.batch_s = 2.0
        assert isinstance(caller.outcome(caller.submit(0)), Inference)
        device.batch_s = 0.02
        for value in range(40):
            assert isinstance(caller.outcome(caller.submit(value)), Inference)
        assert caller.engine.slowdown < 2  # the stall alone would make it 21, and each batch 2% less


def test_lost_device_fails_the_engine_and_its_batches() -> None:
    """No later batch can run on it: images in flight get an error, and the process can be restarted."""

    class LostBatch:
        def done(self) -> bool:
            raise DeviceLost

        def wait(self) -> RunnerOutput:
            raise AssertionError

    class Lost(Device):
        def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
            return LostBatch()

    with running(Lost()) as caller:
        assert isinstance(caller.outcome(caller.submit(1)), DeviceFailed)
        wait_until(lambda: caller.engine.state is State.FAILED, "the failure")
        assert isinstance(caller.outcome(caller.submit(2)), DeviceFailed)


def test_stop_waits_for_the_running_batch() -> None:
    """A launched batch is answered."""
    device = Device()
    with running(device) as caller:
        id_ = caller.submit(7)
        assert device.running.wait(PATIENCE_S)
        caller.engine.stop()
        assert isinstance(caller.outcome(id_), Inference)


def test_failure_of_the_engine_thread_answers_running_and_queued_images() -> None:
    """An invalid job makes the engine itself fail."""
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
def test_image_that_fails_on_the_device_does_not_fail_its_batch(bad: int) -> None:
    """The error appears only when the device has run."""

    class Poisoned(Device):
        def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
            batch = super().launch(pixels, specs)
            assert isinstance(batch, InFlightBatch)
            if any(image[0, 0, 0] == 66 for image in pixels):
                batch.error = RuntimeError("a failure that the test asked for")
            return batch

    device = Poisoned()
    with running(device) as caller:
        ids = [caller.submit(66 if index == bad else index) for index in range(4)]
        outcomes = [caller.outcome(id_) for id_ in ids]
        assert [isinstance(outcome, Internal) for outcome in outcomes] == [index == bad for index in range(4)]
