"""A child process of the supervisor, and the connection to it.

Both sides send lines. The supervisor sends `stop`; `ping` now and then, which a child answers with `pong`; and to front
ends `reload PATH`, which they answer with `reloaded PATH`, or with `stayed PATH` if they could not switch to that
engine, or `reload_failed`, which they count. A child reports `up` when it has started, and an engine `ready` when it
takes images.

Children block signals that end a server: service managers and terminals send them to all processes at once, but front
ends drain before the engine ends.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from rednet.service.processes.options import ProcessOptions

PING_S = 1.0
LOAD_TIMEOUT_S = 600.0  # until a process is up: large checkpoints from slow disks take minutes


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Block what ends a server. A child inherits this, all its threads included."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Child(asyncio.Protocol):
    """A running process, which is killed when it stops answering.

    Args:
        process: that runs.
        hung_s: how long it may take for an answer.
    """

    def __init__(self, process: asyncio.subprocess.Process, hung_s: float) -> None:
        self.pid = process.pid
        self.is_up, self.is_ready = asyncio.Event(), asyncio.Event()
        self.reloads: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()  # the engine's path, and whether it is used
        self._process, self._hung_s = process, hung_s
        self._received = b""
        self._pinged_at: float | None = None  # when it was asked for an answer that is missing
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def start(
        cls, module: str, options: ProcessOptions, fds: Sequence[int], environment: Mapping[str, str], hung_s: float
    ) -> "Child":
        """Start a process.

        Args:
            module: that is run.
            options: for it, but for `control` and `started`.
            fds: descriptors that it inherits.
            environment: variables beside the supervisor's own.
            hung_s: how long it may take for an answer.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            text = options.with_start(theirs.fileno(), time.monotonic()).to_json()
            with _blocked_signals():
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",
                    "-m",
                    module,
                    text,
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno(), *fds],
                    env=os.environ | environment,
                )
        child = cls(process, hung_s)
        await asyncio.get_running_loop().create_unix_connection(lambda: child, sock=ours)
        return child

    def stop(self) -> None:
        """Ask the process to end, a front end when it has answered its requests; a second time, at once."""
        if self.is_up.is_set() and self._transport:
            self._transport.write(b"stop\n")
        else:  # it does not listen yet, and has nothing to lose
            self.kill()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    def reload(self, path: str) -> None:
        """Have a front end load its keys again, and switch to the engine at a path, unless it uses that already."""
        if self._transport:
            self._transport.write(f"reload {path}\n".encode())

    def reload_failed(self) -> None:
        """Have a front end count a checkpoint that could not be loaded: the supervisor has no metrics."""
        if self._transport:
            self._transport.write(b"reload_failed\n")

    async def wait(self) -> int:
        """Wait until the process has ended; returns its exit status, as `subprocess` has it."""
        watching = asyncio.ensure_future(self._watch())
        status = await self._process.wait()
        watching.cancel()
        if self._transport:
            self._transport.close()
        return status

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._pinged_at = None
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            match line.decode().split(" ", 1):
                case ["up"]:
                    self.is_up.set()
                case ["ready"]:
                    self.is_ready.set()
                case ["reloaded" | "stayed" as outcome, path]:
                    self.reloads.put_nowait((path, outcome == "reloaded"))

    async def _watch(self) -> None:
        """Kill the process when it does not answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                await self.is_up.wait()
            while self._pinged_at is None or time.monotonic() < self._pinged_at + self._hung_s:
                if self._pinged_at is None and self._transport:
                    self._pinged_at = time.monotonic()
                    self._transport.write(b"ping\n")
                await asyncio.sleep(PING_S)
        self.kill()
