"""uvicorn with a drain."""

import asyncio
import gc
import logging
import math
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI

from rednet.service.http.connections import Connection
from rednet.service.reloading import ReloadablePipeline, Reloader
from rednet.service.settings import Settings
from rednet.service.system.hangup import Hangups
from rednet.service.system.listener import Listener
from rednet.service.system.sockets import url
from rednet.service.types import State

logger = logging.getLogger(__name__)

# How long a drain refuses requests at least, even with nothing to do: a client that is about to send another request
# over an open connection gets an answer that closes it, instead of a connection that breaks under the request.
MIN_DRAIN_S = 1.0

# How long new connections may take to send their first request after the port was closed: their clients are told to try
# again, instead of having the connection break under a request. A busy machine is slow to read it.
LAST_REQUESTS_S = 1.0

# Longer than proxies keep idle connections: the side that closes first must not be the one that cannot know whether a
# request is already on its way. nginx keeps them for 60 s.
KEEP_ALIVE_S = 75

POLL_S = 0.1


class OtherServer(Protocol):
    """The server of another protocol, which runs on the same event loop and drains with HTTP."""

    async def start(self) -> None: ...

    async def stop(self, grace_s: float) -> None:
        """Wait so long for calls in progress. May be called again meanwhile, to wait no longer."""


class Server(uvicorn.Server):
    """uvicorn with a drain and reloads.

    After SIGTERM or SIGINT the port stays open, and new requests are refused, until all admitted ones are answered. A
    second signal stops at once. SIGHUP reloads, or if it comes from a closed terminal drains as SIGTERM does.

    Args:
        config: of uvicorn.
        pipeline: what the application answers with.
        drain_timeout_s: time for admitted requests to be answered.
        hangups: receive SIGHUP.
        reload: what to do then; it must not raise.
        other: a server beside this one.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        pipeline: ReloadablePipeline,
        drain_timeout_s: float,
        hangups: Hangups,
        reload: Callable[[], Awaitable[None]],
        other: OtherServer | None = None,
    ) -> None:
        super().__init__(config)
        self._other = other
        self._pipeline = pipeline
        self._drain_timeout_s = drain_timeout_s
        self._hangups = hangups
        self._reloader = Reloader(reload)
        self._drain_since: float | None = None
        self._signal: int | None = None  # that began the drain, until it is logged
        self._min_drain_s = MIN_DRAIN_S
        self._failed = False
        self._last: list[Listener] = []  # kept while the connections that they accepted are opening

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        gc.collect()
        gc.freeze()  # a million objects that stay: traversing them again and again would delay requests
        super().run(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._other:
            await self._other.start()
        self._hangups.serving = True
        for each in sockets or ():
            logger.info("running on %s (press Ctrl-C to quit)", url(each))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain_since is None:
            self._signal = sig
        self.stop(sig)

    def stop(self, sig: int) -> None:
        """Drain; a second time, stop at once. Before startup has ended, `sig` does what it does by default."""
        if not self.started:  # nothing has been admitted, and startup may take long
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        elif self._drain_since is None:
            self._begin_drain()
        else:
            self.should_exit = self.force_exit = True

    def request_reload(self) -> None:
        """Reload soon."""
        self._reloader.request()

    def _begin_drain(self) -> None:
        if self._pipeline.state is State.STARTING:  # nothing has been admitted
            self._min_drain_s = 0.0
        self._drain_since = time.monotonic()
        self._pipeline.begin_drain()

    async def on_tick(self, counter: int) -> bool:
        if self._pipeline.state is State.FAILED:
            self._failed = True  # for good: a device that hung may recover while the server stops
            await self._close()  # requests that wait for a hung engine would keep the server running
            self.config.timeout_graceful_shutdown = 1
            return True
        if self._drain_since is None:
            match self._hangups.take():
                case "end":
                    self._begin_drain()
                case "reload":
                    self.request_reload()
        else:
            if self._signal is not None:  # not logged by the handler, which may have interrupted the log
                message = "%s: new requests are refused; requests still to be answered: %d"
                logger.info(message, signal.Signals(self._signal).name, self._pipeline.requests)
                self._signal = None
            await self._reloader.stop()
            drained_s = time.monotonic() - self._drain_since
            left_s = self._drain_timeout_s - drained_s
            if left_s <= 0 or (drained_s >= self._min_drain_s and not self._pipeline.requests):
                await self._close()  # fails what is still waiting
                self.config.timeout_graceful_shutdown = max(1, math.ceil(left_s))  # for answers still being sent
                return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._drain_since is not None and self._min_drain_s and not self.force_exit:
            self.close_port(sockets or ())
            for _ in range(round(LAST_REQUESTS_S / POLL_S)):
                if self.force_exit or not self._new_connections():
                    break
                await asyncio.sleep(POLL_S)
        if self._other is None:
            await super().shutdown(sockets)
            return
        grace_s = self.config.timeout_graceful_shutdown or MIN_DRAIN_S  # for answers still being sent, as for HTTP
        stopping = asyncio.create_task(self._other.stop(grace_s))
        await super().shutdown(sockets)
        while not stopping.done():
            if self.force_exit:  # by now, perhaps: a second signal must not wait
                await self._other.stop(0.0)
            await asyncio.wait([stopping], timeout=POLL_S)
        await stopping

    def close_port(self, sockets: Sequence[socket.socket]) -> None:
        """Accept no more connections than those that wait already."""
        self._last = [Listener(each, self.new_connection) for each in sockets]
        for listener in self._last:
            listener.accept_all()
        for server in self.servers:
            server.close()
        for each in sockets:
            each.close()

    def _new_connections(self) -> bool:
        """Whether there are connections whose clients have not sent a request yet."""
        connections = self.server_state.connections
        return any(each.opening for each in self._last) or any(
            isinstance(each, Connection) and each.is_new for each in connections
        )

    def new_connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state)

    async def _close(self) -> None:
        await self._reloader.stop()
        await self._pipeline.close()

    @property
    def exit_code(self) -> int:
        return 1 if self.force_exit or self._failed else 0


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Connection,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        log_config=None,
        access_log=False,
        server_header=False,
        headers=[("X-Content-Type-Options", "nosniff")],  # of every answer
        proxy_headers=settings.forwarded_allow_ips is not None,  # for the access log
        forwarded_allow_ips=settings.forwarded_allow_ips,
    )
