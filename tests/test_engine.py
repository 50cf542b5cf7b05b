"""The engine thread, with a runner that waits or fails on demand."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from rednet.service.engine.batcher import Batcher
from rednet.service.engine.engine import Engine
from rednet.service.engine.transfer import Finished
from rednet.service.errors import (
    Cancelled,
    DeadlineExceeded,
    DeviceFailed,
    Draining,
    Internal,
    NumericalOverflow,
    ServiceError,
)
from rednet.service.types import ExplainSpec, Inference, KernelSums, Pixels, RunnerOutput, Running, State
from tests.servers import FakeRunner, wait_until

FAR = 1e9


class Events:
    """Records the events of the engine."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.dropped_images = 0

    def batch_done(self, queue_s: Sequence[float], inference_s: float, starved_s: float) -> None:
        assert min(*queue_s, inference_s, starved_s) >= 0
        self.batches.append(len(queue_s))

    def dropped(self, stage: str, count: int) -> None:
        assert stage == "queue"
        self.dropped_images += count


class Caller:
    """Submits images and collects the results."""

    def __init__(self, engine: Engine, events: Events) -> None:
        self.engine, self.events = engine, events
        self.answers: dict[int, list[Inference | ServiceError]] = {}

    def submit(self, value: int, deadline: float = FAR, explain: ExplainSpec | None = None) -> int:
        answers: list[Inference | ServiceError] = []
        job_id = self.engine.submit(np.full((3, 2, 2), value, np.uint8), deadline, answers.append, explain)
        self.answers[job_id] = answers
        return job_id

    def outcome(self, job_id: int) -> Inference | ServiceError:
        wait_until(lambda: bool(self.answers[job_id]), "an answer")
        assert len(self.answers[job_id]) == 1
        return self.answers[job_id][0]


@contextmanager
def running(runner: FakeRunner, max_wait_s: float = 0.0) -> Iterator[Caller]:
    events = Events()
    engine = Engine(lambda: runner, Batcher(8, max_wait_s), events)
    engine.start()
    try:
        yield Caller(engine, events)
    finally:
        runner.warm.set()
        runner.go_on.set()
        engine.stop(10)


def busy_then(
    runner: FakeRunner, caller: Caller, values: Sequence[int], deadline: float = FAR, explain: ExplainSpec | None = None
) -> list[int]:
    """Queue images while the device is busy with another one."""
    runner.go_on.clear()
    runner.running.clear()
    caller.submit(0)
    assert runner.running.wait(10)
    return [caller.submit(value, deadline, explain) for value in values]


def test_queued_images_share_a_batch_when_the_device_becomes_free() -> None:
    """The first image runs alone. Those that arrive meanwhile run together, each with its own result."""
    runner = FakeRunner()
    with running(runner) as caller:
        ids = busy_then(runner, caller, [10, 20, 30])
        runner.go_on.set()
        outcomes = [caller.outcome(id_) for id_ in ids]
        assert runner.batches == [1, 3]
        for value, outcome in zip((10, 20, 30), outcomes, strict=True):
            assert isinstance(outcome, Inference)
            assert outcome.logits.tolist() == [value] * 3
            assert outcome.batch_size == 3
        wait_until(lambda: caller.events.batches == [1, 3], "the events")
        assert 0 < caller.engine.slowdown < 1  # these batches took less than the 10 ms per image of the cost table


def test_failing_image_does_not_fail_its_batch() -> None:
    """Seven of eight images are answered when one makes the network fail."""
    runner = FakeRunner()
    runner.fail_on = lambda pixels: any(image[0, 0, 0] == 66 for image in pixels)
    with running(runner) as caller:
        ids = busy_then(runner, caller, [1, 2, 3, 66, 5, 6, 7, 8])
        runner.go_on.set()
        outcomes = [caller.outcome(id_) for id_ in ids]
        assert [isinstance(outcome, Inference) for outcome in outcomes] == [True] * 3 + [False] + [True] * 4
        assert isinstance(outcomes[3], Internal)
        assert isinstance(caller.outcome(caller.submit(9)), Inference)


def test_result_with_too_few_rows_is_an_internal_error() -> None:
    """The rows of a runner that returns fewer rows than images are not used as results."""

    class Wrong(FakeRunner):
        def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
            logits = np.zeros((len(pixels), 3), np.float32)
            return Finished(RunnerOutput(logits[1:], logits))

    with running(Wrong()) as caller:
        assert isinstance(caller.outcome(caller.submit(1)), Internal)


