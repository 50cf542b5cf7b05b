"""The gRPC server. It runs on the event loop of the HTTP server, and ends with it."""

import asyncio
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from rednet.service.api_keys import KeyFile
from rednet.service.grpc.calls import Call, Calls
from rednet.service.grpc.health import Health
from rednet.service.grpc.inference import InferenceService
from rednet.service.grpc.message_reader import MessageReader
from rednet.service.grpc.messages import SERVICE
from rednet.service.grpc.reflection import Reflection, read_request
from rednet.service.grpc.statuses import UnknownMethod
from rednet.service.parsing.memory_budget import MemoryBudget
from rednet.service.reloading import ReloadablePipeline
from rednet.service.settings import Settings

logger = logging.getLogger(__name__)

HEALTH_SERVICE = "grpc.health.v1.Health"
REFLECTION_SERVICE = "grpc.reflection.v1alpha.ServerReflection"
REFLECTION_SERVICES = (REFLECTION_SERVICE, "grpc.reflection.v1.ServerReflection")  # whose messages are the same
PUBLIC = ("ServerLive", "ServerReady")  # probes, which need no key, as over HTTP
UNMATCHED = "unmatched"
QUIET_TURNS, TURN_S = 10, 0.01
MAX_HOLD_S = 2.0


class GrpcServer:
    """Answers gRPC beside HTTP, from the same pipeline.

    Args:
        settings: limits on messages and deadlines.
        pipeline: started and closed by the HTTP server.
        budget: for the memory of messages, HTTP's included.
        keys: one of which a call must carry; None: calls need no key.
        addresses: where to listen.
        placeholders: sockets that are bound there. gRPC cannot take them over, and binds its own in their place.
            Without them, other processes of this server listen there, too, and the kernel distributes connections.
    """

    def __init__(
        self,
        settings: Settings,
        pipeline: ReloadablePipeline,
        budget: MemoryBudget,
        keys: KeyFile | None,
        addresses: Sequence[str],
        placeholders: Sequence[socket.socket] = (),
    ) -> None:
        self._options = [
            ("grpc.max_receive_message_length", settings.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0 if placeholders else 1),  # another server on the same port is an error
            # Identity only: a small compressed message can be a huge one, and photos are compressed already.
            ("grpc.compression_enabled_algorithms_bitset", 1),
        ]
        self._addresses, self._placeholders = addresses, placeholders
        self._reader = MessageReader(budget, settings.max_queue)
        self._inference = InferenceService(pipeline, self._reader)
        self._health = Health(pipeline, self._reader)
        self._reflection = Reflection([SERVICE, HEALTH_SERVICE, REFLECTION_SERVICE])
        self._calls = Calls(pipeline.metrics, keys, settings.request_timeout_s)
        self._has_reflection = settings.docs == "on"
        self._server: Any = None

    async def start(self) -> None:
        """Listen.

        Raises:
            RuntimeError: another process has taken the port meanwhile.
        """
        self._server = grpc.aio.server(options=self._options)
        self._server.add_generic_rpc_handlers(
            [_Methods(self._handlers(), self._calls.handler(UNMATCHED, _unknown, guarded=False))]
        )
        for each in self._placeholders:
            each.close()
        for address in self._addresses:
            self._server.add_insecure_port(address)
        await self._server.start()
        logger.info("running gRPC on %s", ", ".join(self._addresses))

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, and wait for the others.

        Args:
            grace_s: after which they are cancelled.
        """
        self._reader.close()
        self._health.close()
        self._reflection.close()
        # gRPC's core drops calls that it has received but not handed over when it shuts down, and those that arrive
        # before the clients know: their status is CANCELLED, which no client retries. Clients that wait for an answer
        # send no further call, so that there are hardly any such calls meanwhile.
        with self._calls.hold():
            await self._quiet(grace_s)
            stopping = asyncio.create_task(self._server.stop(grace_s))
            await self._quiet(grace_s)
        await stopping

    async def _quiet(self, timeout_s: float) -> None:
        """Wait until no call has come for a while: a tenth of a second, or longer where the event loop is slow."""
        ends = time.monotonic() + min(timeout_s, MAX_HOLD_S)
        turns = 0
        while turns < QUIET_TURNS and time.monotonic() < ends:
            held = self._calls.held
            await asyncio.sleep(TURN_S)
            turns = turns + 1 if self._calls.held == held else 0

    def _handlers(self) -> Mapping[str, Any]:
        """The handler of each method, by full name."""
        handlers = {}
        for name, answer in self._inference.methods.items():
            path, public = f"/{SERVICE}/{name}", name in PUBLIC
            handlers[path] = self._calls.handler(path, answer, guarded=not public, probe=public)
        path = f"/{HEALTH_SERVICE}/Check"
        handlers[path] = self._calls.handler(path, self._health.check, guarded=False, probe=True)
        handlers[f"/{HEALTH_SERVICE}/Watch"] = grpc.unary_stream_rpc_method_handler(self._health.watch)
        for service in REFLECTION_SERVICES if self._has_reflection else ():
            path = f"/{service}/ServerReflectionInfo"
            handlers[path] = grpc.stream_stream_rpc_method_handler(self._reflection.answer, read_request)
        return handlers


class _Methods:
    """A `grpc.GenericRpcHandler`: finds the handler of a method."""

    def __init__(self, handlers: Mapping[str, Any], unknown: Any) -> None:
        self._handlers = handlers
        self._unknown = unknown

    def service(self, details: Any) -> Any:
        return self._handlers.get(details.method, self._unknown)


async def _unknown(call: Call) -> bytes:
    raise UnknownMethod("the server has no such method; it serves " + SERVICE)
