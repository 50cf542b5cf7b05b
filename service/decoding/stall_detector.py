"""Detects worker processes that hang."""

import asyncio
import contextvars
import os
from collections.abc import Callable
from pathlib import Path

CHECK_S = 1.0  # between checks
MAX_STALLED_CHECKS = 4  # in a row, with less than a hundredth of a second of CPU time between them
MAX_CHECKS = 600  # per task, even if the process keeps using CPU time


class StallDetector:
    """Checks whether a process makes progress on its task, by the CPU time that it uses.

    Checks are counted, not time: while the server itself is stopped, it makes no checks.

    Args:
        task: returns what the process works on; None: nothing, and there is nothing to check.
        pid: returns the process; None: it has not been started yet.
        on_stall: called if the process hangs.
    """

    def __init__(
        self, task: Callable[[], object | None], pid: Callable[[], int | None], on_stall: Callable[[], None]
    ) -> None:
        self._task, self._pid, self._on_stall = task, pid, on_stall
        self._timer: asyncio.TimerHandle | None = None
        self._checked: object | None = None
        self._checks, self._stalled_checks, self._cpu_s = 0, 0, 0.0

    def start(self) -> None:
        """Check regularly until there is no task."""
        if not self._timer:
            self._timer = asyncio.get_running_loop().call_later(CHECK_S, self._check, context=contextvars.Context())

    def stop(self) -> None:
        if self._timer:
            self._timer.cancel()

    def _check(self) -> None:
        self._timer = None
        task, cpu_s = self._task(), _cpu_s(self._pid())
        if task is None:
            self._checked = None
            return
        if task is not self._checked:
            self._checked, self._checks, self._stalled_checks = task, 1, 0
        else:
            self._checks += 1
            self._stalled_checks = 0 if cpu_s is None or cpu_s > self._cpu_s else self._stalled_checks + 1
        self._cpu_s = cpu_s or 0.0
        if self._stalled_checks >= MAX_STALLED_CHECKS or self._checks > MAX_CHECKS:
            self._on_stall()
        else:
            self.start()


def _cpu_s(pid: int | None) -> float | None:
    """CPU time that a process has used, in seconds; None where it cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