@pytest.mark.parametrize("where", ["logits", "features", "grid"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_row_that_is_not_finite_fails_alone_without_another_run(where: str, value: float) -> None:
    """The second image of three overflows: its caller gets an error, the others get their results."""

    class Overflowing(FakeRunner):
        def launch(self, pixels: Sequence[Pixels], specs: Mapping[int, ExplainSpec]) -> Running:
            output = super().launch(pixels, specs).wait()
            output = output._replace(features=output.features.copy())
            for index, image in enumerate(pixels):
                if image[0, 0, 0] == 66:
                    rows = {"logits": output.logits, "features": output.features}
                    grid = np.full((2, 2), value, np.float32)
                    if where == "grid":
                        output = output._replace(grids={**output.grids, index: grid})
                    else:
                        rows[where][index, 1] = value
            return Finished(output)

    runner = Overflowing()
    with running(runner) as caller:
        ids = busy_then(runner, caller, [10, 66, 30], explain=KernelSums(0))
        runner.go_on.set()
        first, failed, last = [caller.outcome(id_) for id_ in ids]
        assert isinstance(failed, NumericalOverflow)
        for outcome, expected in ((first, 10), (last, 30)):
            assert isinstance(outcome, Inference)
            assert outcome.logits.tolist() == [expected] * 3
        assert runner.batches == [1, 3]


def test_image_whose_deadline_has_passed_is_not_run() -> None:
    """The deadline passes in the queue, and the image is answered with the error."""
    runner = FakeRunner()
    with running(runner) as caller:
        (late,) = busy_then(runner, caller, [1], deadline=time.monotonic() + 0.05)
        time.sleep(0.1)
        runner.go_on.set()
        assert isinstance(caller.outcome(late), DeadlineExceeded)
        assert runner.batches == [1]
        assert caller.events.dropped_images == 1


def test_cancelled_image_is_not_run() -> None:
    """Its caller gets no result, and the rest of its batch runs."""
    runner = FakeRunner()
    with running(runner) as caller:
        first, second = busy_then(runner, caller, [1, 2])
        caller.engine.cancel(first)
        runner.go_on.set()
        assert isinstance(caller.outcome(second), Inference)
        assert runner.batches == [1, 1]
        assert isinstance(caller.outcome(first), Cancelled)
        wait_until(lambda: caller.events.dropped_images == 1, "the event")


def test_single_image_waits_only_for_the_batching_window() -> None:
    """By default there is no window."""
    with running(FakeRunner()) as caller:
        outcome = caller.outcome(caller.submit(1))
        assert isinstance(outcome, Inference)
        at_once_s = outcome.queue_s
    with running(FakeRunner(), max_wait_s=0.3) as caller:
        outcome = caller.outcome(caller.submit(1))
        assert isinstance(outcome, Inference)
        assert at_once_s < 0.3 <= outcome.queue_s


def test_deadline_before_the_end_of_the_batching_window_is_met() -> None:
    """`--max-wait-ms` may be longer than the time to the deadline: an idle device answers in time."""
    with running(FakeRunner(), max_wait_s=30.0) as caller:
        outcome = caller.outcome(caller.submit(1, time.monotonic() + 1.0))
        assert isinstance(outcome, Inference)
        assert 0.3 < outcome.queue_s < 1


def test_stop_answers_running_queued_and_later_images() -> None:
    """Running images get their results. Queued and later images get the error `Draining`."""
    runner = FakeRunner()
    with running(runner) as caller:
        waiting = busy_then(runner, caller, [1, 2])
        stopper = threading.Thread(target=caller.engine.stop)
        stopper.start()
        runner.go_on.set()
        stopper.join(10)
        for id_ in waiting:
            assert isinstance(caller.outcome(id_), Inference | Draining)
        assert isinstance(caller.outcome(caller.submit(3)), Draining)


def test_engine_state_is_failed_if_the_model_does_not_load() -> None:
    """Callers get an error instead of waiting."""

    def load() -> FakeRunner:
        raise RuntimeError("no such weights")

    engine = Engine(load, Batcher(8), Events())
    caller = Caller(engine, Events())
    early = caller.submit(1)
    engine.start()
    wait_until(lambda: engine.state is State.FAILED, "the failure")
    assert isinstance(caller.outcome(early), DeviceFailed)
    assert isinstance(caller.outcome(caller.submit(2)), DeviceFailed)


def test_engine_is_ready_after_warm_up() -> None:
    """Images that arrive earlier wait."""
    runner = FakeRunner()
    runner.warm.clear()
    with running(runner) as caller:
        early = caller.submit(1)
        time.sleep(0.05)
        assert caller.engine.state is State.STARTING
        assert not caller.answers[early]
        runner.warm.set()
        assert isinstance(caller.outcome(early), Inference)
        wait_until(lambda: caller.engine.state is State.READY, "readiness")
