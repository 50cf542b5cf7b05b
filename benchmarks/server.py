"""A `rednet serve` process for benchmarks."""

import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def serving(*options: object) -> Iterator[str]:
    """The address of a `rednet serve` with these options, when its port is open."""
    command = [sys.executable, "-m", "rednet", "serve", "--port", "0", *map(str, options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = next((found[1] for line in process.stderr if (found := re.search(r"running on (http://\S+)", line))), "")
        if not url:
            raise RuntimeError(f"{' '.join(command)} ended with status {process.wait()}")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield url
    finally:
        process.kill()
        process.wait()


def post_when_ready(url: str, body: bytes) -> bytes:
    """The response to a photo, which is sent again until the server is ready."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/octet-stream"})
    while True:
        try:
            with urllib.request.urlopen(request) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            time.sleep(0.01)
