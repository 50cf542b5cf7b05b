"""The involution kernels on a GPU, compared with the definition and with the memory bandwidth."""

import itertools
import random
import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

import torch

from rednet.model.ops import reference
from rednet.model.ops import triton_ops as cuda

LAYERS = ((64, 56, 1), (128, 56, 2), (128, 28, 1), (256, 14, 1), (512, 7, 1))  # channels, side, stride of RedNet-50
KINDS = ((1, 16, 1), (3, 4, 2), (3, 16, 1), (7, 12, 1), (7, 16, 1), (7, 16, 2))  # kernel size, group width, stride
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}
CHOICES = tuple(itertools.product((1, 2, 4, 7), (16, 32, 64)))  # outputs per strip, strips per program
ORDERS = {"pixels last": (1, 2, 0, 3, 4), "taps last": (0, 3, 4, 1, 2)}  # of kernels [B, G, K * K, h, w] in memory


def device_ms(run: Callable[[], object], budget_s: float = 1.0) -> float:
    """The median time of a call, measured with CUDA events."""
    for _ in range(3):
        run()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < budget_s and len(times) < 100):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def check_kernels(cases: int = 40, largest_side: int = 40) -> None:
    """Compare every kernel with the definition in float64, over random shapes. A wrong value raises an error."""
    rng = random.Random(0)
    for case in range(cases):
        (k, width, stride), groups = KINDS[case % len(KINDS)], rng.randint(1, 5)
        batch, height, breadth = rng.randint(1, 5), rng.randint(1, largest_side), rng.randint(1, largest_side)
        dtype = tuple(ROUNDING)[case // len(KINDS) % len(ROUNDING)]
        torch.manual_seed(case)
        x = torch.randn(batch, groups * width, height, breadth).to("cuda", dtype)
        h, w = -(-height // stride), -(-breadth // stride)
        kernel = torch.randn(batch, groups, k * k, h, w).to("cuda", dtype)
        out = cuda.forward(x, kernel, stride)
        ours = (out, *cuda.backward(out, x, kernel, stride))
        x64, kernel64, out64 = x.double(), kernel.double(), out.double()
        exact = (reference.forward(x64, kernel64, stride), *reference.backward(out64, x64, kernel64, stride))
        for mine, right in zip(ours, exact, strict=True):
            scale = float(right.abs().max())
            torch.testing.assert_close(mine.double(), right, rtol=1.01 * ROUNDING[dtype], atol=1e-5 * max(1.0, scale))
    print(f"kernels: {cases} random shapes agree with the definition in float64")


def layer_row(channels: int, side: int, stride: int, bandwidth: float, order: str = "pixels last") -> dict[str, object]:
    """The bandwidth of the fused kernel, if it reads inputs and writes the output once, in bfloat16."""
    batch, k, out, groups = 64, 7, side // stride, channels // 16
    back = [ORDERS[order].index(axis) for axis in range(5)]
    sets = []
    for _ in range(4):  # in turns, so that inputs are not in a cache
        x = torch.randn(batch, channels, side, side, device="cuda", dtype=torch.bfloat16)
        kernel = torch.randn(batch, groups, k * k, out, out, device="cuda", dtype=torch.bfloat16)
        kernel = kernel.permute(ORDERS[order]).contiguous().permute(back)
        sets.append((x.to(memory_format=torch.channels_last), kernel))
    turns = itertools.cycle(sets)
    bias = torch.randn(groups * k * k, device="cuda", dtype=torch.bfloat16)
    scale, shift = torch.randn(2, channels, device="cuda")
    ms = device_ms(lambda: cuda.fused(*next(turns), stride, bias, scale, shift))
    x, kernel = sets[0]
    rate = 2 * (x.numel() + kernel.numel() + batch * channels * out * out) / ms / 1e6
    shape = f"{batch}x{channels}x{side}x{side} s{stride}"
    return {"shape": shape, "kernels": order, "ms": ms, "GB/s": rate, "of a copy": rate / bandwidth}


def choice_rows(bandwidth: float) -> list[dict[str, object]]:
    """The same for other sizes of strips and programs than the built-in ones, in the first and the last stage."""
    rows: list[dict[str, object]] = []
    for strip, strips in CHOICES:
        built = {"strip": strip, "strips": strips}
        with patch.multiple(cuda, STRIP=strip, BLOCK_STRIPS=strips):
            rows += [built | layer_row(*layer, bandwidth) for layer in (LAYERS[0], LAYERS[1], LAYERS[-1])]
    return rows
