"""The worker process of the decoder: receives encoded images and returns pixels or PNGs, until the connection closes.

python -m rednet.service.decoding.worker OPTIONS FD

OPTIONS is JSON; FD is the descriptor of the memory for pixels, which is shared with the server; standard input is the
connection.

The process decodes hostile images and does nothing else. It may crash, hang or be killed. It sends back only pixels,
numbers and error codes, never anything that the server would execute.
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
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from PIL import Image

from rednet.model.images.opening import Header
from rednet.model.images.preprocess import Preprocess
from rednet.service.decoding.address_space import limit_address_space, limited_address_space
from rednet.service.decoding.cost import estimate
from rednet.service.decoding.decode import TooCostly, decode_image, draw_image
from rednet.service.decoding.limits import SMALL_CPU_LIMIT_S, DecodeLimits
from rednet.service.decoding.overlay import MAX_SIDE
from rednet.service.errors import ServiceError

SLOTS = 2  # images in the shared memory: one that has been decoded, and the next
# Slot for the pixels, length of the image that follows, height and width of the float32 map behind it, which is to be
# drawn over the image (0: no map).
REQUEST = struct.Struct("<BIII")
# Kind, seconds, length of the content that follows: an error as JSON, a cost or a PNG. Pixels are in the shared memory.
ANSWER = struct.Struct("<BdI")
DONE, FAILED, TOO_COSTLY = range(3)
# An AVIF file may claim a small size and hold a large frame, which libavif decodes and scales. (libheif refuses it.)
UNSURE_HEADERS = {"AVIF"}
UNSURE_EXTRA_BYTES = 32_000_000
COST = struct.Struct("<dQ")  # CPU time in seconds, memory in bytes


def _yield_to_the_server(nice: int, address_space_bytes: int) -> None:
    """Lower the priority of this process, and have the kernel kill it rather than the server when memory runs out."""
    os.nice(nice)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    limit_address_space(address_space_bytes)
    with suppress(OSError, ValueError):
        _limit(resource.RLIMIT_CORE, 0)


def _limit(which: int, value: int) -> None:
    _, most = resource.getrlimit(which)
    resource.setrlimit(which, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _limit_cpu(cpu_s: float) -> None:
    """Have the kernel end this process with SIGXCPU once it has used `cpu_s` more of CPU time. Time in which it waits
    for a core, or in which the machine is suspended, does not count."""
    with suppress(OSError, ValueError):
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + cpu_s))


def main() -> None:
    options = json.loads(sys.argv[1])
    preprocess, limits = Preprocess(**options["preprocess"]), DecodeLimits.from_json(options["limits"])
    small = limits.small if options["only_small"] else None
    cpu_limit_s = SMALL_CPU_LIMIT_S if small else limits.cpu_s
    shape = (SLOTS, 3, preprocess.crop, preprocess.crop)
    slots = np.frombuffer(mmap.mmap(int(sys.argv[2]), 0), np.uint8).reshape(shape)

    def answer(slot: int, data: bytes, grid: bytes, shape: tuple[int, int]) -> bytes:
        limits_of_image = ExitStack()

        def check(image: Header) -> None:
            is_unsure = image.format in UNSURE_HEADERS
            if not (small or is_unsure):
                return
            cost = estimate(image, data, MAX_SIDE if grid else 2 * preprocess.resize)
            if small and (cost.cpu_s > small.cpu_s or cost.memory_bytes > small.memory_bytes):
                raise TooCostly(cost)
            if is_unsure:
                limits_of_image.enter_context(limited_address_space(cost.memory_bytes + UNSURE_EXTRA_BYTES))

        started = time.monotonic()
        kind, content = DONE, b""
        try:
            _limit_cpu(cpu_limit_s)
            if grid:
                heat_map = np.frombuffer(grid, np.float32).reshape(shape)
                content = draw_image(data, heat_map, preprocess, limits.max_pixels, check)
            else:
                slots[slot] = decode_image(data, preprocess, limits.max_pixels, check)
        except TooCostly as refusal:
            kind, content = TOO_COSTLY, COST.pack(*refusal.cost)
        except ServiceError as error:
            kind, content = FAILED, json.dumps({"code": error.code, "message": error.message}).encode()
        finally:
            limits_of_image.close()
        return ANSWER.pack(kind, time.monotonic() - started, len(content)) + content

    Image.init()  # load Pillow's plugins now instead of with the first image
    _yield_to_the_server(options["nice"], limits.address_space_bytes)
    connection = socket.socket(fileno=0)
    connection.sendall(ANSWER.pack(DONE, 0.0, 0))  # ready
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries print warnings about damaged files, which are expected
    with connection.makefile("rb") as stream:
        while len(head := stream.read(REQUEST.size)) == REQUEST.size:
            slot, length, height, width = REQUEST.unpack(head)
            data, grid = stream.read(length), stream.read(4 * height * width)
            connection.sendall(answer(slot, data, grid, (height, width)))


if __name__ == "__main__":
    with suppress(ConnectionError):  # the server is gone
        main()
