"""Takes images to answers: admit, decode, infer, draw. HTTP and the command line call it; it knows no protocol."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from rednet.model.inference.familiarity import Familiarity
from rednet.service.decoding.decoder import Decoded, Decoder, Drawn
from rednet.service.decoding.fair_queue import Flow
from rednet.service.errors import DeadlineExceeded, ServiceError
from rednet.service.event_loop import in_turns
from rednet.service.model_description import ModelBody
from rednet.service.observability import tracing
from rednet.service.observability.metrics import Metrics
from rednet.service.types import EngineClient, ExplainSpec, Inference, Permit, Pixels, State, Upload

STARTED_AT_ONCE = 16  # images of one request; the event loop serves others before it starts the next ones
COMPARED_AT_ONCE = 64  # images whose familiarity is computed together, in less than a millisecond


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that was admitted.

    Attributes:
        permit: what it holds of the queue.
        deadline: by `time.monotonic()`.
        ends: the same by the event loop's clock.
    """

    permit: Permit
    deadline: float
    ends: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The result for one image.

    Attributes:
        outcome: the network's output, or why there is none.
        decode_s: the time that decoding took.
        drawn: the map drawn over the image, if that was asked for.
        familiarity: how familiar the image looks, from 0 to 1, if the network comes with that.
    """

    outcome: Inference | ServiceError
    decode_s: float
    drawn: Drawn | None = None
    familiarity: float | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """What the images of a request have in common."""

    request: Admitted
    flow: Flow
    explain: ExplainSpec | None
    draw: bool


class Pipeline:
    """Answers images before a deadline, whatever the protocol. Used from one event loop.

    Args:
        model: describes the network.
        client: the engine.
        decoder: for the images.
        metrics: records stages and outcomes.
        familiarity: of the network; None: not measured.
    """

    def __init__(
        self,
        model: ModelBody,
        client: EngineClient,
        decoder: Decoder,
        metrics: Metrics,
        familiarity: Familiarity | None = None,
    ) -> None:
        self.model = model
        self.client = client
        self.metrics = metrics
        self._decoder = decoder
        self._familiarity = familiarity

    async def start(self) -> None:
        """Start the decoders, then the engine, whose warm-up measures what batches cost here."""
        await self._decoder.start()
        self.client.start()

    async def close(self) -> None:
        """Stop, and fail what is still waiting."""
        await self.client.close()
        await self._decoder.close()

    @property
    def state(self) -> State:
        """The engine's state, but not ready while no photo can be decoded."""
        state = self.client.state
        return State.NO_DECODER if state is State.READY and not self._decoder.available else state

    @contextmanager
    def admit(self, timeout_s: float) -> Iterator[Admitted]:
        """Admit a request, before its images have arrived, for as long as the context lasts.

        Args:
            timeout_s: until its deadline.

        Raises:
            Refused: the queue is full, the answer would come too late, or the server takes no work.
        """
        ends = asyncio.get_running_loop().time() + timeout_s
        deadline = time.monotonic() + timeout_s
        with self.client.admit(deadline) as permit:
            yield Admitted(permit, deadline, ends)

    async def run(
        self,
        request: Admitted,
        images: Sequence[Upload],
        endpoint: str,
        explain: ExplainSpec | None = None,
        draw: bool = False,
    ) -> Sequence[Answer]:
        """Answer every image of a request, in order. If cancelled, it drops what is still waiting.

        Args:
            request: admitted by `admit`.
            images: at least one.
            endpoint: where they came in, for the metrics.
            explain: the map to compute for each image.
            draw: draw the map over the image, as a PNG.

        Raises:
            Overloaded: there is no room for so many images.
        """
        request.permit.hold(len(images))
        job = _Job(request, Flow(request.ends, request.permit.set_aside), explain, draw)
        answers = await self._answer_all(images, job)
        if self._familiarity is not None:
            answers = await self._compare(answers, self._familiarity)
        for answer in answers:
            outcome = answer.outcome.code if isinstance(answer.outcome, ServiceError) else "ok"
            self.metrics.image(endpoint, outcome)
        return answers

    async def _answer_all(self, images: Sequence[Upload], job: _Job) -> Sequence[Answer]:
        if len(images) == 1:
            return [await self._answer(images[0], job)]

        async def answer_one(image: Upload) -> Answer:
            try:
                return await self._answer(image, job)
            finally:
                job.request.permit.release(1)  # the others may take minutes

        tasks: list[asyncio.Task[Answer]] = []
        async with asyncio.TaskGroup() as group:  # a defect over one image also ends the work on the others
            for image in images:
                tasks.append(group.create_task(answer_one(image)))
                if len(tasks) % STARTED_AT_ONCE == 0:
                    await asyncio.sleep(0)
        return [task.result() for task in tasks]

    async def _compare(self, answers: Sequence[Answer], familiarity: Familiarity) -> Sequence[Answer]:
        """Add to every image that has an answer how familiar it looks."""
        logits = {i: each.outcome.logits for i, each in enumerate(answers) if isinstance(each.outcome, Inference)}
        compared, answered = list(answers), list(logits)
        async for start in in_turns(range(0, len(answered), COMPARED_AT_ONCE)):
            some = answered[start : start + COMPARED_AT_ONCE]
            for i, value in zip(some, familiarity([logits[i] for i in some]).tolist(), strict=True):
                compared[i] = replace(answers[i], familiarity=value)
                self.metrics.familiarity(value)
        return compared

    async def _answer(self, image: Upload, job: _Job) -> Answer:
        decode_s = 0.0
        request = job.request
        try:
            if isinstance(image, ServiceError):
                raise image
            async with asyncio.timeout_at(request.ends):
                if isinstance(image, np.ndarray):  # normalised and checked: there is nothing to decode or to draw on
                    return Answer(await self._infer(image, job), decode_s)
                pixels, decode_s = await self._decode(image, job.flow)
                inference = await self._infer(pixels, job)
                if job.draw and inference.grid is not None:
                    drawn = await self._decoder.draw(image, inference.grid, job.flow)
                    self.metrics.stage("draw", drawn.draw_s)
                    return Answer(inference, decode_s, drawn)
                return Answer(inference, decode_s)
        except TimeoutError:
            return Answer(DeadlineExceeded("no answer before the deadline"), decode_s)
        except ServiceError as error:
            # Its traceback refers to frames that hold the image, in a cycle with the future that raised it: the image's
            # memory would be kept until the garbage collector runs.
            return Answer(error.with_traceback(None), decode_s)

    async def _infer(self, pixels: Pixels, job: _Job) -> Inference:
        inference = await self.client.infer(pixels, job.request.deadline, job.explain)
        tracing.inference(inference.queue_s, inference.inference_s, inference.batch_size)
        return inference

    async def _decode(self, data: bytes | memoryview, flow: Flow) -> Decoded:
        try:
            decoded = await self._decoder.decode(data, flow)
        except asyncio.CancelledError:
            self.metrics.dropped("decode", 1)
            raise
        self.metrics.stage("decode", decoded.decode_s)
        return decoded
