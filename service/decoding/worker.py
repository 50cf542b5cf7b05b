"""What runs in each of the decoder's processes: photos in, pixels or pictures out, until the connection ends.

python -m rednet.service.decoding.worker OPTIONS FD

OPTIONS is JSON; FD is the descriptor of memory for pixels that is shared with the server; standard input is the
connection.

What decodes hostile images runs nothing else: it may crash, hang or be killed, and what it sends back is pixels, a
number or an error's code, never anything that the server would execute.
"""

import json
import math
import mmap
import os
import resource
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from rednet.model.images.opening import Header
from rednet.model.images.preprocess import Preprocess
from rednet.service.decoding.cost import estimate
from rednet.service.decoding.decode import TooCostly, decode_image, draw_image
from rednet.service.decoding.limits import SMALL_LIMIT_S, DecodeLimits
from rednet.service.decoding.overlay import LONGEST
from rednet.service.errors import ServiceError

SLOTS = 2  # for photos' pixels in the shared memory: of one that has been decoded, and of the next
# Slot of the pixels; length of the photo that follows; height and width of the float32 map behind it, to be drawn over
# it; 0: none.
REQUEST = struct.Struct("<BIII")
# Kind, seconds, length of what follows: an error as JSON, a cost, or a PNG. Pixels are in the shared memory.
ANSWER = struct.Struct("<BdI")
DONE, FAILED, TOO_COSTLY = range(3)
COST = struct.Struct("<dQ")  # processor time in seconds, and memory in bytes, that a photo would take


def _spare_the_others(nice: int, address_space_bytes: int) -> None:
    """When memory ends, it is this process that the system should take it from, and not the server; and where cores are
    short, the server, which gives work to all, goes first."""
    os.nice(nice)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with suppress(OSError, ValueError):
        mapped_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, mapped_bytes + address_space_bytes)
    with suppress(OSError, ValueError):
        _limit(resource.RLIMIT_CORE, 0)


def _limit(which: int, value: int) -> None:
    _, most = resource.getrlimit(which)
    resource.setrlimit(which, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _limit_cpu(cpu_s: float) -> None:
    """The system ends this process with SIGXCPU when it has used so much more processor time. Waiting for a core, or
    with a machine that is suspended, does not count."""
    with suppress(OSError, ValueError):
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + cpu_s))


def main() -> None:
    options = json.loads(sys.argv[1])
    preprocess, limits = Preprocess(**options["preprocess"]), DecodeLimits.from_json(options["limits"])
    small = limits.small if options["only_small"] else None
    cpu_limit_s = SMALL_LIMIT_S if small else limits.cpu_s
    shape = (SLOTS, 3, preprocess.crop, preprocess.crop)
    slots = np.frombuffer(mmap.mmap(int(sys.argv[2]), 0), np.uint8).reshape(shape)

    def answer(slot: int, photo: bytes, grid: bytes, shape: tuple[int, int]) -> bytes:
        def check(image: Header) -> None:
            if small:
                cost = estimate(image, photo, LONGEST if grid else 2 * preprocess.resize)
                if cost.cpu_s > small.cpu_s or cost.memory_bytes > small.memory_bytes:
                    raise TooCostly(cost)

        started = time.monotonic()
        kind, content = DONE, b""
        try:
            _limit_cpu(cpu_limit_s)
            if grid:
                drawn_over = np.frombuffer(grid, np.float32).reshape(shape)
                content = draw_image(photo, drawn_over, preprocess, limits.max_pixels, check)
            else:
                slots[slot] = decode_image(photo, preprocess, limits.max_pixels, check)
        except TooCostly as refusal:
            kind, content = TOO_COSTLY, COST.pack(*refusal.cost)
        except ServiceError as error:
            kind, content = FAILED, json.dumps({"code": error.code, "message": error.message}).encode()
        return ANSWER.pack(kind, time.monotonic() - started, len(content)) + content

    Image.init()  # what Pillow else does for the first photo
    _spare_the_others(options["nice"], limits.address_space_bytes)
    connection = socket.socket(fileno=0)
    connection.sendall(ANSWER.pack(DONE, 0.0, 0))  # it is up
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say of damaged files is no news, and no log line
    with connection.makefile("rb") as stream:
        while len(head := stream.read(REQUEST.size)) == REQUEST.size:
            slot, length, height, width = REQUEST.unpack(head)
            photo, grid = stream.read(length), stream.read(4 * height * width)
            connection.sendall(answer(slot, photo, grid, (height, width)))


if __name__ == "__main__":
    with suppress(ConnectionError):  # the server is gone
        main()
