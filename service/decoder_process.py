"""What runs in each of the decoder's processes: photos in, pixels or pictures out, until the connection ends.

python -m service.decoder_process OPTIONS FILE    # JSON, and the descriptor of memory for pixels that is shared with
                                                  # the server; the connection is standard input

What decodes hostile images runs nothing else: it may crash, hang or be killed, and what it sends back is pixels or an
error's code, never anything that the server would execute.
"""

import importlib.util
import json
import mmap
import os
import resource
import socket
import struct
import sys
import time
import types
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

PLACES = 2  # for photos' pixels in the shared memory: of one that has been decoded, and of the next
# Place of the pixels; length of the photo that follows; height and width of the float32 map behind it, to be drawn over
# it; 0: none.
REQUEST = struct.Struct("<BIII")
MOST_MEMORY = 1_500_000_000  # bytes; a photo of 50 million pixels takes up to 800 million
# Whether it is an error, seconds, length of the error or PNG that follows. Pixels are in the shared memory.
ANSWER = struct.Struct("<BdI")


def without_pytorch() -> None:
    """Make the package `model` importable without its front door, behind which PyTorch is."""
    spec = importlib.util.find_spec("model")
    assert spec is not None
    package = types.ModuleType("model")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["model"] = package


def _spare_the_others() -> None:
    """When memory ends, it is this process that the system should take it from, and not the server; and where cores are
    short, the server, which gives work to all, goes first."""
    os.nice(5)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))


def main() -> None:
    without_pytorch()
    from model.preprocess import Preprocess
    from service.decode import decode_image, draw_image
    from service.errors import ServiceError

    options = json.loads(sys.argv[1])
    preprocess, max_pixels = Preprocess(**options["preprocess"]), options["max_pixels"]
    shape = (PLACES, 3, preprocess.crop, preprocess.crop)
    places = np.frombuffer(mmap.mmap(int(sys.argv[2]), 0), np.uint8).reshape(shape)

    def answer(place: int, photo: bytes, grid: bytes, shape: tuple[int, int]) -> bytes:
        started = time.monotonic()
        failed, content = False, b""
        try:
            if grid:
                content = draw_image(photo, np.frombuffer(grid, np.float32).reshape(shape), preprocess, max_pixels)
            else:
                places[place] = decode_image(photo, preprocess, max_pixels)
        except ServiceError as error:
            failed, content = True, json.dumps({"code": error.code, "message": error.message}).encode()
        return ANSWER.pack(failed, time.monotonic() - started, len(content)) + content

    Image.init()  # what Pillow else does for the first photo
    _spare_the_others()
    connection = socket.socket(fileno=0)
    connection.sendall(ANSWER.pack(False, 0.0, 0))  # it is up
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say of damaged files is no news, and no log line
    with connection.makefile("rb") as stream:
        while len(head := stream.read(REQUEST.size)) == REQUEST.size:
            place, length, height, width = REQUEST.unpack(head)
            photo, grid = stream.read(length), stream.read(4 * height * width)
            connection.sendall(answer(place, photo, grid, (height, width)))


if __name__ == "__main__":
    with suppress(ConnectionError):  # the server is gone
        main()
