"""Decodes images in worker processes: on all cores, and isolated from the server.

Three pools of processes keep costly images from delaying the others. A worker reads the header of an image first and
decodes small images at once. Large images go to a second pool, which bounds their memory and decodes few at a time.
When one request has used a lot of decode time, the rest of its images go to a third pool. These two pools have a lower
priority. Each pool shares its time fairly among requests.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from rednet.model.images.preprocess import Preprocess
from rednet.service.decoding.fair_queue import Flow
from rednet.service.decoding.jobs import DecodeJob
from rednet.service.decoding.limits import WORST_BYTES_PER_PIXEL, Cost, DecodeLimits
from rednet.service.decoding.pool import Pool
from rednet.service.errors import Draining, Overloaded, PayloadTooLarge
from rednet.service.types import Floats, Pixels

START_TIMEOUT_S = 10.0
NICE, NICE_SLOW = 5, 7
MAX_FAST_S = 0.5  # decode time that a request may use before its remaining images move to the slow pool
MAX_SET_ASIDE = 512  # images of all requests that wait in the slow pools
MAX_RETRY_AFTER_S = 60.0
KILL_ABOVE_S = 0.5  # a cancelled image that needs less is decoded to its end: starting a new process takes as long
SMOOTHING = 0.2  # weight of the newest large image in the running estimate of the pace


class Decoded(NamedTuple):
    pixels: Pixels
    decode_s: float


class Drawn(NamedTuple):
    png: bytes
    draw_s: float


class Decoder:
    """Decodes images in three pools of worker processes. Used from one event loop.

    `start` starts the processes for small images; without it, they start with the first image. The processes of the
    slow pools start when they are first needed.

    Args:
        preprocess: what the network expects.
        limits: on images, and on the memory of all processes.
        count: number of processes for small images.
    """

    def __init__(self, preprocess: Preprocess, limits: DecodeLimits, count: int) -> None:
        self._limits = limits
        common = {"preprocess": asdict(preprocess), "limits": asdict(limits)}

        def command(nice: int, only_small: bool) -> Sequence[str]:
            options = json.dumps(common | {"nice": nice, "only_small": only_small})
            return [sys.executable, "-P", "-m", "rednet.service.decoding.worker", options]

        side = preprocess.crop
        few = max(1, count // 4)
        self._first = Pool(self, command(NICE, True), side, count)
        self._later = Pool(self, command(NICE_SLOW, True), side, count)
        self._large = Pool(self, command(NICE_SLOW, False), side, few, limits.large_bytes, prefetch=False)
        self._pools = (self._first, self._later, self._large)
        self._set_aside_count = 0  # jobs in the two slow pools
        self._pace = 1.0  # measured seconds per expected second of CPU time
        self._closed = False

    @property
    def available(self) -> bool:
        """Whether images can be decoded now."""
        return self._first.available

    async def start(self) -> None:
        """Start the processes now, so that the first images need not wait and no measurement is disturbed later."""
        await self._first.start(START_TIMEOUT_S)

    async def decode(self, data: bytes | memoryview, flow: Flow | None = None) -> Decoded:
        """Decode an image. If cancelled while the image is queued, it is not decoded.

        Args:
            data: the encoded image.
            flow: of the request that the image belongs to; None: the request has only this image.

        Raises:
            ServiceError: what `decode_image` raises.
            DecoderUnavailable, Overloaded: the image cannot be decoded now.
        """
        pixels, decode_s = await self._run(data, None, flow)
        assert isinstance(pixels, np.ndarray)
        return Decoded(pixels, decode_s)

    async def draw(self, data: bytes | memoryview, grid: Floats, flow: Flow | None = None) -> Drawn:
        """Draw a map [h, w] over an image; otherwise like `decode`."""
        png, draw_s = await self._run(data, grid, flow)
        assert isinstance(png, bytes)
        return Drawn(png, draw_s)

    async def _run(
        self, data: bytes | memoryview, grid: Floats | None, flow: Flow | None
    ) -> tuple[Pixels | bytes, float]:
        if self._closed:
            raise Draining
        job = DecodeJob(data, grid, asyncio.get_running_loop().create_future(), flow or Flow())
        self._first.start_all()
        self._first.submit(job)
        try:
            return await job.result
        finally:
            job.data = b""  # a cancelled job may stay queued, but must not hold the memory of its image
            if job.result.cancelled() and job.pool:
                job.pool.cancel(job, KILL_ABOVE_S)
            if job.set_aside:
                self._count_set_aside(job, -1)

    async def close(self) -> None:
        """Stop the processes and fail all images with `Draining`; returns when the processes have exited."""
        self._closed = True
        workers = [worker for pool in self._pools for worker in pool.close(Draining())]
        await asyncio.gather(*(worker.wait_for_exit() for worker in workers))

    def on_decoded(self, pool: Pool, job: DecodeJob, took_s: float) -> None:
        """A pool has finished a job, with or without success."""
        job.flow.used_s += took_s
        job.flow.decoded += 1
        if pool is self._large and job.cost_s:
            self._pace += (min(10.0, took_s / job.cost_s * self._pace) - self._pace) * SMOOTHING

    def on_too_costly(self, job: DecodeJob, cost: Cost | None) -> None:
        """A job costs too much for its pool. Cost None: the job exceeded the CPU limit, and its cost is unknown."""
        worst_bytes = WORST_BYTES_PER_PIXEL * self._limits.max_pixels
        cost = cost or Cost(self._limits.cpu_s, min(worst_bytes, self._limits.large_bytes))
        if cost.memory_bytes > self._limits.large_bytes:
            sizes = f"{cost.memory_bytes / 1e6:.0f} MB of memory; this server has {self._limits.large_bytes / 1e6:.0f}"
            job.fail(PayloadTooLarge(f"decoding the image takes up to {sizes}"))
            return
        job.cost_s, job.memory_bytes = cost.cpu_s * self._pace, cost.memory_bytes
        self._set_aside(job, self._large)

    def reassign(self, pool: Pool, job: DecodeJob) -> bool:
        """Move a job whose turn has come to a slow pool if its request has used a lot of decode time; returns whether
        the job was moved or has failed."""
        flow = job.flow
        if pool is not self._first or flow.used_s < MAX_FAST_S:
            return False
        job.cost_s = flow.used_s / max(1, flow.decoded)
        self._set_aside(job, self._later)
        return True

    def _set_aside(self, job: DecodeJob, pool: Pool) -> None:
        """Move a job to a slow pool, or fail it if its turn there would come too late.

        One request may take half of the slots that the others leave, so that some are always left for the next one.
        """
        wait_s = pool.wait_s(job)
        if job.flow.waiting >= MAX_SET_ASIDE - self._set_aside_count and not job.set_aside:
            job.fail(Overloaded("too many large images are waiting; try again later", _retry_s(wait_s)))
        elif asyncio.get_running_loop().time() + wait_s > job.flow.ends:
            message = "decoding the image would start after the deadline; try again later"
            job.fail(Overloaded(message, _retry_s(wait_s)))
        else:
            if not job.set_aside:
                self._count_set_aside(job, 1)
            pool.submit(job)

    def _count_set_aside(self, job: DecodeJob, change: int) -> None:
        job.set_aside = change > 0
        job.flow.waiting += change
        self._set_aside_count += change
        job.flow.on_set_aside(change)


def _retry_s(wait_s: float) -> float:
    return min(MAX_RETRY_AFTER_S, max(1.0, wait_s))
