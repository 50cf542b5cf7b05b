"""The pipeline without HTTP: images to answers in an event loop, around a runner of the test's own."""

import asyncio
import io
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from PIL import Image

from rednet.service.build import build
from rednet.service.decoding.limits import DecodeLimits
from rednet.service.engine.admission import OwnCounts
from rednet.service.errors import (
    DeadlineExceeded,
    Draining,
    MalformedRequest,
    NotReady,
    Overloaded,
    UnreadableImage,
    UnsupportedMediaType,
)
from rednet.service.observability.metrics import Metrics
from rednet.service.pipeline import Answer, Pipeline
from rednet.service.settings import Settings
from rednet.service.types import ClassActivation, Inference, State
from tests.conftest import encoded, photo
from tests.http_helpers import CUT, TEXT
from tests.servers import DECODER_BYTES, PATIENCE_S, FakeRunner, fake_network

LIMITS = DecodeLimits.derive(1_000_000, DECODER_BYTES, 2)
Work = Callable[[Pipeline], Awaitable[None]]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  (there is no event to wait for)
            await asyncio.sleep(0.01)


def with_pipeline(work: Work, runner: FakeRunner, ready: bool = True, **options: object) -> None:
    """Run a test around a started pipeline, which holds nothing afterwards."""

    async def run() -> None:
        settings = Settings.model_validate({"decoders": 2} | options)
        pipeline = build(settings, fake_network(runner), Metrics(), OwnCounts(), LIMITS)
        await pipeline.start()
        try:
            if ready:
                await until(lambda: pipeline.state is State.READY)
            await work(pipeline)
            assert (pipeline.client.requests, pipeline.client.queue_depth) == (0, 0)
        finally:
            runner.warm.set()
            runner.go_on.set()
            await pipeline.close()

    asyncio.run(run())


def plain(level: int) -> bytes:
    """A photo of one colour, whose logits are its channels."""
    return encoded(Image.new("RGB", (40, 40), (level, 2 * level, 10)))


def levels(answers: list[Answer]) -> list[int]:
    outcomes = [answer.outcome for answer in answers]
    assert all(isinstance(outcome, Inference) for outcome in outcomes)
    return [int(outcome.logits[0]) for outcome in outcomes if isinstance(outcome, Inference)]


def images_counted(pipeline: Pipeline, outcome: str) -> float | None:
    labels = {"endpoint": "test", "outcome": outcome}
    return pipeline.metrics.registry.get_sample_value("rednet_images_total", labels)


def test_pipeline_answers_images_in_order() -> None:
    """Twenty photos take several batches; each answer has the logits of its photo and the time of its decoding."""
    runner = FakeRunner()

    async def work(pipeline: Pipeline) -> None:
        with pipeline.admit(PATIENCE_S) as request:
            answers = list(await pipeline.run(request, [plain(level) for level in range(20)], "test"))
        assert levels(answers) == list(range(20))
        outcome = answers[7].outcome
        assert isinstance(outcome, Inference)
        assert outcome.logits.tolist() == [7, 14, 10]
        assert outcome.grid is None
        assert all(answer.decode_s > 0 for answer in answers)
        assert images_counted(pipeline, "ok") == 20

    with_pipeline(work, runner)
    assert sum(runner.batches) == 20
    assert len(runner.batches) > 1


def test_pipeline_runs_normalised_pixels_without_decoding() -> None:
    """Pixels reach the runner unchanged, next to a photo."""

    async def work(pipeline: Pipeline) -> None:
        pixels = np.full((3, 32, 32), 0.5, np.float32)
        with pipeline.admit(PATIENCE_S) as request:
            first, second = await pipeline.run(request, [pixels, plain(9)], "test")
        assert isinstance(first.outcome, Inference)
        assert first.outcome.logits.tolist() == [0.5, 0.5, 0.5]
        assert first.decode_s == 0
        assert levels([second]) == [9]

    with_pipeline(work, FakeRunner())


def test_pipeline_unreadable_image_has_its_error_in_its_place() -> None:
    """Truncated and unsupported images, and one that the parser rejected, between photos that are answered."""
    rejected = MalformedRequest("the part is not base64")

    async def work(pipeline: Pipeline) -> None:
        with pipeline.admit(PATIENCE_S) as request:
            answers = await pipeline.run(request, [plain(1), CUT, TEXT, rejected, plain(2)], "test")
        assert [type(answer.outcome) for answer in answers[1:4]] == [
            UnreadableImage,
            UnsupportedMediaType,
            MalformedRequest,
        ]
        assert answers[3].outcome is rejected
        assert levels([answers[0], answers[4]]) == [1, 2]
        assert images_counted(pipeline, "ok") == 2
        assert images_counted(pipeline, "unreadable_image") == 1

    with_pipeline(work, FakeRunner())


