"""Photos to pixels in processes of their own: on all cores at once, and out of harm's way."""

import asyncio
import json
import logging
import sys
from collections import deque
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from model.preprocess import Preprocess
from service.decoder_link import Link, Photo, fail
from service.decoder_process import PLACES
from service.errors import Draining, Internal, ServiceError
from service.types import Floats, Pixels

logger = logging.getLogger(__name__)

START_S = 10.0  # for the processes to start
STUCK_S = 0.05  # after which a process is not waited for with the photo behind


class Decoded(NamedTuple):
    pixels: Pixels
    decode_s: float


class Drawn(NamedTuple):
    png: bytes
    draw_s: float


class Decoder:
    """Decodes as many photos at once as it has processes; more wait.

    Processes are started when they are first needed, or all of them by `start`. A photo over which one ends is tried
    again by another: the photo may not have been the reason. Over which the second ends, too, is broken. Used from one
    event loop.

    Args:
        preprocess: what the network expects.
        max_pixels: width times height, at most.
        count: processes.
    """

    def __init__(self, preprocess: Preprocess, max_pixels: int, count: int) -> None:
        self._preprocess = preprocess
        options = json.dumps({"preprocess": asdict(preprocess), "max_pixels": max_pixels})
        self._command = [sys.executable, "-P", "-m", "service.decoder_process", options]
        self._count = count
        self._links: set[Link] = set()
        self._idle: list[Link] = []
        self._waiting: deque[Photo] = deque()
        self._closed = False

    async def start(self) -> None:
        """Start all processes, so that the first photos do not wait for it, and nothing that is timed is disturbed."""
        while len(self._links) < self._count:
            self._start()
        await asyncio.wait([link.known for link in self._links], timeout=START_S)

    async def decode(self, data: bytes | memoryview) -> Decoded:
        """Decode a photo; raises what `decode_image` does.

        Cancelled while it waits, it is not decoded.
        """
        pixels, decode_s = await self._process_photo(data, None)
        assert isinstance(pixels, np.ndarray)
        return Decoded(pixels, decode_s)

    async def draw(self, data: bytes | memoryview, grid: Floats) -> Drawn:
        """Draw a map [h, w] over a photo; raises what `draw_image` does."""
        png, draw_s = await self._process_photo(data, grid)
        assert isinstance(png, bytes)
        return Drawn(png, draw_s)

    async def _process_photo(self, data: bytes | memoryview, grid: Floats | None) -> tuple[Pixels | bytes, float]:
        if self._closed:
            raise Draining
        photo = Photo(data, grid, asyncio.get_running_loop().create_future())
        if self._idle:
            self._idle.pop().begin(photo)
        else:
            self._waiting.append(photo)
            self._try_to_start()
        try:
            return await photo.done
        finally:
            photo.data = b""  # where its caller has left it may wait on; its bytes do not count any more

    def close(self) -> None:
        """End the processes; whoever waits for a photo is told that the server is stopping."""
        self._closed = True
        self._fail_waiting(Draining())
        for link in [*self._links]:
            link.end(Draining())

    def fill(self, link: Link) -> None:
        """Give a process its next photo, and where many wait the one after that."""
        if not link.photos:
            photo = self._overtake(STUCK_S) or self._next_waiting() or self._overtake(0.0)
            if photo is None:
                self._idle.append(link)
                return
            link.begin(photo)
        if link.photos < PLACES and len(self._waiting) > self._count and (photo := self._next_waiting()):
            link.begin(photo)

    def again(self, photo: Photo) -> None:
        """Decode a photo before all others."""
        if self._closed:
            fail(photo, Draining())
            return
        while self._idle:
            link = self._idle.pop()
            if link.alive:  # what ended one process may have ended others, of which nothing has been heard yet
                link.begin(photo)
                return
        self._waiting.appendleft(photo)

    def lost(self, link: Link) -> None:
        """A process has ended."""
        self._links.discard(link)
        if link in self._idle:
            self._idle.remove(link)
        if self._waiting and link.was_up:
            self._try_to_start()
        elif not self._links:  # it would not go better for the next one
            self._fail_waiting(Internal())

    def _next_waiting(self) -> Photo | None:
        while self._waiting:
            photo = self._waiting.popleft()
            if not photo.done.done():
                return photo
        return None

    def _overtake(self, longer_s: float) -> Photo | None:
        """A photo that waits behind another one, which has been decoded for longer than that. Both processes may then
        decode it, and the first one answers."""
        stuck_since = asyncio.get_running_loop().time() - longer_s
        for link in self._links:
            if link.next and link.since <= stuck_since:
                photo, link.next = link.next, None
                if not photo.done.done():
                    return photo
        return None

    def _fail_waiting(self, error: ServiceError) -> None:
        while self._waiting:
            fail(self._waiting.popleft(), error)

    def _try_to_start(self) -> None:
        """Start another process, if there may be one. Where the system lets none start, the ones there are go on."""
        try:
            if len(self._links) < self._count:
                self._start()
        except OSError as error:
            logger.error("a decoder cannot be started: %s", error)
            if not self._links:
                self._fail_waiting(Internal())

    def _start(self) -> None:
        self._links.add(Link(self, self._command, self._preprocess.crop))
