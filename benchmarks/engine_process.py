"""The engine's process alone, with the null model: load processes that do nothing else feed it from shared memory.

python -m benchmarks.engine_process [--seconds S] [--rounds N]

Together, the load processes have two full batches in flight: one that runs, and one that waits.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import numpy as np

from benchmarks.measure import report
from benchmarks.roles import process_cpu_s
from rednet.service.engine.messages import UINT8, Hello, Ready, Request, take_frame, take_replies
from rednet.service.engine.slots import SlotLayout, Slots
from rednet.service.processes.front_end import ask_hello
from rednet.service.processes.options import EngineOptions
from rednet.service.settings import Settings

BATCHES = (1, 8, 64)
LOADS = 2
READ_BYTES = 65_536
DEADLINE_S = 60.0
WARM_UP_S = 0.5


@contextmanager
def engine_process(batch: int) -> Iterator[tuple[int, str]]:
    """The engine's process for a batch size: its id, and the path of its socket."""
    with tempfile.TemporaryDirectory(prefix="rednet-") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/engine.sock"
        listener.bind(path)
        listener.listen()
        ours, theirs = socket.socketpair()
        options = EngineOptions(
            settings=Settings(max_batch_size=batch).model_dump_json(exclude_unset=True), listener=listener.fileno()
        ).with_start(theirs.fileno(), time.monotonic())
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.baselines.null_engine", options.to_json()],
            stderr=subprocess.DEVNULL,
            pass_fds=(listener.fileno(), theirs.fileno()),
            env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": folder},
        )
        theirs.close()
        try:
            yield process.pid, path
        finally:
            ours.close()  # which ends the process, as the end of its supervisor would
            process.wait()


def feed(path: str, in_flight: int, seconds: float) -> tuple[int, float]:
    """Keep images in flight for some time; returns how many were answered, and the mean size of their batches."""
    layout = SlotLayout.of(ask_hello(path).model)
    fd = Slots.allocate(layout, in_flight)
    pixels = Slots(layout, fd).pixels[UINT8]
    pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    received, answered, sizes = bytearray(), 0, 0
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [bytes([0])], [fd])
        for _ in (Hello, Ready):
            while take_frame(received) is None:
                received += connection.recv(READ_BYTES)
        free: Iterable[int] = range(in_flight)
        ends = time.monotonic() + seconds
        while (now := time.monotonic()) < ends:
            connection.sendall(b"".join(Request(slot, slot, UINT8, now + DEADLINE_S, None).pack() for slot in free))
            received += connection.recv(READ_BYTES)
            replies = list(take_replies(received))
            assert not any(reply.failed for reply in replies)
            free = [reply.id for reply in replies]
            answered += len(replies)
            sizes += sum(reply.batch_size for reply in replies)
    os.close(fd)
    return answered, sizes / answered


def measure(batch: int, seconds: float) -> dict[str, float]:
    """A row for a batch size."""
    with (
        engine_process(batch) as (pid, path),
        ProcessPoolExecutor(LOADS, multiprocessing.get_context("spawn")) as pool,
    ):
        list(pool.map(feed, [path] * LOADS, [batch] * LOADS, [WARM_UP_S] * LOADS))
        before_s = process_cpu_s(pid)
        answered, sizes = zip(*pool.map(feed, [path] * LOADS, [batch] * LOADS, [seconds] * LOADS), strict=True)
        cpu_s = (process_cpu_s(pid) - before_s) / sum(answered)
    return {
        "mean batch": statistics.mean(sizes),
        "photos/s": sum(answered) / seconds,
        "CPU us a photo": 1e6 * cpu_s,
        "one core carries photos/s": 1 / cpu_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    runs: dict[int, list[dict[str, float]]] = {batch: [] for batch in BATCHES}
    for _ in range(options.rounds):
        for batch in BATCHES:
            runs[batch].append(measure(batch, options.seconds))
    rows = [
        {"batch": batch} | {column: statistics.median(row[column] for row in own) for column in own[0]}
        for batch, own in runs.items()
    ]
    report("engine-process", f"the engine's process with the null model, fed by {LOADS} processes", rows)


if __name__ == "__main__":
    main()
