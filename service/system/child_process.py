"""Runs a child process without blocking the event loop: a thread starts it and waits for its exit."""

import asyncio
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress


class Child:
    """One child process. Callbacks run on the event loop on which the object was created.

    Starting a process takes milliseconds, many of them on a busy machine, and a killed process that held a gigabyte
    takes a quarter of a second to exit.

    Args:
        launch: starts the process; called on the thread.
        on_start: called when the process runs.
        on_exit: called with the exit status in the format of `subprocess`, or with the error of a failed start.
    """

    def __init__(
        self,
        launch: Callable[[], subprocess.Popen[bytes]],
        on_start: Callable[[], None],
        on_exit: Callable[[int | OSError], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._launch, self._on_start, self._on_exit = launch, on_start, on_exit
        self._lock = threading.Lock()  # for a kill that comes before the start
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._thread = threading.Thread(target=self._run, name="child", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the process has reached its limit on threads
            self._loop.call_soon(on_exit, OSError(str(error)))

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def kill(self) -> None:
        """Kill the process as soon as possible, even if it has not started yet."""
        with self._lock:
            self._killed = True
            if self._process:
                self._process.kill()

    def join(self, timeout_s: float) -> None:
        """Block until the process has exited."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        # The child inherits the mask, so that it never receives these signals. Supervisors and terminals send them to
        # all processes, but a draining server still needs its children.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        try:
            process = self._launch()
        except OSError as error:
            self._report(self._on_exit, error)
            return
        with self._lock:
            self._process = process
            if self._killed:
                process.kill()
        self._report(self._on_start)
        self._report(self._on_exit, process.wait())

    def _report(self, callback: Callable[..., None], *arguments: int | OSError) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(callback, *arguments)