def test_pipeline_answers_deadline_exceeded_without_device_time() -> None:
    """The running image and the queued one are answered at their deadlines, and the queued one is not run."""
    runner = FakeRunner()

    async def answer(pipeline: Pipeline, timeout_s: float) -> object:
        with pipeline.admit(timeout_s) as request:
            return (await pipeline.run(request, [plain(1)], "test"))[0].outcome

    async def work(pipeline: Pipeline) -> None:
        runner.go_on.clear()
        running = asyncio.create_task(answer(pipeline, 1.0))
        await until(runner.running.is_set)
        assert isinstance(await answer(pipeline, 0.5), DeadlineExceeded)
        assert isinstance(await running, DeadlineExceeded)
        runner.go_on.set()
        assert isinstance(await answer(pipeline, PATIENCE_S), Inference)

    with_pipeline(work, runner)
    assert runner.batches == [1, 1]


def test_pipeline_draws_the_requested_map_as_png() -> None:
    """The picture has the size of the photo, and the grid is the runner's. Without `draw` there is only the grid."""

    async def work(pipeline: Pipeline) -> None:
        data = encoded(photo(width=90, height=70))
        for draw in (True, False):
            with pipeline.admit(PATIENCE_S) as request:
                (answer,) = await pipeline.run(request, [data], "test", ClassActivation(), draw)
            assert isinstance(answer.outcome, Inference)
            assert answer.outcome.grid is not None
            assert answer.outcome.grid.tolist() == [[0, 1], [2, 3]]
            assert (answer.drawn is not None) == draw
            if answer.drawn:
                with Image.open(io.BytesIO(answer.drawn.png)) as picture:
                    assert (picture.format, picture.size) == ("PNG", (90, 70))

    with_pipeline(work, FakeRunner())


def test_pipeline_rejects_more_images_than_the_queue_has_room_for() -> None:
    """No image of the request is run. When the queue is empty again, the same request is answered."""
    runner = FakeRunner()

    async def request(pipeline: Pipeline, images: int) -> list[int]:
        with pipeline.admit(PATIENCE_S) as admitted:
            return levels(list(await pipeline.run(admitted, [plain(1)] * images, "test")))

    async def work(pipeline: Pipeline) -> None:
        runner.go_on.clear()
        running = asyncio.create_task(request(pipeline, 1))
        await until(runner.running.is_set)
        with pytest.raises(Overloaded, match="1 images are waiting"):
            await request(pipeline, 4)
        assert (pipeline.client.requests, pipeline.client.queue_depth) == (1, 1)
        runner.go_on.set()
        assert await running == [1]
        assert await request(pipeline, 4) == [1] * 4

    with_pipeline(work, runner, max_queue=4)
    assert sum(runner.batches) == 5


def test_pipeline_cancellation_frees_the_queue() -> None:
    """The images of a cancelled request leave the queue, and only the batch that has started is run."""
    runner = FakeRunner()

    async def request(pipeline: Pipeline, images: int) -> None:
        with pipeline.admit(PATIENCE_S) as admitted:
            await pipeline.run(admitted, [plain(1)] * images, "test")

    async def work(pipeline: Pipeline) -> None:
        runner.go_on.clear()
        running = asyncio.create_task(request(pipeline, 1))
        await until(runner.running.is_set)
        cancelled = asyncio.create_task(request(pipeline, 6))
        await until(lambda: pipeline.client.queue_depth == 7)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert (pipeline.client.requests, pipeline.client.queue_depth) == (1, 1)
        runner.go_on.set()
        await running

    with_pipeline(work, runner)
    assert runner.batches == [1]


def test_pipeline_admits_requests_only_between_warm_up_and_drain() -> None:
    """A request that was admitted before the drain is still answered."""
    runner = FakeRunner()
    runner.warm.clear()

    async def work(pipeline: Pipeline) -> None:
        with pytest.raises(NotReady), pipeline.admit(PATIENCE_S):
            pass
        runner.warm.set()
        await until(lambda: pipeline.state is State.READY)
        with pipeline.admit(PATIENCE_S) as request:
            pipeline.client.begin_drain()
            with pytest.raises(Draining), pipeline.admit(PATIENCE_S):
                pass
            assert levels(list(await pipeline.run(request, [plain(3)], "test"))) == [3]

    with_pipeline(work, runner, ready=False)
