"""The process of one front end: HTTP, parsing, decoding and rendering around a remote engine. Imports no torch.

python -m rednet.service.processes.front_end OPTIONS

OPTIONS is the JSON of `FrontEndOptions`.
"""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence

import uvicorn

from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.familiarity import Familiarity
from rednet.service.api_keys import KeyFile
from rednet.service.build import decode_limits, decoder_count
from rednet.service.decoding.decoder import Decoder
from rednet.service.engine.messages import ONLY_HELLO, Hello, take_frame
from rednet.service.engine.remote_client import RemoteClient
from rednet.service.http.app import create_app
from rednet.service.http.server import OtherServer, Server, uvicorn_config
from rednet.service.model_description import ModelBody
from rednet.service.observability import log, tracing
from rednet.service.observability.gpus import watch_gpus
from rednet.service.observability.metrics import Metrics
from rednet.service.pipeline import Pipeline
from rednet.service.processes.acceptor import Acceptor
from rednet.service.processes.board import LOG_LINES_DROPPED, SLOTS_IN_USE, Board, SharedCounts
from rednet.service.processes.options import FrontEndOptions
from rednet.service.reloading import ReloadablePipeline, reload_keys
from rednet.service.settings import Settings
from rednet.service.system.exit import run_process
from rednet.service.system.file_limit import raise_file_limit
from rednet.service.system.hangup import Hangups

logger = logging.getLogger("rednet.service.processes.front_end")  # not `__main__`

READ_BYTES = 65_536


