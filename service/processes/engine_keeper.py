"""Keeps the engine's process of one network running."""

import asyncio
import logging
import signal
import socket
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

from rednet.service.processes.child import Child
from rednet.service.processes.options import EngineOptions

logger = logging.getLogger(__name__)

MAX_FAILURES, FAILURES_S = 3, 60.0  # a process that ends so often in that time is not started again
END_S = 5.0  # how long a process may take to end


class EngineKeeper:
    """Starts the process, and starts it again when it ends. Front ends reach all of them at the same path: what they
    send waits in the socket, which is the supervisor's, until the next process accepts it.

    Args:
        path: of the unix socket.
        module: that is run.
        settings: those of the server that were given, as JSON.
        environment: variables of the process.
        hung_s: how long it may take for an answer.
    """

    def __init__(self, path: Path, module: str, settings: str, environment: Mapping[str, str], hung_s: float) -> None:
        self.path = str(path)
        self._folder = path.parent
        self._module, self._settings, self._environment, self._hung_s = module, settings, environment, hung_s
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(socket.SOMAXCONN)
        self._child: Child | None = None
        self._stopping = asyncio.Event()
        self.is_ready = asyncio.Event()

    @property
    def pid(self) -> int:
        """The process that was started last."""
        assert self._child is not None
        return self._child.pid

    async def keep(self) -> int:
        """Run until `stop`, or until the process cannot be kept running.

        Returns:
            The exit status for the server: of a process that never came up, and has said why; 1 if processes ended
            too often; otherwise 0.
        """
        failures: deque[float] = deque(maxlen=MAX_FAILURES)
        while not self._stopping.is_set():
            status = await self._run_once()
            if self._stopping.is_set():
                break
            assert self._child is not None
            if not self._child.is_up.is_set() and status > 0:
                return status
            failures.append(time.monotonic())
            logger.error("the engine's process %s", how_it_ended(status))
            if len(failures) == MAX_FAILURES and failures[-1] - failures[0] < FAILURES_S:
                logger.error("it has ended %d times within %.0f s: giving up", MAX_FAILURES, FAILURES_S)
                return 1
            if not self.is_ready.is_set():  # it has failed in warm-up, and would again
                return 1
        return 0

    async def stop(self) -> None:
        """Have the process end, and make `keep` return."""
        self._stopping.set()
        self._listener.close()
        if self._child is None:
            return
        self._child.stop()
        await asyncio.sleep(END_S)
        self._child.kill()

    async def _run_once(self) -> int:
        fd = self._listener.fileno()
        options = EngineOptions(settings=self._settings, listener=fd)
        self._child = await Child.start(self._module, options, [fd], self._environment, self._hung_s)
        if self._stopping.is_set():
            self._child.stop()
        readiness = asyncio.ensure_future(self._note_readiness(self._child))
        status = await self._child.wait()
        readiness.cancel()
        forget(self._child, self._folder)
        return status

    async def _note_readiness(self, child: Child) -> None:
        await child.is_ready.wait()
        self.is_ready.set()


def forget(child: Child, folder: Path) -> None:
    """Leave the gauges of a process that has ended out of the metrics. What it has counted stays.

    Args:
        child: that has ended.
        folder: with the metrics of all processes.
    """
    mark_process_dead(child.pid, folder)  # type: ignore[no-untyped-call]


def how_it_ended(status: int) -> str:
    """What an exit status means, as the end of a sentence."""
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
