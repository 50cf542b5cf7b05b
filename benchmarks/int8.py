"""The int8 backend compared with float32 on the same cores: interleaved calls, medians of ratios of neighbouring
calls."""

import statistics
import time

import torch

from benchmarks.measure import report
from benchmarks.network import network
from rednet import Preprocess
from rednet.model.inference.activation_ranges import collect_activation_ranges
from rednet.model.inference.int8_backend import Int8Backend
from rednet.model.inference.native_backend import NativeBackend

SIDE = 224
BUDGET_S = 6.0


def main() -> None:
    rows = []
    preprocess = Preprocess()
    for name in ("rednet50", "rednet26"):
        net = network(name)
        photos = torch.randint(0, 256, (8, 3, SIDE, SIDE), dtype=torch.uint8)
        ranges = collect_activation_ranges(net, preprocess, photos[:2])
        backends = (NativeBackend(net, preprocess), Int8Backend(net, preprocess, ranges))
        for batch in (1, 8):
            pixels = photos[:batch]
            times: list[tuple[float, ...]] = []
            for backend in backends:
                backend(pixels)
            while sum(map(sum, times)) < BUDGET_S:
                pair = []
                for backend in backends:
                    started = time.perf_counter()
                    backend(pixels)
                    pair.append(time.perf_counter() - started)
                times.append(tuple(pair))
            exact_s, int8_s = (statistics.median(each) for each in zip(*times, strict=True))
            rows.append(
                {
                    "network": name,
                    "batch": batch,
                    "float32 images/s": batch / exact_s,
                    "int8 images/s": batch / int8_s,
                    "ratio": statistics.median(exact / int8 for exact, int8 in times),
                    "pairs": len(times),
                }
            )
    report("int8", f"{SIDE}x{SIDE} pixels, random weights", rows)


if __name__ == "__main__":
    main()