class FrontEnd:
    """What one front end answers with, and the engine that it uses.

    Args:
        settings: the options of the server.
        options: of this front end.
        board: of the server.
        metrics: of this front end.
    """

    def __init__(self, settings: Settings, options: FrontEndOptions, board: Board, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._counts = SharedCounts(board, options.row)
        self._limits = decode_limits(settings, board.rows)
        self._decoders = decoder_count(settings, board.rows)
        self.engine = options.engine
        self.end: Callable[[], None] = lambda: None  # ends the front end; may be changed
        self._clients: Sequence[RemoteClient] = ()  # of the current engine, and of the one before or after it
        self.keys = KeyFile(settings.api_key_file) if settings.api_key_file else None
        self.pipeline = ReloadablePipeline(self._build(), self._build, metrics, self._counts)

    async def reload(self) -> bool:
        """Load the keys again, or switch to the engine that `engine` names by now; returns whether it is used."""
        wanted = self.engine
        if wanted != self.client.path:
            await self.pipeline.reload()
        elif self.keys is not None:
            await reload_keys(self.keys, self._metrics)
        return self.client.path == wanted

    @property
    def client(self) -> RemoteClient:
        """That of the current engine."""
        client = self.pipeline.current.client
        assert isinstance(client, RemoteClient)
        return client

    @property
    def slots_in_use(self) -> int:
        """Images that engines have, including cancelled ones."""
        return sum(client.slots_in_use for client in self._clients)

    def _end_for_other_model(self) -> None:
        logger.error("the engine's process serves another model than before: starting again")
        self.end()

    def _build(self) -> Pipeline:
        hello = ask_hello(self.engine)
        model = ModelBody.model_validate(hello.model)
        client = RemoteClient(self.engine, hello, self._settings.max_queue, self._counts, self._end_for_other_model)
        self._clients = (*self._clients[-1:], client)
        decoder = Decoder(Preprocess(**model.preprocess), self._limits, self._decoders)
        familiarity = Familiarity(hello.familiarity) if hello.familiarity is not None else None
        return Pipeline(model, client, decoder, self._metrics, familiarity)


class FrontEndServer(Server):
    """A `Server` that shares its sockets with others, obeys its supervisor, and ends with it.

    Args:
        config: of uvicorn.
        settings: the options of the server.
        options: of this front end.
        front_end: what it answers with.
        board: of the server.
        publish: called often, to tell the other front ends what has changed.
        other: a server beside this one.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        settings: Settings,
        options: FrontEndOptions,
        front_end: FrontEnd,
        board: Board,
        publish: Callable[[], None],
        other: OtherServer | None,
    ) -> None:
        super().__init__(config, front_end.pipeline, settings.drain_timeout_s, Hangups(), self._reload, other)
        self._options, self._front_end, self._board, self._publish = options, front_end, board, publish
        front_end.end = lambda: self.stop(signal.SIGTERM)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        loop = asyncio.get_running_loop()
        count = self.server_state.connections.__len__
        self._acceptors = [
            Acceptor(each, self.new_connection, count, self._board, self._options.row) for each in sockets or ()
        ]
        self._supervisor = _Supervisor(self.obey)
        connection = socket.socket(fileno=self._options.control)
        await loop.create_unix_connection(lambda: self._supervisor, sock=connection)
        self._supervisor.send("up")

    async def on_tick(self, counter: int) -> bool:
        self._publish()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self.close_port(())  # unless that has happened

    def close_port(self, sockets: Sequence[socket.socket]) -> None:
        for acceptor in self._acceptors:
            acceptor.close()
        super().close_port(sockets)

    def obey(self, command: str, argument: str) -> None:
        """Do what the supervisor says."""
        match command:
            case "ping":
                self._supervisor.send("pong")
            case "stop":
                self.stop(signal.SIGTERM)
            case "reload":
                self._front_end.engine = argument
                self.request_reload()
            case "reload_failed":
                self._front_end.pipeline.metrics.reloaded("checkpoint", "failed")
            case "gone":
                logger.error("the supervisor is gone")
                self.stop(signal.SIGTERM)

    async def _reload(self) -> None:
        engine = self._front_end.engine
        outcome = "reloaded" if await self._front_end.reload() else "stayed"
        self._supervisor.send(f"{outcome} {engine}")


class _Supervisor(asyncio.Protocol):
    """The connection to the supervisor; `child.py` has the protocol.

    Args:
        obey: called with each command and its argument, and with `gone` when the supervisor has died.
    """

    def __init__(self, obey: Callable[[str, str], None]) -> None:
        self._obey = obey
        self._received = b""

    def send(self, line: str) -> None:
        self._transport.write(f"{line}\n".encode())

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            command, _, argument = line.decode().partition(" ")
            self._obey(command, argument)

    def connection_lost(self, exc: Exception | None) -> None:
        self._obey("gone", "")


def ask_hello(path: str) -> Hello:
    """Wait until the engine's process has loaded the network, and return what it serves."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.send(bytes([ONLY_HELLO]))
        received = bytearray()
        while (content := take_frame(received)) is None:
            data = connection.recv(READ_BYTES)
            if not data:
                raise OSError("the engine's process has ended")
            received += data
    return Hello(**content)


def main() -> int:
    options = FrontEndOptions.from_json(sys.argv[1])
    settings = options.read_settings()
    writer = log.configure(settings.log_level, settings.log_format)
    tracing.configure()
    raise_file_limit()
    board, metrics = Board(options.board), Metrics()
    already_dropped = board.get(options.row, LOG_LINES_DROPPED)  # by the front end before this one

    def publish() -> None:
        board.set(options.row, LOG_LINES_DROPPED, already_dropped + writer.dropped)
        board.set(options.row, SLOTS_IN_USE, front_end.slots_in_use)

    metrics.watch_log(lambda: board.total(LOG_LINES_DROPPED))
    metrics.watch_slots(lambda: board.total(SLOTS_IN_USE))
    front_end = FrontEnd(settings, options, board, metrics)
    if gpus := front_end.client.hello.gpus:
        watch_gpus(metrics.registry, gpus)
    app = create_app(settings, front_end.pipeline, front_end.keys, board.rows)
    other: OtherServer | None = None
    if options.grpc:
        from rednet.service.grpc.server import GrpcServer  # noqa: PLC0415  (an extra)

        budget = app.state.current_context().budget
        other = GrpcServer(settings, front_end.pipeline, budget, front_end.keys, options.grpc)
    server = FrontEndServer(uvicorn_config(app, settings), settings, options, front_end, board, publish, other)
    server.run([socket.socket(fileno=fd) for fd in options.sockets])
    return server.exit_code


if __name__ == "__main__":
    run_process(main)
