"""From the start of the process to the first answer over HTTP, beside a bare `import torch, fastapi`."""

import io
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image

from benchmarks.measure import report

RUNS = 7
REDNET = Path(sys.executable).with_name("rednet")


def imports_s() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, fastapi"], check=True)
    return time.perf_counter() - started


def first_answer_s(photo: bytes) -> float:
    started = time.perf_counter()
    process = subprocess.Popen([REDNET, "serve", "--port", "0"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = next(found[1] for line in process.stderr if (found := re.search(r"running on (http://\S+)", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        request = urllib.request.Request(f"{url}/v1/predict", photo, {"Content-Type": "image/png"})
        while True:
            try:
                urllib.request.urlopen(request).read()
                return time.perf_counter() - started
            except urllib.error.HTTPError as error:
                if error.code != 503:  # not ready yet
                    raise
                time.sleep(0.01)
    finally:
        process.kill()
        process.wait()


def main() -> None:
    content = io.BytesIO()
    Image.effect_mandelbrot((400, 300), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(content, "PNG")
    bare, ours = [], []
    for _ in range(RUNS):  # in turns: the machine's moods hit both
        bare.append(imports_s())
        ours.append(first_answer_s(content.getvalue()))
    times = {"import torch, fastapi": bare, "rednet serve, first answer": ours}
    rows = [
        {"what": what, "median s": statistics.median(each), "min s": min(each), "max s": max(each)}
        for what, each in times.items()
    ]
    ratio = statistics.median(ours) / statistics.median(bare)
    report("startup", "start-up with the embedded checkpoint", rows, ratio=ratio)
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
