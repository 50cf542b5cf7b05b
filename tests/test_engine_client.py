"""Several engines behind one client."""

import asyncio
import time
from collections.abc import Callable

import numpy as np
import pytest

from rednet.service.cost_table import CostTable
from rednet.service.engine.batcher import Batcher
from rednet.service.engine.client import LocalClient
from rednet.service.engine.engine import Engine
from rednet.service.errors import Draining
from rednet.service.observability.metrics import DeviceEvents, Metrics
from rednet.service.types import Inference, State
from tests.servers import PATIENCE_S, FakeRunner, wait_until

FAR = 1e9
PIXELS = np.zeros((3, 2, 2), np.uint8)


class SlowRunner(FakeRunner):
    """Its device takes three times as long."""

    def warm_up(self, begin: Callable[[float], None]) -> CostTable:
        super().warm_up(begin)
        return CostTable({1: 0.03, 8: 0.24}, self.max_batch_size)


def client_of(*runners: FakeRunner) -> LocalClient:
    metrics = Metrics()
    engines = [
        Engine(lambda runner=runner: runner, Batcher(8), DeviceEvents(metrics, f"fake:{index}"))  # type: ignore[misc]
        for index, runner in enumerate(runners)
    ]
    return LocalClient(engines, 100)


async def _infer_beside_a_busy_device(client: LocalClient, busy: FakeRunner) -> None:
    busy.go_on.clear()
    deadline = time.monotonic() + PATIENCE_S
    held = asyncio.create_task(client.infer(PIXELS, deadline))  # all engines are idle, so the first one gets it
    await asyncio.sleep(0)
    for _ in range(5):
        await client.infer(PIXELS, deadline)  # answered before the next is sent, so not by the busy engine
    busy.go_on.set()
    await held
    await client.close()


def test_image_goes_to_the_engine_that_answers_first() -> None:
    """While one device is busy with a batch, the other one gets new images."""
    busy, free = FakeRunner(), FakeRunner()
    client = client_of(busy, free)
    client.start()
    wait_until(lambda: client.state is State.READY, "readiness")
    asyncio.run(_infer_beside_a_busy_device(client, busy))
    assert (busy.batches, free.batches) == ([1], [1] * 5)


def test_client_is_ready_with_all_engines_and_failed_with_any() -> None:
    """A server with a failed device must be restarted, whatever the state of the others."""
    slow, broken = FakeRunner(), FakeRunner()
    slow.warm.clear()
    client = client_of(slow, FakeRunner())
    client.start()
    assert client.state is State.STARTING
    slow.warm.set()
    wait_until(lambda: client.state is State.READY, "readiness")
    asyncio.run(client.close())

    def fail(begin: Callable[[float], None]) -> None:
        raise RuntimeError("a failure that the test asked for")

    broken.warm_up = fail  # type: ignore[method-assign,assignment]
    client = client_of(FakeRunner(), broken)
    client.start()
    wait_until(lambda: client.state is State.FAILED, "the failure")
    asyncio.run(client.close())


async def _close_with_a_hung_device(client: LocalClient) -> list[BaseException | Inference]:
    deadline = time.monotonic() + PATIENCE_S
    waiting = [asyncio.create_task(client.infer(PIXELS, deadline)) for _ in range(2)]
    await asyncio.sleep(0)
    await client.close()
    late = client.infer(PIXELS, deadline)  # its photo was being decoded
    return await asyncio.gather(*waiting, late, return_exceptions=True)


def test_close_with_a_hung_engine_rejects_waiting_and_later_images() -> None:
    """Each image gets its own error."""
    hanging = FakeRunner()
    client = client_of(hanging)
    client.start()
    wait_until(lambda: client.state is State.READY, "readiness")
    hanging.go_on.clear()
    outcomes = asyncio.run(_close_with_a_hung_device(client))
    hanging.go_on.set()
    assert all(isinstance(outcome, Draining) for outcome in outcomes)
    assert len({id(outcome) for outcome in outcomes}) == 3


def test_backlog_of_two_equal_devices_is_half_of_one() -> None:
    """The devices share the queue."""
    one, two = client_of(FakeRunner()), client_of(FakeRunner(), FakeRunner())
    for client in (one, two):
        client.start()
        wait_until(lambda client=client: client.state is State.READY, "readiness")  # type: ignore[misc]
        with client.admit(FAR) as permit:
            permit.hold(16)
            assert client.queue_depth == 16
            assert client.backlog_s == pytest.approx(0.16 if client is one else 0.08)
        assert client.backlog_s == 0
        asyncio.run(client.close())


def test_backlog_of_unequal_devices_counts_both() -> None:
    """Of 16 images the fast device takes twelve and the slow one four. A single image goes to the fast one."""
    for runners in ((FakeRunner(), SlowRunner()), (SlowRunner(), FakeRunner())):
        client = client_of(*runners)
        client.start()
        wait_until(lambda client=client: client.state is State.READY, "readiness")  # type: ignore[misc]
        with client.admit(FAR) as permit:
            permit.hold(16)
            assert client.backlog_s == pytest.approx(0.12)
        with client.admit(FAR) as permit:
            permit.hold(1)
            assert client.backlog_s == pytest.approx(0.01, rel=0.1)  # slightly changed by measured times
        asyncio.run(client.close())
