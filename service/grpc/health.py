"""gRPC's health protocol, grpc.health.v1. Serving means what `/readyz` means over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from rednet.service.errors import MalformedRequest, NotFound
from rednet.service.grpc import statuses
from rednet.service.grpc.calls import Call
from rednet.service.grpc.message_reader import MessageReader
from rednet.service.grpc.messages import SERVICE, decode
from rednet.service.reloading import ReloadablePipeline
from rednet.service.types import State

SERVICES = ("", SERVICE)  # the server as a whole, and the service that has a state
WATCH_INTERVAL_S = 0.2


class Health:
    """Answers calls of `grpc.health.v1.Health`.

    Args:
        pipeline: whose state it reports.
        reader: for the messages.
    """

    def __init__(self, pipeline: ReloadablePipeline, reader: MessageReader) -> None:
        self._pipeline = pipeline
        self._reader = reader
        self._closed = False

    async def check(self, call: Call) -> bytes:
        request = await self._reader.read_small(call, HealthCheckRequest)
        if request.service not in SERVICES:
            raise NotFound(f"no such service: {request.service[:100]!r}; this server has {SERVICE!r}")
        response: bytes = HealthCheckResponse(status=self._status).SerializeToString()
        return response

    async def watch(self, message: bytes, context: Any) -> AsyncIterator[bytes]:
        """The status now, and whenever it changes."""
        try:
            known = decode(HealthCheckRequest, message).service in SERVICES
        except MalformedRequest as error:
            await context.abort(statuses.code(error), error.message, statuses.trailers(error))
        sent = None
        while not self._closed:
            status = self._status if known else HealthCheckResponse.SERVICE_UNKNOWN
            if status != sent:
                yield HealthCheckResponse(status=status).SerializeToString()
                sent = status
            await asyncio.sleep(WATCH_INTERVAL_S)

    def close(self) -> None:
        """End the calls that watch."""
        self._closed = True

    @property
    def _status(self) -> int:
        ready = self._pipeline.current.state is State.READY
        status: int = HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING
        return status
