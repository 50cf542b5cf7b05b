"""What front ends and the engine's process share, without processes."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rednet.service.engine.admission import Admission
from rednet.service.engine.messages import (
    CANCEL,
    FLOAT32,
    UINT8,
    Hello,
    Ready,
    Request,
    frame,
    take_frame,
    take_requests,
)
from rednet.service.engine.remote_client import FIRST_START_S, RemoteClient
from rednet.service.engine.slots import MAX_ERROR_BYTES, SlotLayout, Slots
from rednet.service.errors import DeadlineExceeded, Internal, NotReady, Overloaded
from rednet.service.processes.acceptor import Acceptor
from rednet.service.processes.board import Board, SharedCounts
from rednet.service.processes.counts import front_end_count
from rednet.service.processes.engine import EngineHost
from rednet.service.settings import Settings
from rednet.service.types import ClassActivation, ExplainSpec, Inference, KernelSums, Pixels, State
from tests.servers import PATIENCE_S, FakeRunner, fake_network

LAYOUT = SlotLayout(side=5, classes=3, features=7)
FAR = 1e9


@pytest.mark.parametrize("explain", [None, ClassActivation(), ClassActivation(2), KernelSums(3), KernelSums(0, 5)])
@pytest.mark.parametrize("kind", [UINT8, FLOAT32, CANCEL])
def test_requests_arrive_as_they_were_sent(kind: int, explain: ExplainSpec | None) -> None:
    """Also where two of them arrive in pieces."""
    request = Request(4_294_967_295, 319, kind, 12345.678, explain)
    data = request.pack() * 2
    received = bytearray(data[:-1])
    assert list(take_requests(received)) == [request]
    received += data[-1:]
    assert list(take_requests(received)) == [request]
    assert not received


def test_frames_are_taken_when_they_are_complete() -> None:
    content = Ready({"1": 0.5, "8": 2.0}, 8, 3.0)
    data = frame(content)
    assert take_frame(bytearray(data[:3])) is None
    assert take_frame(bytearray(data[:-1])) is None
    received = bytearray(data + b"rest")
    assert take_frame(received) == {"seconds": {"1": 0.5, "8": 2.0}, "max_batch_size": 8, "start_s": 3.0}
    assert received == b"rest"


def test_slots_are_the_same_memory_in_both_processes() -> None:
    """And the parts of a slot do not overlap: what is written to one changes no other."""
    fd = Slots.allocate(LAYOUT, 4)
    ours, theirs = Slots(LAYOUT, fd), Slots(LAYOUT, fd)
    rng = np.random.default_rng(0)
    for slot in range(4):
        ours.pixels[FLOAT32][slot] = rng.random((3, 5, 5))
        theirs.logits[slot] = slot
        theirs.features[slot] = 10 + slot
        theirs.grid(slot, 2, 2)[:] = 20 + slot
        theirs.write_error(slot, f"code {slot}")
    rng = np.random.default_rng(0)
    for slot in range(4):
        assert np.array_equal(theirs.pixels[FLOAT32][slot], rng.random((3, 5, 5)).astype(np.float32))
        assert (ours.logits[slot] == slot).all()
        assert (ours.features[slot] == 10 + slot).all()
        assert (ours.grid(slot, 2, 2) == 20 + slot).all()
        assert ours.read_error(slot) == f"code {slot}"
    ours.pixels[UINT8][1] = 200
    assert (theirs.pixels[UINT8][1] == 200).all()
    assert theirs.pixels[UINT8][1].shape == (3, 5, 5)
    os.close(fd)


def test_the_text_of_an_error_is_cut_to_its_place() -> None:
    fd = Slots.allocate(LAYOUT, 1)
    slots = Slots(LAYOUT, fd)
    slots.write_error(0, "x" * 5000)
    assert slots.read_error(0) == "x" * MAX_ERROR_BYTES
    slots.write_error(0, "short")
    assert slots.read_error(0) == "short"
    os.close(fd)


def test_slots_that_could_shrink_are_refused() -> None:
    """A front end that shrank them would kill the engine's process."""
    fd = os.memfd_create("slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, LAYOUT.slot_bytes)
    with pytest.raises(ValueError, match="not sealed"):
        Slots(LAYOUT, fd)
    os.close(fd)


def test_the_queue_is_full_for_all_front_ends_together() -> None:
    fd = Board.allocate(2)
    first, second = (Admission(4, lambda images: 0.1 * images, counts=SharedCounts(Board(fd), row)) for row in range(2))
    with first.admit(FAR) as one, second.admit(FAR) as other:
        one.hold(3)
        assert first.accepted == second.accepted == 3
        other.hold(1)
        with pytest.raises(Overloaded):
            first.admit(FAR)
        one.release(1)
        second.admit(FAR).__exit__(None)
    assert first.accepted == second.accepted == 0
    assert first.offered_s == second.offered_s > 0.4
    os.close(fd)


def test_closing_an_acceptor_accepts_the_connections_that_wait() -> None:
    """With the port, they would be reset, and requests that they carry already would be lost."""

    async def opened_connections(listener: socket.socket, waiting: int) -> None:
        fd = Board.allocate(1)
        opened: asyncio.Queue[asyncio.Protocol] = asyncio.Queue()

        def new_protocol() -> asyncio.Protocol:
            protocol = asyncio.Protocol()
            opened.put_nowait(protocol)
            return protocol

        acceptor = Acceptor(listener, new_protocol, lambda: 0, Board(fd), 0)
        clients = [socket.create_connection(listener.getsockname()) for _ in range(waiting)]
        acceptor.close()
        listener.close()
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(waiting):
                await opened.get()
        for client in clients:
            client.close()
        os.close(fd)

    asyncio.run(opened_connections(socket.create_server(("127.0.0.1", 0)), 5))


@pytest.mark.parametrize(
    ("options", "cores", "gpus", "expected"),
    [
        ({}, 2, 0, 1),
        ({}, 8, 0, 1),
        ({}, 64, 0, 6),
        ({}, 16, 1, 7),
        ({"device": "cuda"}, 16, 0, 7),
        ({"device": "cpu"}, 16, 1, 1),
        ({"frontends": 3}, 2, 0, 3),
        ({"frontends": 1}, 64, 8, 1),
    ],
)
def test_number_of_front_ends(options: dict[str, object], cores: int, gpus: int, expected: int) -> None:
    assert front_end_count(Settings.model_validate(options), cores, gpus) == expected


class Host:
    """The engine's process as a thread, around a runner of the test's own."""

    def __init__(self, path: Path, runner: FakeRunner) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        control, theirs = socket.socketpair()
        self._sockets = (listener, control, theirs)
        self._host = EngineHost(Settings(), fake_network(runner), time.monotonic())
        self._thread = threading.Thread(target=self._host.run, args=(listener, theirs))
        self._thread.start()

    def stop(self) -> None:
        self._host.stop()
        self._thread.join(PATIENCE_S)
        for each in self._sockets:
            each.close()


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def path(tmp_path: Path, runner: FakeRunner) -> Iterator[Path]:
    host = Host(tmp_path / "engine.sock", runner)
    yield tmp_path / "engine.sock"
    runner.go_on.set()
    host.stop()


def client_at(path: Path) -> RemoteClient:
    hello = take_frame(bytearray(frame(Hello(fake_network(FakeRunner()).description.model_dump(), 1, {}))))
    assert hello is not None
    fd = Board.allocate(1)
    return RemoteClient(str(path), Hello(**hello), 8, SharedCounts(Board(fd), 0), lambda: None)


async def ready(client: RemoteClient) -> None:
    client.start()
    async with asyncio.timeout(PATIENCE_S):
        while client.state is not State.READY:  # noqa: ASYNC110  (there is no event to wait for)
            await asyncio.sleep(0.01)


def image(value: int) -> Pixels:
    return np.full((3, 32, 32), value, np.uint8)


async def _ask(client: RemoteClient) -> None:
    await ready(client)
    deadline = time.monotonic() + PATIENCE_S
    found = await asyncio.gather(*(client.infer(image(value), deadline) for value in range(5)))
    assert [each.logits.tolist() for each in found] == [[value] * 3 for value in range(5)]
    explained = await client.infer(image(7), deadline, KernelSums(0))
    assert explained.grid is not None
    assert explained.grid.tolist() == [[0, 1], [2, 3]]
    assert client.slots_in_use == 0
    await client.close()


def test_images_are_answered_through_slots(path: Path) -> None:
    asyncio.run(_ask(client_at(path)))


async def _fail(client: RemoteClient, runner: FakeRunner) -> None:
    await ready(client)
    runner.fail_on = lambda _: True
    with pytest.raises(Internal, match="internal error"):
        await client.infer(image(1), time.monotonic() + PATIENCE_S)
    with pytest.raises(DeadlineExceeded, match="deadline"):
        await client.infer(image(1), time.monotonic() - 1)
    assert client.slots_in_use == 0
    await client.close()


def test_errors_of_the_engine_cross_with_their_messages(path: Path, runner: FakeRunner) -> None:
    asyncio.run(_fail(client_at(path), runner))


async def _leave(client: RemoteClient, runner: FakeRunner) -> None:
    await ready(client)
    deadline = time.monotonic() + PATIENCE_S
    runner.go_on.clear()
    running = asyncio.ensure_future(client.infer(image(1), deadline))
    await asyncio.to_thread(runner.running.wait, PATIENCE_S)
    waiting = [asyncio.ensure_future(client.infer(image(2), deadline)) for _ in range(4)]
    await asyncio.sleep(0)
    assert client.slots_in_use == 5
    for each in (running, *waiting):
        each.cancel()
    await asyncio.gather(running, *waiting, return_exceptions=True)
    assert client.slots_in_use == 5  # the engine may still read them
    runner.go_on.set()
    async with asyncio.timeout(PATIENCE_S):
        while client.slots_in_use:  # noqa: ASYNC110  (as above)
            await asyncio.sleep(0.01)
    assert runner.batches == [1]
    await client.close()


def test_slots_of_cancelled_images_come_back_from_the_engine(path: Path, runner: FakeRunner) -> None:
    asyncio.run(_leave(client_at(path), runner))


async def _wait_in_vain(client: RemoteClient) -> None:
    client.start()
    deadline = time.monotonic() + FIRST_START_S + 0.3
    with pytest.raises(NotReady, match="restarted"):  # at once: no process is expected to be ready in time
        await client.infer(image(1), deadline - 0.4)
    with pytest.raises(NotReady, match="restarted"):
        await client.infer(image(1), deadline)
    assert deadline - 0.3 < time.monotonic()
    assert client.slots_in_use == 0
    await client.close()


def test_images_that_no_process_takes_are_refused_before_their_deadline(tmp_path: Path) -> None:
    asyncio.run(_wait_in_vain(client_at(tmp_path / "engine.sock")))


async def _crowd(client: RemoteClient, runner: FakeRunner) -> None:
    """More cancelled images than there are slots."""
    await ready(client)
    deadline = time.monotonic() + PATIENCE_S
    runner.go_on.clear()
    tasks = [asyncio.ensure_future(client.infer(image(1), deadline)) for _ in range(client.slots.count)]
    await asyncio.sleep(0.1)
    with pytest.raises(Overloaded, match="still running"):
        await client.infer(image(1), deadline)
    runner.go_on.set()
    assert all(isinstance(each, Inference) for each in await asyncio.gather(*tasks))
    await client.close()


def test_images_without_a_slot_are_refused(path: Path, runner: FakeRunner) -> None:
    asyncio.run(_crowd(client_at(path), runner))
