"""A server's decoder processes, found in /proc, and what can happen to them."""

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROC = Path("/proc")


def decoder_pids(of: int) -> list[int]:
    """The decoders that a process has started; none where there is no /proc."""
    pids = sorted(int(entry.name) for entry in PROC.glob("[0-9]*"))
    return [pid for pid in pids if is_decoder(pid) and _parent(pid) == of]


def is_decoder(pid: int) -> bool:
    try:
        return b"rednet.service.decoding.worker" in (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False


def _parent(pid: int) -> int:
    try:
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@contextmanager
def killing_decoders(of: int, every_s: float, random_source: random.Random) -> Iterator[list[int]]:
    """Meanwhile one decoder after the other is killed; yields the list of those that were."""
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while not over.wait(every_s):
            if pids := decoder_pids(of):
                killed.append(random_source.choice(pids))
                with suppress(ProcessLookupError):
                    os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()
