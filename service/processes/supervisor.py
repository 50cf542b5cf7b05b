"""The supervisor of a server of several processes. It starts them, replaces those that end, and ends them in order.
Imports no torch.

    supervisor   holds the listening sockets
      engine     torch, the devices and the batches
      front_end  several: HTTP, parsing, decoding, rendering
"""

import asyncio
import itertools
import logging
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rednet.service.observability import log
from rednet.service.processes.board import ACCEPTED, CONNECTIONS, SLOTS_IN_USE, Board
from rednet.service.processes.child import Child
from rednet.service.processes.engine_keeper import EngineKeeper, forget, how_it_ended
from rednet.service.processes.options import FrontEndOptions
from rednet.service.reloading import Reloader
from rednet.service.settings import Settings
from rednet.service.system.hangup import Hangups
from rednet.service.system.memory import available_bytes, resident_bytes
from rednet.service.system.sockets import grpc_addresses, url

logger = logging.getLogger(__name__)

ENGINE = "rednet.service.processes.engine"
FRONT_END = "rednet.service.processes.front_end"
HUNG_S = 30.0
POLL_S = 0.1  # how often SIGHUP is looked for
QUICK_S, PAUSE_S = 5.0, 1.0  # a front end that ends so early is started again after a pause


class Supervisor:
    """Runs a server of several processes.

    Args:
        settings: the options.
        sockets: bound; all front ends accept connections from them.
        front_ends: how many there are.
        hangups: receive SIGHUP.
        grpc: addresses at which all front ends listen for gRPC.
        hung_s: a process that does not answer for so long is replaced.
        engine: the module of the engine's process.
    """

    def __init__(
        self,
        settings: Settings,
        sockets: Sequence[socket.socket],
        front_ends: int,
        hangups: Hangups,
        grpc: Sequence[str],
        hung_s: float,
        engine: str = ENGINE,
    ) -> None:
        self._settings = settings.model_dump_json(exclude_unset=True)
        self._sockets = sockets
        self._count, self._engine_module, self._hung_s = front_ends, engine, hung_s
        self._hangups, self._grpc = hangups, grpc
        self._folder = Path(tempfile.mkdtemp(prefix="rednet-"))
        self._environment = {"PROMETHEUS_MULTIPROC_DIR": str(self._folder)}
        self._numbers = itertools.count(1)  # of engines
        self._board_fd = Board.allocate(front_ends)
        self._board = Board(self._board_fd)
        self._front_ends: dict[int, Child] = {}  # by their row on the board
        self._not_up = set(range(front_ends))  # rows of front ends that have not been up yet
        self._stopping = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        """Run until a signal ends the server, or until it cannot go on; returns the exit status."""
        self._hangups.log_if_ignored()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        self._engine = self._new_engine()
        self._keeping = asyncio.ensure_future(self._keep_engine(self._engine))
        reloader = Reloader(self._reload)
        hangups = asyncio.ensure_future(self._watch_hangups(reloader))
        await asyncio.gather(*(self._keep_front_end(row) for row in range(self._count)))
        hangups.cancel()
        await reloader.stop()
        await _stop_engine(self._engine, self._keeping)
        shutil.rmtree(self._folder, ignore_errors=True)
        return self._status

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._stopping.is_set():
            message = "%s: new requests are refused; images still to be answered: %d"
            logger.info(message, number.name, self._board.total(ACCEPTED))
        self._stop()

    def _stop(self) -> None:
        """Have all front ends drain; a second time, have them end at once."""
        self._stopping.set()
        for each in self._sockets:  # so that the port closes with the last front end: nothing else would answer
            each.close()
        for child in self._front_ends.values():
            child.stop()

    def _fail(self, status: int) -> None:
        if not self._stopping.is_set():
            self._status = status
            self._stop()

    def _new_engine(self) -> EngineKeeper:
        path = self._folder / f"engine-{next(self._numbers)}.sock"
        return EngineKeeper(path, self._engine_module, self._settings, self._environment, self._hung_s)

    async def _keep_engine(self, engine: EngineKeeper) -> None:
        status = await engine.keep()
        if engine is self._engine and status:
            self._fail(status)

    async def _keep_front_end(self, row: int) -> None:
        while not self._stopping.is_set():
            started = time.monotonic()
            child = await self._start_front_end(row)
            announcing = asyncio.ensure_future(self._announce(row, child))
            status = await child.wait()
            announcing.cancel()
            del self._front_ends[row]
            forget(child, self._folder)
            for column in (ACCEPTED, CONNECTIONS, SLOTS_IN_USE):
                self._board.set(row, column, 0)
            if self._stopping.is_set():
                if status and child.is_up.is_set():
                    self._status = self._status or 1
            elif not child.is_up.is_set() and status > 0:  # it has said why
                self._fail(status)
            else:
                logger.error("a front end %s; starting another one", how_it_ended(status))
                if time.monotonic() - started < QUICK_S:
                    await asyncio.sleep(PAUSE_S)

    async def _start_front_end(self, row: int) -> Child:
        options = FrontEndOptions(
            settings=self._settings,
            engine=self._engine.path,
            sockets=[each.fileno() for each in self._sockets],
            grpc=self._grpc,
            board=self._board_fd,
            row=row,
        )
        child = await Child.start(
            FRONT_END, options, [*options.sockets, self._board_fd], self._environment, self._hung_s
        )
        self._front_ends[row] = child
        if self._stopping.is_set():
            child.stop()
        return child

    async def _announce(self, row: int, child: Child) -> None:
        """Log where the server listens, once all front ends do."""
        await child.is_up.wait()
        if self._not_up == {row}:
            self._hangups.serving = True
            for each in self._sockets:
                logger.info("running on %s (press Ctrl-C to quit)", url(each))
        self._not_up.discard(row)

    async def _watch_hangups(self, reloader: Reloader) -> None:
        while True:
            match self._hangups.take():
                case "end":
                    self._stop()
                case "reload":
                    reloader.request()
            await asyncio.sleep(POLL_S)

    async def _reload(self) -> None:
        """Load keys and checkpoint again. Front ends switch to another engine when it is ready."""
        logger.info("SIGHUP: loading the API keys and the checkpoint again")
        for child in self._front_ends.values():
            child.reload(self._engine.path)  # the keys only
        needed, available = resident_bytes(self._engine.pid), available_bytes()
        if available is not None and needed > available:
            self._reload_failed(
                f": one more needs about {needed / 1e6:.0f} MB, and {available / 1e6:.0f} are available; "
                "a restart would load it alone"
            )
            return
        old, new = (self._engine, self._keeping), self._new_engine()
        keeping = asyncio.ensure_future(self._keep_engine(new))
        try:
            readiness = asyncio.ensure_future(new.is_ready.wait())
            await asyncio.wait([readiness, keeping], return_when=asyncio.FIRST_COMPLETED)
            if not new.is_ready.is_set():
                readiness.cancel()
                self._reload_failed()
                return
            self._engine, self._keeping = new, keeping
            await asyncio.gather(*(self._switch(row, new.path) for row in list(self._front_ends)))
            logger.info("the previous network has answered its last request")
        finally:
            unused = (new, keeping) if self._engine is not new else old
            await _stop_engine(*unused)

    def _reload_failed(self, reason: str = "") -> None:
        logger.error("the checkpoint was not loaded, the previous network stays%s", reason)
        for child in self._front_ends.values():
            child.reload_failed()

    async def _switch(self, row: int, path: str) -> None:
        """Have a front end switch to an engine; returns when it has answered all requests to the one before."""
        child = self._front_ends[row]
        child.reload(path)
        while self._front_ends.get(row) is child:  # one that ends is replaced by one that uses the new engine
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    engine, is_used = await child.reloads.get()
                if engine == path and is_used:
                    return
                if engine == path:
                    logger.error("a front end could not switch to the network, and is replaced")
                    child.stop()


async def _stop_engine(engine: EngineKeeper, keeping: "asyncio.Future[None]") -> None:
    stopping = asyncio.ensure_future(engine.stop())
    await keeping
    stopping.cancel()


def supervise(
    settings: Settings,
    sockets: Sequence[socket.socket],
    front_ends: int,
    hangups: Hangups,
    grpc_sockets: Sequence[socket.socket] = (),
    engine: str = ENGINE,
) -> int:
    """Run a server of several processes, and return its exit status.

    Args:
        settings: the options.
        sockets: bound; all front ends accept connections from them.
        front_ends: how many there are.
        hangups: receive SIGHUP.
        grpc_sockets: bound; closed, as every front end binds its own to listen for gRPC.
        engine: the module of the engine's process.
    """
    log.configure(settings.log_level, settings.log_format)
    grpc = grpc_addresses(grpc_sockets)
    for each in grpc_sockets:
        each.close()
    return asyncio.run(Supervisor(settings, sockets, front_ends, hangups, grpc, HUNG_S, engine).run())
