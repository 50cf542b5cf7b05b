"""One request's journey: body -> encoded images -> pixels -> answers, before its deadline, while its caller waits."""

import asyncio
import re
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from starlette.requests import ClientDisconnect, Request

from rednet.service.decoding.decoder import Decoded, Decoder, Drawn
from rednet.service.decoding.fair_queue import Flow
from rednet.service.errors import DeadlineExceeded, MalformedRequest, ServiceError
from rednet.service.observability import log
from rednet.service.observability.metrics import Metrics
from rednet.service.parsing.bodies import BodyFormat, InferOptions, ParsedBody, Upload
from rednet.service.parsing.body_file import BodyFile
from rednet.service.parsing.body_reader import Intake
from rednet.service.parsing.memory_budget import MemoryBudget
from rednet.service.parsing.parser import Parser, in_heap
from rednet.service.settings import Settings
from rednet.service.types import EngineClient, ExplainSpec, Inference, Place

TIMEOUT_HEADER = b"x-request-timeout-ms"
LONGEST_TIMEOUT_MS = 3_600_000
MAX_DIGITS = 10  # of a timeout: longer numbers are not even looked at
ARRIVAL_S = 60.0  # for a body to arrive, where its caller would wait for longer: meanwhile it takes room from others
REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # fit for a header, and for a line of the log
STARTED_AT_ONCE = 16  # images of one request; the event loop sees to others before the next ones


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one image."""

    outcome: Inference | ServiceError
    decode_s: float
    drawn: Drawn | None = None


class Answers(NamedTuple):
    """What came of one request."""

    images: Sequence[Answer]  # in order
    infer: InferOptions | None  # what else the body asked for, where it was an infer request
    ignored: Sequence[str]  # the names of those parts of a form that are not images


@dataclass(frozen=True, slots=True)
class _Job:
    """What is the same for all images of a request."""

    ends: float  # by the event loop's clock
    deadline: float  # by `time.monotonic()`
    explain: ExplainSpec | None
    draw: bool
    flow: Flow


class Journey:
    """Takes requests that carry images to their answers.

    Args:
        settings: limits on bodies and deadlines.
        client: the engine.
        decoder: for the images.
        parser: for large bodies.
        budget: for the memory of all bodies.
        metrics: told of every image.
    """

    def __init__(
        self,
        settings: Settings,
        client: EngineClient,
        decoder: Decoder,
        parser: Parser,
        budget: MemoryBudget,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._intake = Intake(settings.max_body_bytes, budget)
        self._parser = parser
        self._client = client
        self._decoder = decoder
        self._metrics = metrics

    async def answers(
        self, request: Request, body_format: BodyFormat, explain: ExplainSpec | None = None, draw: bool = False
    ) -> Answers:
        """An answer for every image of the request.

        Args:
            request: its body has not been read.
            body_format: how the body is to be parsed.
            explain: what each answer is to hold besides.
            draw: that over the photo, as a picture; the request must then hold one image.

        Raises:
            ServiceError: there is none for the request as a whole.
            ClientDisconnect: the caller left; what was being done for them was dropped.
        """
        headers = dict(request.scope["headers"])
        timeout_s = self._timeout_s(headers.get(TIMEOUT_HEADER))
        ends = asyncio.get_running_loop().time() + timeout_s
        deadline = time.monotonic() + timeout_s
        place = self._client.admit(deadline)
        arrival_s = min(timeout_s, max(ARRIVAL_S, self._settings.request_timeout_s))
        arriving = self._intake.body(request.stream(), headers, in_heap(body_format), arrival_s)
        with place as held:  # refuse before the body is read
            async with arriving as body, _WhileConnected(request):
                parsed = await self._parsed(body_format, body, ends)
                uploads = parsed.images
                log.note(images=len(uploads))
                if draw and len(uploads) > 1:
                    raise MalformedRequest(
                        f"a picture explains one image, not {len(uploads)}; for several, Accept: application/json"
                    )
                held(len(uploads))
                job = _Job(ends, deadline, explain, draw, Flow(ends, held.aside))
                answers = await self._answer_all(uploads, job, held)
        endpoint: str = request.scope["route"].path
        for answer in answers:
            outcome = answer.outcome.code if isinstance(answer.outcome, ServiceError) else "ok"
            self._metrics.image(endpoint, outcome)
        return Answers(answers, parsed.infer, parsed.ignored)

    async def _parsed(self, body_format: BodyFormat, body: bytes | BodyFile, ends: float) -> ParsedBody:
        if parsed := self._parser.parse_quickly(body_format, body):
            return parsed
        try:
            async with asyncio.timeout_at(ends):
                return await self._parser.parse(body_format, body)
        except TimeoutError:
            raise DeadlineExceeded("no answer before the deadline") from None

    async def _answer_all(self, uploads: Sequence[Upload], job: "_Job", held: Place) -> Sequence[Answer]:
        if len(uploads) == 1:
            return [await self._answer(uploads[0], job)]

        async def answer_one(upload: Upload) -> Answer:
            try:
                return await self._answer(upload, job)
            finally:
                held.add(-1)  # the others may take minutes

        tasks: list[asyncio.Task[Answer]] = []
        async with asyncio.TaskGroup() as group:  # a defect over one image ends the work on the others, too
            for upload in uploads:
                tasks.append(group.create_task(answer_one(upload)))
                if len(tasks) % STARTED_AT_ONCE == 0:
                    await asyncio.sleep(0)
        return [task.result() for task in tasks]

    async def _answer(self, upload: Upload, job: "_Job") -> Answer:
        decode_s = 0.0
        try:
            if isinstance(upload, ServiceError):
                raise upload
            async with asyncio.timeout_at(job.ends):
                if isinstance(upload, np.ndarray):  # normalised and checked: there is nothing to decode or draw on
                    return Answer(await self._client.infer(upload, job.deadline, job.explain), decode_s)
                pixels, decode_s = await self._decode(upload, job.flow)
                inference = await self._client.infer(pixels, job.deadline, job.explain)
                if job.draw and inference.grid is not None:
                    drawn = await self._decoder.draw(upload, inference.grid, job.flow)
                    self._metrics.stage("draw", drawn.draw_s)
                    return Answer(inference, decode_s, drawn)
                return Answer(inference, decode_s)
        except TimeoutError:
            return Answer(DeadlineExceeded("no answer before the deadline"), decode_s)
        except ServiceError as error:
            # Its traceback refers to frames that hold the body, in a cycle with the future that raised it: the body's
            # memory would be kept until the garbage collector runs.
            return Answer(error.with_traceback(None), decode_s)

    async def _decode(self, data: bytes | memoryview, flow: Flow) -> Decoded:
        try:
            decoded = await self._decoder.decode(data, flow)
        except asyncio.CancelledError:
            self._metrics.dropped("decode", 1)
            raise
        self._metrics.stage("decode", decoded.decode_s)
        return decoded

    def has_short_deadline(self, request: Request) -> bool:
        """Whether the client gave a request less time than the server would have."""
        asked = request.headers.get("x-request-timeout-ms", "")
        return asked.isdigit() and len(asked) < MAX_DIGITS and int(asked) < 1000 * self._settings.request_timeout_s

    def _timeout_s(self, asked: bytes | None) -> float:
        if asked is None:
            return self._settings.request_timeout_s
        if not (asked.isdigit() and len(asked) < MAX_DIGITS and 1 <= int(asked) <= LONGEST_TIMEOUT_MS):
            raise MalformedRequest(f"X-Request-Timeout-Ms must be whole milliseconds from 1 to {LONGEST_TIMEOUT_MS}")
        return int(asked) / 1000


def callers_id(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The id that the caller gave the request, if it is one."""
    given = headers.get(b"x-request-id", b"")
    return given if REQUEST_ID.fullmatch(given) else None


class _WhileConnected:
    """Cancels what is inside as soon as the caller hangs up, and raises `ClientDisconnect`. The body must have been
    read: the next message can then only be a disconnect."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._hung_up = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._leaving = asyncio.ensure_future(self._request.receive())
        self._leaving.add_done_callback(self._left)

    def _left(self, leaving: "asyncio.Future[MutableMapping[str, Any]]") -> None:
        if not leaving.cancelled():
            self._hung_up = True
            self._task.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._leaving.remove_done_callback(self._left)
        self._leaving.cancel()
        if self._hung_up and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise ClientDisconnect from None
