"""Time from the start of the process to the first response over HTTP, compared with `import torch, fastapi`."""

import io
import statistics
import subprocess
import sys
import time

from PIL import Image

from benchmarks.measure import report
from benchmarks.server import post_when_ready, serving

RUNS = 7


def imports_s() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, fastapi"], check=True)
    return time.perf_counter() - started


def first_answer_s(photo: bytes) -> float:
    started = time.perf_counter()
    with serving() as url:
        post_when_ready(f"{url}/v1/predict", photo)
        return time.perf_counter() - started


def main() -> None:
    content = io.BytesIO()
    Image.effect_mandelbrot((400, 300), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(content, "PNG")
    bare, ours = [], []
    for _ in range(RUNS):  # interleaved, so that a slow moment of the machine affects both
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
