"""What runs in each of the decoder's processes: photos in, pixels or pictures out, until the connection ends.

python -m service.decoder_process OPTIONS    # JSON; the connection is standard input

What decodes hostile images runs nothing else: it may crash, hang or be killed, and what it sends back is pixels or an
error's code, never anything that the server would execute.
"""

import importlib.util
import json
import os
import socket
import struct
import sys
import time
import types
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Length of the photo that follows; height and width of the float32 map behind it, to be drawn over it; 0: none.
REQUEST = struct.Struct("<III")
ANSWER = struct.Struct("<BdI")  # whether it is an error, seconds, length of the pixels, PNG or error that follow


def without_pytorch() -> None:
    """Make the package `model` importable without its front door, behind which PyTorch is."""
    spec = importlib.util.find_spec("model")
    assert spec is not None
    package = types.ModuleType("model")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["model"] = package


def _requests(connection: socket.socket) -> Iterator[tuple[bytes, NDArray[np.float32] | None]]:
    """Photos, each with the map to draw over it, or None: it is to be decoded."""
    with connection.makefile("rb") as stream:
        while len(head := stream.read(REQUEST.size)) == REQUEST.size:
            length, height, width = REQUEST.unpack(head)
            photo, grid = stream.read(length), stream.read(4 * height * width)
            yield photo, np.frombuffer(grid, np.float32).reshape(height, width) if grid else None


def main() -> None:
    without_pytorch()
    from model.preprocess import Preprocess
    from service.decode import decode_image, draw_image
    from service.errors import ServiceError

    options = json.loads(sys.argv[1])
    preprocess, max_pixels = Preprocess(**options["preprocess"]), options["max_pixels"]
    Image.init()  # what Pillow else does for the first photo
    connection = socket.socket(fileno=0)
    connection.sendall(ANSWER.pack(False, 0.0, 0))  # it is up
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say of damaged files is no news, and no log line
    for photo, grid in _requests(connection):
        started = time.monotonic()
        failed = False
        try:
            if grid is None:
                content = decode_image(photo, preprocess, max_pixels).tobytes()
            else:
                content = draw_image(photo, grid, preprocess, max_pixels)
        except ServiceError as error:
            failed, content = True, json.dumps({"code": error.code, "message": error.message}).encode()
        connection.sendall(ANSWER.pack(failed, time.monotonic() - started, len(content)) + content)


if __name__ == "__main__":
    with suppress(ConnectionError):  # the server is gone
        main()
