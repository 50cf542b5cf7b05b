"""Memory that a front end shares with the engine's process: a slot for each image, with its pixels and its answer.

The front end writes pixels, the engine copies them into a batch and writes the answer, so that an image crosses between
processes without being sent. A slot belongs to the engine's process from the request that submits it to the reply.
"""

import fcntl
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rednet.service.types import Floats, Pixels

MAX_ERROR_BYTES = 1024


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """The sizes of what a slot holds.

    Attributes:
        side: of pixels [3, side, side].
        classes: length of the logits.
        features: length of a feature vector.
    """

    side: int
    classes: int
    features: int

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Self:
        """The layout for a model, given its description as JSON."""
        return cls(model["preprocess"]["crop"], len(model["labels"]), model["feature_channels"])

    @property
    def max_grid(self) -> int:
        """The largest side of a map: that of the first stage, at a quarter of the resolution."""
        return -(-self.side // 4)

    @property
    def slot_bytes(self) -> int:
        """Whole pages, of which the system provides only those that are used: float32 pixels are rare."""
        values = 3 * self.side**2 + self.classes + self.features + self.max_grid**2
        return -(-(4 * values + MAX_ERROR_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE


class Slots:
    """The slots of one front end, as arrays whose first index is the slot.

    Args:
        layout: of every slot.
        fd: of the memory; it stays open and is not owned.

    Raises:
        ValueError: the memory could shrink while it is in use, which would kill this process.

    Attributes:
        count: of slots.
        pixels: uint8 and float32 [count, 3, side, side].
        logits: [count, classes].
        features: [count, features].
    """

    def __init__(self, layout: SlotLayout, fd: int) -> None:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError("the slots are not sealed against shrinking")
        self.count = os.fstat(fd).st_size // layout.slot_bytes
        memory = mmap.mmap(fd, self.count * layout.slot_bytes)

        def arrays(offset: int, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
            """The array at an offset in each slot, all of them as one."""
            steps = np.empty((1, *shape), dtype).strides[1:]
            return np.ndarray((self.count, *shape), dtype, memory, offset, (layout.slot_bytes, *steps))

        image = (3, layout.side, layout.side)
        logits = 4 * math.prod(image)
        features = logits + 4 * layout.classes
        grid = features + 4 * layout.features
        self.pixels: tuple[Pixels, Pixels] = (arrays(0, image, np.uint8), arrays(0, image, np.float32))
        self.logits: Floats = arrays(logits, (layout.classes,), np.float32)
        self.features: Floats = arrays(features, (layout.features,), np.float32)
        self._grids: Floats = arrays(grid, (layout.max_grid**2,), np.float32)
        self._errors = arrays(layout.slot_bytes - MAX_ERROR_BYTES, (MAX_ERROR_BYTES,), np.uint8)

    @staticmethod
    def allocate(layout: SlotLayout, count: int) -> int:
        """The descriptor of memory for so many slots."""
        fd = os.memfd_create("slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, count * layout.slot_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return fd

    def grid(self, slot: int, height: int, width: int) -> Floats:
        """The map [height, width] of a slot."""
        return self._grids[slot, : height * width].reshape(height, width)

    def write_error(self, slot: int, text: str) -> None:
        """Store up to `MAX_ERROR_BYTES` of a text."""
        data = text.encode()[:MAX_ERROR_BYTES]
        self._errors[slot, : len(data)] = np.frombuffer(data, np.uint8)
        self._errors[slot, len(data) :] = 0

    def read_error(self, slot: int) -> str:
        data: bytes = self._errors[slot].tobytes()
        return data.rstrip(b"\0").decode(errors="replace")
