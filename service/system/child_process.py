"""A child process that never holds the event loop up: a thread of its own starts it and waits for its end."""

import asyncio
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress


class Child:
    """One child process. The callbacks run on the event loop that was running when it was made.

    Starting a process takes milliseconds, many of them on a busy machine, and a killed one that held a gigabyte takes a
    quarter of a second to end.

    Args:
        launch: starts the process; called on the thread.
        started: called once it runs.
        ended: called with its exit status, as `subprocess` counts it, or with the error that kept it from starting.
    """

    def __init__(
        self,
        launch: Callable[[], subprocess.Popen[bytes]],
        started: Callable[[], None],
        ended: Callable[[int | OSError], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._launch, self._started, self._ended = launch, started, ended
        self._lock = threading.Lock()  # between a kill and the start that it may come before
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._thread = threading.Thread(target=self._run, name="child", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the system lets this process have no more threads
            self._loop.call_soon(ended, OSError(str(error)))

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def kill(self) -> None:
        """End it as soon as possible, also before it has started."""
        with self._lock:
            self._killed = True
            if self._process:
                self._process.kill()

    def join(self, timeout_s: float) -> None:
        """Wait for its end, which blocks."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        # The child inherits the mask: it never gets these signals, not even in its first moments. A supervisor or a
        # terminal sends them to all processes, but a server that drains still needs its children.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        try:
            process = self._launch()
        except OSError as error:
            self._report(self._ended, error)
            return
        with self._lock:
            self._process = process
            if self._killed:
                process.kill()
        self._report(self._started)
        self._report(self._ended, process.wait())

    def _report(self, callback: Callable[..., None], *arguments: int | OSError) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(callback, *arguments)
