"""What a front end and the engine's process send each other over a unix socket.

The front end connects, once for each device, and sends the number of the device together with the descriptor of its
slots (`slots.py`). It receives two JSON frames: a `Hello` when the network is loaded, and a `Ready` after warm-up. From
then on messages have a fixed size: the front end sends requests, and receives exactly one reply to each image that it
has submitted, cancelled or not. The reply gives the image's slot back.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from rednet.service.types import ClassActivation, ExplainSpec, KernelSums

FRAME = struct.Struct("<I")  # length of the JSON that follows
REQUEST = struct.Struct("<IIBBxxiid")  # id, slot, kind, map, its two numbers, deadline
REPLY = struct.Struct("<IBxHHHddd")  # id, failed, batch size, height and width of the map, times, slowdown
ONLY_HELLO = 255  # instead of a device: the front end only wants to know what is served

UINT8, FLOAT32, CANCEL = range(3)  # kinds of requests: submit pixels of a dtype, or cancel
NO_MAP, CLASS_ACTIVATION, KERNEL_SUMS = range(3)
NONE = -1
MEANING = ("name", "architecture", "config", "labels", "preprocess", "feature_channels")  # of what a network answers


@dataclass(frozen=True, slots=True)
class Hello:
    """What is served.

    Attributes:
        model: its description, as JSON.
        devices: how many there are.
        gpus: the driver's name of each CUDA device, by its name in the metrics.
        familiarity: the energies that images are compared with; None: not measured.
    """

    model: Mapping[str, Any]
    devices: int
    gpus: Mapping[str, str]
    familiarity: Sequence[float] | None = None

    def answers_like(self, other: Self) -> bool:
        """Whether answers mean the same, and slots have the same layout. What measurements decide may differ: a process
        that is started again may choose another precision."""
        same = all(self.model[name] == other.model[name] for name in MEANING)
        return same and (self.devices, self.familiarity) == (other.devices, other.familiarity)


@dataclass(frozen=True, slots=True)
class Ready:
    """The device takes images.

    Attributes:
        seconds: measured, by batch size.
        max_batch_size: chosen by warm-up.
        start_s: time that the process took to get here, and a new one would take.
    """

    seconds: Mapping[str, float]
    max_batch_size: int
    start_s: float


def frame(content: Hello | Ready) -> bytes:
    """A JSON frame."""
    text = json.dumps(asdict(content)).encode()
    return FRAME.pack(len(text)) + text


def take_frame(received: bytearray) -> dict[str, Any] | None:
    """Remove a JSON frame from the front of what was received; None: it has not arrived completely."""
    if len(received) < FRAME.size:
        return None
    end = FRAME.size + FRAME.unpack_from(received)[0]
    if len(received) < end:
        return None
    content: dict[str, Any] = json.loads(received[FRAME.size : end])
    del received[:end]
    return content


class Request(NamedTuple):
    """An image to run, or to cancel.

    Attributes:
        id: of the image; unique among those of its front end that have no reply.
        slot: holds its pixels, and will hold the answer.
        kind: UINT8, FLOAT32 or CANCEL.
        deadline: by `time.monotonic()`, which is the same in all processes.
        explain: the requested map.
    """

    id: int
    slot: int
    kind: int
    deadline: float
    explain: ExplainSpec | None

    def pack(self) -> bytes:
        map_, first, second = NO_MAP, NONE, NONE
        match self.explain:
            case ClassActivation(class_index):
                map_, first = CLASS_ACTIVATION, NONE if class_index is None else class_index
            case KernelSums(stage, group):
                map_, first, second = KERNEL_SUMS, stage, NONE if group is None else group
        return REQUEST.pack(self.id, self.slot, self.kind, map_, first, second, self.deadline)


def take_requests(received: bytearray) -> Iterator[Request]:
    """Remove all complete requests from what was received."""
    complete = len(received) // REQUEST.size * REQUEST.size
    whole = bytes(received[:complete])
    del received[:complete]
    for id_, slot, kind, map_, first, second, deadline in REQUEST.iter_unpack(whole):
        explain: ExplainSpec | None = None
        if map_ == CLASS_ACTIVATION:
            explain = ClassActivation(None if first == NONE else first)
        elif map_ == KERNEL_SUMS:
            explain = KernelSums(first, None if second == NONE else second)
        yield Request(id_, slot, kind, deadline, explain)


class Reply(NamedTuple):
    """The end of a submitted image. Its values, or the text of its error, are in its slot.

    Attributes:
        id: of the image.
        failed: the slot holds an error.
        batch_size: of the batch that it ran in.
        height, width: of the map; 0: none.
        queue_s, inference_s: what it took.
        slowdown: how much longer than measured the device's batches take at present.
    """

    id: int
    failed: bool
    batch_size: int
    height: int
    width: int
    queue_s: float
    inference_s: float
    slowdown: float


def take_replies(received: bytearray) -> Iterator[Reply]:
    """Remove all complete replies from what was received."""
    complete = len(received) // REPLY.size * REPLY.size
    whole = bytes(received[:complete])
    del received[:complete]
    return map(Reply._make, REPLY.iter_unpack(whole))
