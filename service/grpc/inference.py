"""The methods of the Open Inference Protocol: the same answers as `/v2` over HTTP."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from rednet.service import open_inference
from rednet.service.grpc.calls import Call
from rednet.service.grpc.infer_messages import encode_response, parse_request
from rednet.service.grpc.message_reader import MessageReader
from rednet.service.grpc.messages import message_class
from rednet.service.observability import log
from rednet.service.parsing.bodies import BodyLimits
from rednet.service.reloading import ReloadablePipeline
from rednet.service.server_timing import note_timing
from rednet.service.types import State

MAX_INLINE_BYTES = 1_000_000  # of a message that is parsed on the event loop: copying pixels takes time
MAX_UNCOUNTED_BYTES = 65_536  # of a response

ServerLiveResponse = message_class("ServerLiveResponse")
ServerReadyResponse = message_class("ServerReadyResponse")
ModelReadyRequest = message_class("ModelReadyRequest")
ModelReadyResponse = message_class("ModelReadyResponse")
ServerMetadataResponse = message_class("ServerMetadataResponse")
ModelMetadataRequest = message_class("ModelMetadataRequest")
ModelMetadataResponse = message_class("ModelMetadataResponse")


class InferenceService:
    """Answers calls of `inference.GRPCInferenceService`. Used from one event loop.

    Args:
        pipeline: for the images.
        reader: for the messages.
    """

    def __init__(self, pipeline: ReloadablePipeline, reader: MessageReader) -> None:
        self._pipeline = pipeline
        self._reader = reader

    @property
    def methods(self) -> Mapping[str, Callable[[Call], Awaitable[bytes]]]:
        """What answers each method."""
        return {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
        }

    async def _server_live(self, call: Call) -> bytes:
        return _serialized(ServerLiveResponse(live=self._pipeline.current.state is not State.FAILED))

    async def _server_ready(self, call: Call) -> bytes:
        return _serialized(ServerReadyResponse(ready=self._pipeline.current.state is State.READY))

    async def _model_ready(self, call: Call) -> bytes:
        request = await self._reader.read_small(call, ModelReadyRequest)
        pipeline = self._pipeline.current
        open_inference.check_model(pipeline.model, request.name, request.version)
        return _serialized(ModelReadyResponse(ready=pipeline.state is State.READY))

    async def _server_metadata(self, call: Call) -> bytes:
        return _serialized(
            ServerMetadataResponse(
                name=open_inference.SERVER,
                version=open_inference.server_version(),
                extensions=open_inference.EXTENSIONS,
            )
        )

    async def _model_metadata(self, call: Call) -> bytes:
        request = await self._reader.read_small(call, ModelMetadataRequest)
        model = self._pipeline.current.model
        open_inference.check_model(model, request.name, request.version)
        return _serialized(
            ModelMetadataResponse(
                name=model.name,
                versions=[open_inference.MODEL_VERSION],
                platform=open_inference.PLATFORM,
                inputs=[each._asdict() for each in open_inference.inputs(model)],
                outputs=[each._asdict() for each in open_inference.outputs(model)],
            )
        )

    async def _model_infer(self, call: Call) -> bytes:
        pipeline = self._pipeline.current  # whatever is loaded meanwhile
        model, limits = pipeline.model, BodyLimits.of(pipeline.client.max_images, pipeline.model.preprocess)
        with pipeline.admit(call.timeout_s) as admitted:
            async with self._reader.read(call) as message:
                if len(message) > MAX_INLINE_BYTES:
                    request = await asyncio.to_thread(parse_request, message, model, limits)
                else:
                    request = parse_request(message, model, limits)
                body, asked = request.body, request.body.infer
                assert asked
                log.note(images=len(body.images))
                answers = await pipeline.run(admitted, body.images, call.endpoint)
        started = time.monotonic()
        rows = await open_inference.output_rows(answers, asked, model)
        response = encode_response(model, asked.id, rows, request.raw)
        if len(response) > MAX_UNCOUNTED_BYTES:
            self._reader.hold_response(call, len(response))
        pipeline.metrics.stage("respond", time.monotonic() - started)
        call.trailers.append(("server-timing", note_timing(answers, model.precision)))
        return response


def _serialized(message: Any) -> bytes:
    serialized: bytes = message.SerializeToString()
    return serialized
