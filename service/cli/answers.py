"""Answers files of photos in order, and keeps decoders and device busy: files are read and decoded ahead."""

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from rednet.service.errors import DeviceFailed, MalformedRequest, PayloadTooLarge, Refused
from rednet.service.pipeline import Answer, Pipeline
from rednet.service.types import State

MAX_FILE_BYTES = 1 << 28  # of a photo; 50 million pixels of 32 bits, uncompressed, are less
MAX_BYTES = 1 << 28  # of all files in memory together
READERS = 8  # files that are read at once: network file systems answer late, but many requests at a time
# Photos that are read and decoded ahead. With four batches, one can run while three are being decoded.
BATCHES_AHEAD, MIN_AHEAD, MAX_AHEAD = 4, 32, 512
TIMEOUT_S = 86_400.0
POLL_S = 0.01


class PhotoAnswers:
    """Takes files through a pipeline, many at a time.

    Every photo is a request of its own. So the decoders take the photos in order, and a batch has the first ones that
    are decoded.

    Args:
        pipeline: it is started; used by nothing else.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._memory = _Memory(MAX_BYTES)
        wanted = BATCHES_AHEAD * pipeline.client.costs.max_batch_size
        self._ahead = min(MAX_AHEAD, max(MIN_AHEAD, wanted))

    async def in_order(self, photos: Sequence[str]) -> AsyncGenerator[Answer]:
        """Yield the answer for each file. Close the iterator, to drop the work that is ahead.

        Raises:
            DeviceFailed: the device fails.
        """
        pending: deque[asyncio.Task[Answer]] = deque()
        with ThreadPoolExecutor(READERS, thread_name_prefix="files") as readers:
            try:
                for photo in photos:
                    pending.append(asyncio.create_task(self._answer(photo, readers)))
                    if len(pending) >= self._ahead:
                        yield await pending.popleft()
                while pending:
                    yield await pending.popleft()
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)

    async def _answer(self, photo: str, readers: ThreadPoolExecutor) -> Answer:
        loop = asyncio.get_running_loop()
        try:
            size = await loop.run_in_executor(readers, _size, photo)
            async with self._memory.reserve(size):
                content = await loop.run_in_executor(readers, _read, photo)
                return await self._infer(content)
        except (OSError, ValueError) as error:  # ValueError: the path contains a NUL character
            return Answer(MalformedRequest(str(error.strerror if isinstance(error, OSError) else error)), 0.0)
        except PayloadTooLarge as error:
            return Answer(error, 0.0)

    async def _infer(self, content: bytes) -> Answer:
        """Answer one photo. What is not the photo's fault is tried again, unless the device has failed."""
        while True:
            try:
                with self._pipeline.admit(TIMEOUT_S) as request:
                    [answer] = await self._pipeline.run(request, [content], "predict")
            except Refused as error:
                answer = Answer(error, 0.0)
            if not isinstance(answer.outcome, Refused):
                return answer
            if self._pipeline.state is State.FAILED:
                raise DeviceFailed
            await asyncio.sleep(answer.outcome.retry_after_s)


async def wait_until_ready(pipeline: Pipeline) -> None:
    """Wait for the end of warm-up.

    Raises:
        DeviceFailed: it has failed; the log says why.
    """
    while pipeline.state is not State.READY:
        if pipeline.state is State.FAILED:
            raise DeviceFailed
        await asyncio.sleep(POLL_S)


class _Memory:
    """Bounds the memory of files. A file that is larger than the bound is read alone."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._used = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def reserve(self, size: int) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._used or self._used + size <= self._max_bytes)
            self._used += size
        try:
            yield
        finally:
            async with self._changed:
                self._used -= size
                self._changed.notify_all()


def _size(photo: str) -> int:
    return min(os.stat(photo).st_size, MAX_FILE_BYTES)


def _read(photo: str) -> bytes:
    with open(photo, "rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise PayloadTooLarge(f"the file has more than {MAX_FILE_BYTES} bytes")
    return content
