"""What runs in each of the decoder's processes: photos in, pixels out, until the connection ends.

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

REQUEST = struct.Struct("<I")  # length of the photo that follows
ANSWER = struct.Struct("<BdI")  # whether it is an error, seconds, length of the pixels or the error that follow


def without_pytorch() -> None:
    """Make the package `model` importable without its front door, behind which PyTorch is."""
    spec = importlib.util.find_spec("model")
    assert spec is not None
    package = types.ModuleType("model")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["model"] = package


def _photos(connection: socket.socket) -> Iterator[bytes]:
    with connection.makefile("rb") as stream:
        while len(head := stream.read(REQUEST.size)) == REQUEST.size:
            yield stream.read(REQUEST.unpack(head)[0])


def main() -> None:
    without_pytorch()
    from model.preprocess import Preprocess
    from service.decode import decode_image
    from service.errors import ServiceError

    options = json.loads(sys.argv[1])
    preprocess = Preprocess(**options["preprocess"])
    connection = socket.socket(fileno=0)
    connection.sendall(ANSWER.pack(False, 0.0, 0))  # it is up
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say of damaged files is no news, and no log line
    for photo in _photos(connection):
        started = time.monotonic()
        failed = False
        try:
            content = decode_image(photo, preprocess, options["max_pixels"]).tobytes()
        except ServiceError as error:
            failed, content = True, json.dumps({"code": error.code, "message": error.message}).encode()
        connection.sendall(ANSWER.pack(failed, time.monotonic() - started, len(content)) + content)


if __name__ == "__main__":
    with suppress(ConnectionError):  # the server is gone
        main()
