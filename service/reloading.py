"""Replaces the network of a running server: loads another one beside it, and switches between two requests."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from rednet.service.api_keys import KeyFile, KeyFileError
from rednet.service.observability.metrics import Metrics
from rednet.service.pipeline import Pipeline
from rednet.service.system.daemon_thread import run_in_daemon_thread
from rednet.service.system.memory import release_free_memory
from rednet.service.types import QueueCounts, State

logger = logging.getLogger(__name__)

POLL_S = 0.05


class ReloadablePipeline:
    """The pipeline that new requests go to, and until its last request is answered, the one that it has replaced.

    A pipeline belongs to one network for its whole life. A request uses the pipeline that was current when it arrived,
    so its answer is wholly of one network. Used from one event loop.

    Args:
        first: not started.
        load: makes another pipeline, of the checkpoint as it is now. Called on a thread; it raises `ValueError` or
            `OSError` if that is impossible, with a message for the operator.
        metrics: of the server, which all its pipelines report to.
        counts: of the server, which all its pipelines add to.
        release: gives freed memory back to the system. Called on a thread.
    """

    def __init__(
        self,
        first: Pipeline,
        load: Callable[[], Pipeline],
        metrics: Metrics,
        counts: QueueCounts,
        release: Callable[[], None] = release_free_memory,
    ) -> None:
        self.current = first
        self.metrics = metrics
        self._load, self._release = load, release
        self._replaced: Pipeline | None = None
        metrics.model(first.model)
        metrics.watch(
            queue_depth=counts.total_accepted,
            backlog_s=lambda: self.current.client.backlog_s,
            offered_s=counts.total_offered_s,
            ready=lambda: self.current.state is State.READY,
        )

    @property
    def _pipelines(self) -> Sequence[Pipeline]:
        return (self.current, self._replaced) if self._replaced else (self.current,)

    @property
    def state(self) -> State:
        """The current pipeline's state; failed if the replaced one has failed, whose requests would wait for ever."""
        failed = any(each.client.state is State.FAILED for each in self._pipelines)
        return State.FAILED if failed else self.current.state

    @property
    def requests(self) -> int:
        """Requests admitted and not yet answered."""
        return sum(each.client.requests for each in self._pipelines)

    async def start(self) -> None:
        await self.current.start()

    def begin_drain(self) -> None:
        """Refuse new requests; admitted ones are still answered."""
        for each in self._pipelines:
            each.client.begin_drain()

    async def close(self) -> None:
        """Stop, and fail what is still waiting. May be called again. No reload may be running."""
        await asyncio.gather(*(each.close() for each in self._pipelines))

    async def reload(self) -> None:
        """Replace the current pipeline, unless the new one cannot be loaded or does not become ready: then the log says
        why. Returns when nothing is left of the pipeline that is not used any more.

        Cancelling leaves the server with the pipelines that it has admitted requests to.
        """
        while self.current.state is State.STARTING:  # noqa: ASYNC110  (there is no event to wait for)
            await asyncio.sleep(POLL_S)
        started = time.monotonic()
        try:
            pipeline = await run_in_daemon_thread(self._load)
            await _start(pipeline)
        except Exception as error:  # whatever is wrong with the new network, the old one works
            expected = isinstance(error, (ValueError, OSError, MemoryError))
            logger.error(  # with a traceback for bugs only
                "the checkpoint was not loaded, %s stays: %s", self.current.model.name, error, exc_info=not expected
            )
            self.metrics.reloaded("checkpoint", "failed")
        else:
            await self._replace_by(pipeline, time.monotonic() - started)
        await run_in_daemon_thread(self._release)

    async def _replace_by(self, pipeline: Pipeline, took_s: float) -> None:
        old, self.current = self.current, pipeline
        self._replaced = old
        self.metrics.model(pipeline.model)
        self.metrics.reloaded("checkpoint", "ok")
        new, replaced = (f"{model.name} ({model.checkpoint_digits()})" for model in (pipeline.model, old.model))
        logger.info("%s replaces %s, after %.1f s", new, replaced, took_s)
        await asyncio.sleep(POLL_S)  # for requests that have looked at `current` and are about to be admitted
        while old.client.requests:  # noqa: ASYNC110  (as above)
            await asyncio.sleep(POLL_S)
        await old.close()
        self._replaced = None
        logger.info("the previous network has answered its last request")


class Reloader:
    """Runs one reload at a time. Requests that come meanwhile are answered by one more, which begins after it.

    Args:
        reload: must not raise.
    """

    def __init__(self, reload: Callable[[], Awaitable[None]]) -> None:
        self._reload = reload
        self._requested = False
        self._task: asyncio.Task[None] | None = None

    def request(self) -> None:
        """Reload soon."""
        self._requested = True
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Cancel a reload that is running."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while self._requested:
            self._requested = False
            await self._reload()


async def reload_keys(keys: KeyFile, metrics: Metrics) -> None:
    """Read the keys again, on a thread; if that is impossible, the log says why."""
    try:
        await run_in_daemon_thread(keys.reload)
    except KeyFileError as error:
        logger.error("the API keys were not loaded, the old ones stay: %s", error)
        metrics.reloaded("api_keys", "failed")
    else:
        logger.info("%s", keys)
        metrics.reloaded("api_keys", "ok")


async def _start(pipeline: Pipeline) -> None:
    """Start a pipeline; returns when it is ready. If it cannot be used, it is closed.

    Raises:
        ValueError: the warm-up failed, or images cannot be decoded.
    """
    try:
        await pipeline.start()
        while (state := pipeline.state) is State.STARTING:  # noqa: ASYNC110  (as above)
            await asyncio.sleep(POLL_S)
        if state is State.FAILED:
            raise ValueError("its warm-up failed")
        if state is not State.READY:
            raise ValueError("no decoder process could be started for it")
    except BaseException:
        await asyncio.shield(pipeline.close())
        raise
