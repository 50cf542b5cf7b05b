"""Requests that carry images: reads the body while the client is connected, and has the images answered."""

import asyncio
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect, Request

from rednet.service.errors import DeadlineExceeded, MalformedRequest
from rednet.service.observability import log
from rednet.service.parsing.bodies import BodyFormat, BodyLimits, EmbeddingOptions, InferOptions, ParsedBody
from rednet.service.parsing.body_file import BodyFile
from rednet.service.parsing.body_reader import BodyReader
from rednet.service.parsing.memory_budget import MemoryBudget
from rednet.service.parsing.parser import Parser, max_heap_bytes
from rednet.service.pipeline import Answer, Pipeline
from rednet.service.settings import Settings
from rednet.service.types import ExplainSpec

TIMEOUT_HEADER = b"x-request-timeout-ms"
MAX_TIMEOUT_MS = 3_600_000
MAX_DIGITS = 10  # of a timeout
MAX_ARRIVAL_S = 60.0  # for a body, even with a later deadline: an upload takes memory from others


class Answers(NamedTuple):
    """The results for one request.

    Attributes:
        images: in order.
        infer: what else an infer request asks for; None for others.
        embeddings: what else an embeddings request asks for; None for others.
        ignored: the names of those parts of a form that are not images.
    """

    images: Sequence[Answer]
    infer: InferOptions | None
    embeddings: EmbeddingOptions | None
    ignored: Sequence[str]


class ImageRequests:
    """Answers requests that carry images.

    Args:
        settings: limits on bodies and deadlines.
        pipeline: for the images; the limits on bodies follow from its network.
        parser: for the bodies.
        budget: for the memory of all bodies.
    """

    def __init__(self, settings: Settings, pipeline: Pipeline, parser: Parser, budget: MemoryBudget) -> None:
        self._timeout_s = settings.request_timeout_s
        self._pipeline = pipeline
        self._reader = BodyReader(settings.max_body_bytes, budget)
        self._parser = parser
        self._limits = BodyLimits.of(pipeline.client.max_images, pipeline.model.preprocess)

    async def answer(
        self,
        request: Request,
        body_format: BodyFormat,
        explain: ExplainSpec | None = None,
        draw: bool = False,
        check: Callable[[ParsedBody], None] | None = None,
    ) -> Answers:
        """Answer every image of a request.

        Args:
            request: its body has not been read.
            body_format: how to parse the body.
            explain: the map to compute for each image.
            draw: draw the map over the image; the request must then hold one image.
            check: called with the parsed body, before time is spent on its images; may raise a `ServiceError`.

        Raises:
            ServiceError: the request as a whole is refused.
            ClientDisconnect: the client left; what was being done for it was dropped.
        """
        headers = dict(request.scope["headers"])
        timeout_s = self._asked_timeout_s(headers) or self._timeout_s
        arrival_s = min(timeout_s, max(MAX_ARRIVAL_S, self._timeout_s))
        body = self._reader.read(request.stream(), headers, max_heap_bytes(body_format), arrival_s)
        with self._pipeline.admit(timeout_s) as admitted:  # refuse before the body is read
            async with body as read, _WhileConnected(request):
                parsed = await self._parse(body_format, read, admitted.ends)
                log.note(images=len(parsed.images))
                if check:
                    check(parsed)
                if draw and len(parsed.images) > 1:
                    raise MalformedRequest(
                        f"a picture explains one image, not {len(parsed.images)}; for several, Accept: application/json"
                    )
                endpoint: str = request.scope["route"].path
                answers = await self._pipeline.run(admitted, parsed.images, endpoint, explain, draw)
        return Answers(answers, parsed.infer, parsed.embeddings, parsed.ignored)

    def has_short_deadline(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the client gave a request less time than the server would have."""
        try:
            return (self._asked_timeout_s(headers) or self._timeout_s) < self._timeout_s
        except MalformedRequest:
            return False

    def _asked_timeout_s(self, headers: Mapping[bytes, bytes]) -> float | None:
        asked = headers.get(TIMEOUT_HEADER)
        if asked is None:
            return None
        if not (asked.isdigit() and len(asked) < MAX_DIGITS and 1 <= int(asked) <= MAX_TIMEOUT_MS):
            shown = repr(asked[:MAX_DIGITS].decode("latin-1"))
            raise MalformedRequest(
                f"X-Request-Timeout-Ms must be whole milliseconds from 1 to {MAX_TIMEOUT_MS}, not {shown}"
            )
        return int(asked) / 1000

    async def _parse(self, body_format: BodyFormat, body: bytes | BodyFile, ends: float) -> ParsedBody:
        if parsed := self._parser.parse_quickly(body_format, body, self._limits):
            return parsed
        try:
            async with asyncio.timeout_at(ends):
                return await self._parser.parse(body_format, body, self._limits)
        except TimeoutError:
            raise DeadlineExceeded("no answer before the deadline") from None


class _WhileConnected:
    """Cancels what runs inside as soon as the client disconnects, and raises `ClientDisconnect`. The body must have
    been read: the next message can then only be a disconnect."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._disconnected = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._receiving = asyncio.ensure_future(self._request.receive())
        self._receiving.add_done_callback(self._on_disconnect)

    def _on_disconnect(self, receiving: "asyncio.Future[MutableMapping[str, Any]]") -> None:
        if not receiving.cancelled():
            self._disconnected = True
            self._task.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._receiving.remove_done_callback(self._on_disconnect)
        self._receiving.cancel()
        if self._disconnected and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise ClientDisconnect from None
