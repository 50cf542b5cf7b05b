"""Photos to pixels in processes of their own: on all cores at once, and out of harm's way.

Three pools of processes keep costly photos from delaying others. A process reads a photo's header first, and decodes it
at once if it is small. Large photos go to a pool of their own, which counts their memory and decodes few at a time.
When one request has taken much decoding time, the rest of its photos go to the third pool. These two have a lower
priority. In each pool, requests have equal shares.
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
from rednet.service.decoding.limits import WORST_BYTES_PER_PIXEL, Cost, DecodeLimits
from rednet.service.decoding.pool import Pool
from rednet.service.decoding.worker_handle import Photo, fail
from rednet.service.errors import Draining, Overloaded, PayloadTooLarge
from rednet.service.types import Floats, Pixels

START_S = 10.0  # for the processes to start
NICE, NICE_SLOW = 5, 7
PATIENT_S = 0.5  # decoding time that one request's photos may take before others go first
MAX_ASIDE = 512  # photos that wait for slow decoding, of all requests
MAX_RETRY_AFTER_S = 60.0
ABANDON_S = (
    0.5  # a photo that nobody waits for is decoded to its end if that takes no longer; a new process takes as long
)
SMOOTHING = 0.2  # weight of the newest large photo in the running estimate of the pace


class Decoded(NamedTuple):
    pixels: Pixels
    decode_s: float


class Drawn(NamedTuple):
    png: bytes
    draw_s: float


class Decoder:
    """Decodes photos; more wait than there are processes. Used from one event loop.

    Processes are started when they are first needed, or those for small photos by `start`.

    Args:
        preprocess: what the network expects.
        limits: on photos, and on the memory of all processes.
        count: processes for small photos.
    """

    def __init__(self, preprocess: Preprocess, limits: DecodeLimits, count: int) -> None:
        self._limits = limits
        common = {"preprocess": asdict(preprocess), "limits": asdict(limits)}

        def command(nice: int, only_small: bool) -> Sequence[str]:
            options = json.dumps(common | {"nice": nice, "only_small": only_small})
            return [sys.executable, "-P", "-m", "rednet.service.decoding.worker", options]

        side = preprocess.crop
        self._first = Pool(self, command(NICE, True), side, count)
        self._later = Pool(self, command(NICE_SLOW, True), side, count)
        few = max(1, count // 4)
        self._large = Pool(self, command(NICE_SLOW, False), side, few, limits.large_bytes, ahead=False)
        self._pools = (self._first, self._later, self._large)
        self._aside = 0  # photos that wait in the two slow pools
        self._pace = 1.0  # seconds for a second of expected processor time
        self._closed = False

    @property
    def available(self) -> bool:
        """Whether photos can be decoded now."""
        return self._first.available

    async def start(self) -> None:
        """Start the processes, so that the first photos do not wait for it, and nothing that is timed is disturbed."""
        await self._first.start(START_S)

    async def decode(self, data: bytes | memoryview, flow: Flow | None = None) -> Decoded:
        """Decode a photo; raises what `decode_image` does.

        Cancelled while it waits, it is not decoded.

        Args:
            data: the file.
            flow: of the request that the photo belongs to; None: it has only this one.

        Raises:
            ServiceError: what `decode_image` raises.
            DecoderUnavailable, Overloaded: it is not decoded now, for no fault of its own.
        """
        pixels, decode_s = await self._process_photo(data, None, flow)
        assert isinstance(pixels, np.ndarray)
        return Decoded(pixels, decode_s)

    async def draw(self, data: bytes | memoryview, grid: Floats, flow: Flow | None = None) -> Drawn:
        """Draw a map [h, w] over a photo; otherwise like `decode`."""
        png, draw_s = await self._process_photo(data, grid, flow)
        assert isinstance(png, bytes)
        return Drawn(png, draw_s)

    async def _process_photo(
        self, data: bytes | memoryview, grid: Floats | None, flow: Flow | None
    ) -> tuple[Pixels | bytes, float]:
        if self._closed:
            raise Draining
        photo = Photo(data, grid, asyncio.get_running_loop().create_future(), flow or Flow())
        self._first.keep_all()
        self._first.submit(photo)
        try:
            return await photo.done
        finally:
            photo.data = b""  # where its caller has left it may wait on; its bytes do not count any more
            if photo.done.cancelled() and photo.pool:
                photo.pool.leave(photo, ABANDON_S)
            if photo.aside:
                self._count_aside(photo, -1)

    def close(self) -> None:
        """End the processes, and all photos with `Draining`. Blocks until the processes have ended."""
        self._closed = True
        for pool in self._pools:
            pool.close(Draining())

    def decoded(self, pool: Pool, photo: Photo, took_s: float) -> None:
        photo.flow.used_s += took_s
        photo.flow.decoded += 1
        if pool is self._large and photo.cost_s:
            self._pace += (min(10.0, took_s / photo.cost_s * self._pace) - self._pace) * SMOOTHING

    def too_costly(self, photo: Photo, cost: Cost | None) -> None:
        worst_bytes = WORST_BYTES_PER_PIXEL * self._limits.max_pixels
        cost = cost or Cost(self._limits.cpu_s, min(worst_bytes, self._limits.large_bytes))
        if cost.memory_bytes > self._limits.large_bytes:
            sizes = f"{cost.memory_bytes / 1e6:.0f} MB of memory; this server has {self._limits.large_bytes / 1e6:.0f}"
            fail(photo, PayloadTooLarge(f"decoding the image takes up to {sizes}"))
            return
        photo.cost_s, photo.memory_bytes = cost.cpu_s * self._pace, cost.memory_bytes
        self._set_aside(photo, self._large)

    def moves(self, pool: Pool, photo: Photo) -> bool:
        flow = photo.flow
        if pool is not self._first or flow.used_s < PATIENT_S:
            return False
        photo.cost_s = flow.used_s / max(1, flow.decoded)
        self._set_aside(photo, self._later)
        return True

    def _set_aside(self, photo: Photo, pool: Pool) -> None:
        """Have a photo decoded in a slow pool, unless it would come to its turn too late.

        One request may take half of the room that the others leave: some is always left for the next one.
        """
        wait_s = pool.wait_s(photo)
        if photo.flow.waiting >= MAX_ASIDE - self._aside and not photo.aside:
            fail(photo, Overloaded("too many large images are waiting; try again later", _retry_s(wait_s)))
        elif asyncio.get_running_loop().time() + wait_s > photo.flow.ends:
            message = "the image's decoding would begin after the deadline; try again later"
            fail(photo, Overloaded(message, _retry_s(wait_s)))
        else:
            if not photo.aside:
                self._count_aside(photo, 1)
            pool.submit(photo)

    def _count_aside(self, photo: Photo, change: int) -> None:
        photo.aside = change > 0
        photo.flow.waiting += change
        self._aside += change
        photo.flow.aside(change)


def _retry_s(wait_s: float) -> float:
    return min(MAX_RETRY_AFTER_S, max(1.0, wait_s))
