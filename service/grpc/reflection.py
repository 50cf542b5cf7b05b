"""gRPC's reflection: lets clients without stubs, such as grpcurl, read the schemas."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha.reflection import aio
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest

from rednet.service.grpc.messages import POOL


class Reflection:
    """Answers calls of `grpc.reflection`: grpcio's own servicer, whose open streams can be ended.

    Args:
        services: to be listed.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self._servicer = aio.ReflectionServicer(services, POOL)
        self._streams: set[asyncio.Task[Any]] = set()

    async def answer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[bytes]:
        task = asyncio.current_task()
        assert task
        self._streams.add(task)
        try:
            async for response in self._servicer.ServerReflectionInfo(requests, context):
                yield response.SerializeToString()
        finally:
            self._streams.discard(task)

    def close(self) -> None:
        """End open streams, for which the end of the server would wait."""
        for task in self._streams:
            task.cancel()


def read_request(message: bytes) -> Any:
    """Parse a request. An empty one stands for one that is invalid; its answer says so."""
    try:
        return ServerReflectionRequest.FromString(message)
    except DecodeError:
        return ServerReflectionRequest()
