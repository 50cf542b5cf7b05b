"""CPU time of a server's processes, by what each of them does."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

# By a part of the command line of this project's processes, and by the name of others (`baselines.shared.set_role`).
COMMANDS = {
    "service.processes.front_end": "front end",
    "service.processes.engine": "engine",
    "baselines.null_engine": "engine",
    "service.decoding.worker": "decoder",
    "service.parsing.worker": "parser",
}
NAMES = {
    "decoder": "decoder",
    "engine": "engine",
    "front end": "front end",
    "mosec": "front end",
    "queues": "queues",
    "worker": "decoder and engine",
}


def descendants(pid: int) -> Sequence[int]:
    """The processes that a process has started, directly or not."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            with suppress(OSError):  # the thread has ended
                found += [int(child) for child in children.read_text().split()]
    return found[1:]


def cpu_s(root: int, role: str) -> Mapping[str, Sequence[float]]:
    """The CPU time so far of each process of a server, by role.

    Args:
        root: the process that has started the others.
        role: its own, and of those about which nothing is known.
    """
    found: dict[str, list[float]] = {}
    for pid in (root, *descendants(root)):
        with suppress(OSError):  # the process has ended
            found.setdefault(_role(pid) or role, []).append(process_cpu_s(pid))
    return found


def process_cpu_s(pid: int) -> float:
    """The CPU time so far of a process with all its threads, including those that have ended."""
    return time.clock_gettime(~pid << 3 | 2)  # the clock that clock_getcpuclockid(3) returns


def _role(pid: int) -> str | None:
    command = Path(f"/proc/{pid}/cmdline").read_text()
    by_command = next((role for part, role in COMMANDS.items() if part in command), None)
    return by_command or NAMES.get(Path(f"/proc/{pid}/comm").read_text().strip())
