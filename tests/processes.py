"""A server's processes, found in /proc, and what can happen to them."""

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROC = Path("/proc")


def descendants(of: int) -> list[int]:
    """The processes that a process has started, and those that they have; none where there is no /proc."""
    pids = sorted(int(entry.name) for entry in PROC.glob("[0-9]*"))
    parents = {pid: _parent(pid) for pid in pids}
    found = {of}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {of})


def decoder_pids(of: int) -> list[int]:
    """The decoders of a server: those that it has started, or its front ends have."""
    front_ends = [pid for pid in module_pids(of, "front_end") if _parent(pid) == of]
    return [pid for pid in descendants(of) if is_decoder(pid) and _parent(pid) in (of, *front_ends)]


def module_pids(of: int, module: str) -> list[int]:
    """The processes of a server that run a module of `rednet.service.processes`."""
    return [pid for pid in descendants(of) if f"rednet.service.processes.{module}".encode() in _command(pid)]


def memory_mb(of: int) -> float:
    """Resident memory of a server's processes in MB, without decoders: theirs depends on the last photo."""
    pages = 0
    for pid in (of, *descendants(of)):
        with suppress(OSError):
            if not is_decoder(pid):
                pages += int((PROC / str(pid) / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def is_decoder(pid: int) -> bool:
    return b"rednet.service.decoding.worker" in _command(pid)


def _command(pid: int) -> bytes:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""


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
