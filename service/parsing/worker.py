"""The parser process: parses large bodies until the connection closes.

python -m rednet.service.parsing.worker    # the connection to the server is standard input

The process forks for every body. The child is limited to the memory and CPU time that the body may cost, never sees the
body of another request, and returns all its memory to the system when it exits. It runs nothing but `parse_body`, and
sends back only numbers and text, never anything that the server would execute.

A request is `REQUEST` and two descriptors: a file, which holds the body followed by its `BodyFormat` and `BodyLimits`
as JSON, and a socket for the reply. The reply is one line of JSON, see `reply_to`. Images are written to the file,
behind the body.
"""

import gc
import json
import mmap
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress
from dataclasses import fields
from math import ceil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import orjson

from rednet.service.errors import MalformedRequest, ServiceError
from rednet.service.parsing.bodies import BodyFormat, BodyLimits, ParsedBody
from rednet.service.parsing.body_parser import parse_body
from rednet.service.types import Upload

REQUEST = struct.Struct("<QI")  # lengths of the body and of the JSON behind it
MAX_REPLY_BYTES = 1_000_000
ALIGNMENT = 64  # of images in the file, as pixels are read as arrays

# Limits per body. A list of small integers costs the most: 32 MB of them take 0.7 s and 400 MB.
CPU_S, BYTES_PER_CPU_S = 2, 8_000_000
MEMORY_BYTES, MEMORY_PER_BYTE = 250_000_000, 25


def reply_to(fd: int, size: int, header_size: int) -> dict[str, Any]:
    """Parse the body in a file.

    Returns:
        The fields of `ParsedBody`. Each image is `[start, length, shape]` in the file, where the shape of an encoded
        photo is null, or an error message. If parsing fails: `{"error": [code, message]}` or `{"traceback": text}`.
    """
    try:
        header = json.loads(os.pread(fd, header_size, size))
        body_format, limits = BodyFormat(**header["body_format"]), BodyLimits(**header["limits"])
        with mmap.mmap(fd, size) as shared:
            reply = _stored(fd, size + header_size, parse_body(body_format, bytes(shared), limits))
            if sys.platform == "linux":
                shared.madvise(mmap.MADV_REMOVE)  # frees the body, which is not needed for another attempt any more
            return reply
    except ServiceError as error:
        return {"error": [error.code, error.message]}
    except MemoryError:
        return {"error": ["payload_too_large", "the body takes too much memory to parse"]}
    except Exception:  # noqa: BLE001  (the server logs it)
        return {"traceback": traceback.format_exc()}


def _stored(fd: int, behind: int, parsed: ParsedBody) -> dict[str, Any]:
    """Write the images behind that position of the file, on pages of their own: those of the body are freed."""
    end = -(-behind // mmap.PAGESIZE) * mmap.PAGESIZE
    images: list[Any] = []
    for image in parsed.images:
        if isinstance(image, MalformedRequest):
            images.append(image.message)
            continue
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + _write(fd, image, start)
        images.append([start, end - start, image.shape if isinstance(image, np.ndarray) else None])
    others = {each.name: getattr(parsed, each.name) for each in fields(parsed)}
    return others | {"images": images}  # orjson encodes dataclasses


def _write(fd: int, image: Upload, start: int) -> int:
    view = memoryview(np.ascontiguousarray(image) if isinstance(image, np.ndarray) else image).cast("B")  # type: ignore[arg-type]
    written = 0
    while written < len(view):
        written += os.pwrite(fd, view[written:], start + written)
    return written


class Forker:
    """Forks a process for every body, and kills it if the server closes its end of the reply socket.

    Args:
        control: connection to the server.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._replies: dict[int, socket.socket] = {}  # by process id
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        ended, signalled = os.pipe()
        os.set_blocking(signalled, False)
        self._ended = self._selector.register(ended, selectors.EVENT_READ)
        signal.set_wakeup_fd(signalled)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> None:
        """Handle requests until the server closes the connection."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._control:
                    message, fds, _, _ = socket.recv_fds(self._control, REQUEST.size, 2)
                    if not message:
                        self._kill(*self._replies)
                        return
                    self._begin(fds[0], socket.socket(fileno=fds[1]), *REQUEST.unpack(message))
                elif key == self._ended:
                    os.read(key.fd, 4096)
                    self._reap()
                elif key.data in self._replies:  # the server never sends data on it, so it has closed its end
                    self._selector.unregister(key.fileobj)
                    self._kill(key.data)

    def _begin(self, fd: int, reply: socket.socket, size: int, header_size: int) -> None:
        process = os.fork()
        if not process:
            self._parse(fd, reply, size, header_size)
        os.close(fd)
        self._replies[process] = reply
        self._selector.register(reply, selectors.EVENT_READ, process)

    def _parse(self, fd: int, reply: socket.socket, size: int, header_size: int) -> NoReturn:
        """Parse one body in the forked process and exit."""
        try:
            for other in (*self._replies.values(), self._control):  # otherwise the server would not see them close
                other.close()
            _limit(resource.RLIMIT_CPU, CPU_S + ceil(size / BYTES_PER_CPU_S))
            _limit(resource.RLIMIT_AS, _address_space() + MEMORY_BYTES + MEMORY_PER_BYTE * size)
            line = orjson.dumps(reply_to(fd, size, header_size)) + b"\n"
            if len(line) > MAX_REPLY_BYTES:
                line = orjson.dumps({"error": ["payload_too_large", "the id in the body is too long"]}) + b"\n"
            reply.sendall(line)
            os._exit(0)
        finally:
            os._exit(1)

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                process, status = ended
                reply = self._replies.pop(process)
                with suppress(KeyError):
                    self._selector.unregister(reply)
                with suppress(OSError):  # the server has closed its end
                    if status:
                        reply.sendall(orjson.dumps({"exit_status": os.waitstatus_to_exitcode(status)}) + b"\n")
                reply.close()

    def _kill(self, *processes: int) -> None:
        for process in processes:
            os.kill(process, signal.SIGKILL)


def _limit(which: int, value: int) -> None:
    with suppress(OSError, ValueError):  # a lower limit is in force
        resource.setrlimit(which, (value, value + 1))  # soft limit: SIGXCPU; hard limit: SIGKILL


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    except OSError:
        return 2_000_000_000


def main() -> None:
    # Supervisors and terminals send these to all processes, but a draining server still needs its parser.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    os.nice(5)  # the server has priority
    with suppress(OSError):  # when memory runs out, the kernel should kill this process
        Path("/proc/self/oom_score_adj").write_text("1000")
    gc.freeze()  # so that the garbage collector of a child does not touch these objects, whose memory it shares
    Forker(socket.socket(fileno=0)).run()


if __name__ == "__main__":
    main()
    os._exit(0)
