"""A whole measured visit to a machine with a GPU, under ten minutes: correctness first, then speed, then serving.

    python -m benchmarks.gpu [--photos DIR]

Everything is timed by the device's own clock on random data, after warm-up, as medians; each table names the card.
"""

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_serving import measure_serving
from benchmarks.measure import report
from benchmarks.network import network
from benchmarks.peers import Unfolded, with_involution
from model import Preprocess, RedNet, prepare
from model.exact import exact_float32
from model.folded import folded
from model.kernels import cuda, reference
from model.prepare import DTYPES, TOLERANCE, Prepared

SIDE = 224
BATCHES = (1, 8, 64, 256)
LAYERS = ((64, 56, 1), (128, 56, 2), (128, 28, 1), (256, 14, 1), (512, 7, 1))  # channels, side, stride of RedNet-50
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def device_ms(run: Callable[[], object], budget_s: float = 1.0) -> float:
    """The median time of a call by the device's clock."""
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


def ceilings() -> dict[str, float]:
    """What this card can do at most: bytes copied, and products of matrices."""
    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy_ms, product_ms = device_ms(lambda: target.copy_(source)), device_ms(lambda: a @ b)
    return {"copy GB/s": 2 * (1 << 30) / copy_ms / 1e6, "bf16 TFLOP/s": 2 * 8192**3 / product_ms / 1e9}


def check_kernels(cases: int = 40) -> None:
    """Every kernel against the definition in float64, over random shapes; a wrong value ends the visit."""
    rng = random.Random(0)
    for case in range(cases):
        groups, width, k, stride = rng.randint(1, 5), rng.choice((4, 12, 16)), rng.choice((1, 3, 7)), rng.randint(1, 2)
        batch, height, breadth = rng.randint(1, 5), rng.randint(1, 40), rng.randint(1, 40)
        dtype = rng.choice(tuple(ROUNDING))
        make = torch.Generator("cuda").manual_seed(case)
        x = torch.randn(batch, groups * width, height, breadth, device="cuda", generator=make).to(dtype)
        h, w = -(-height // stride), -(-breadth // stride)
        kernel = torch.randn(batch, groups, k * k, h, w, device="cuda", generator=make).to(dtype)
        out = cuda.forward(x, kernel, stride)
        ours = (out, *cuda.backward(out, x, kernel, stride))
        x64, kernel64, out64 = x.double(), kernel.double(), out.double()
        exact = (reference.forward(x64, kernel64, stride), *reference.backward(out64, x64, kernel64, stride))
        for mine, right in zip(ours, exact, strict=True):
            scale = float(right.abs().max())
            torch.testing.assert_close(mine.double(), right, rtol=1.01 * ROUNDING[dtype], atol=1e-5 * max(1.0, scale))
    print(f"kernels: {cases} random shapes agree with the definition in float64")


def involution_row(channels: int, side: int, stride: int, bandwidth: float) -> dict[str, object]:
    """How close the fused kernel comes to reading its inputs and writing its output once."""
    batch, k, out, groups = 64, 7, side // stride, channels // 16
    sets = []
    for _ in range(4):  # in turns, so that no cache holds what is read
        x = torch.randn(batch, channels, side, side, device="cuda", dtype=torch.bfloat16)
        kernel = torch.randn(batch, out, out, groups, k * k, device="cuda", dtype=torch.bfloat16)
        sets.append((x.to(memory_format=torch.channels_last), kernel.permute(0, 3, 4, 1, 2)))
    turns = itertools.cycle(sets)
    bias = torch.randn(groups * k * k, device="cuda", dtype=torch.bfloat16)
    scale, shift = torch.randn(2, channels, device="cuda")
    ms = device_ms(lambda: cuda.fused(*next(turns), stride, bias, scale, shift))
    moved = 2 * batch * (channels * side**2 + groups * k * k * out**2 + channels * out**2)
    rate = moved / ms / 1e6
    shape = f"{batch}x{channels}x{side}x{side} s{stride}"
    return {"shape": shape, "ms": ms, "GB/s": rate, "of a copy": rate / bandwidth}


def forms(net: RedNet, precision: str) -> dict[str, Callable[[Tensor], object]]:
    """What a user would pick, by name; each takes uint8 pixels that are on the device."""
    preprocess, dtype = Preprocess(crop=SIDE), DTYPES[precision]
    mean, std = (torch.tensor(each, device="cuda").reshape(3, 1, 1) for each in (preprocess.mean, preprocess.std))

    def on_pixels(run: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
        return lambda pixels: run(((pixels / 255 - mean) / std).to(dtype, memory_format=torch.channels_last))

    definition = with_involution(folded(net), Unfolded).to("cuda", dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found: dict[str, Callable[[Tensor], object]] = {
        "ours": prepare(net, preprocess, "cuda", precision),
        "definition, eager": on_pixels(definition),
        "definition, torch.compile": on_pixels(torch.compile(definition, dynamic=False)),
    }
    try:
        from torchvision.models import resnet50
    except ImportError:
        print("no torchvision here: ResNet-50 is left out")
        return found
    resnet = resnet50().eval().to("cuda", dtype).to(memory_format=torch.channels_last)
    return found | {"ResNet-50, eager": on_pixels(resnet), "ResNet-50, torch.compile": on_pixels(torch.compile(resnet))}


@torch.inference_mode()
def network_rows(net: RedNet, precision: str, compile_budget_s: float) -> list[dict[str, object]]:
    """Rates of every form; compiling goes on for other batch sizes as long as its budget lasts."""
    rows: list[dict[str, object]] = []
    spent_s = 0.0
    for name, run in forms(net, precision).items():
        for batch in BATCHES if "compile" not in name else (64, 1):
            if "compile" in name and spent_s > compile_budget_s:
                continue
            pixels = torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8, device="cuda")
            started = time.perf_counter()
            run(pixels)
            torch.cuda.synchronize()
            first_s = time.perf_counter() - started
            spent_s += first_s if "compile" in name else 0.0
            ms = device_ms(lambda run=run, pixels=pixels: run(pixels))  # type: ignore[misc]
            rows.append(
                {"precision": precision, "form": name, "batch": batch, "ms": ms, "images/s": 1000 * batch / ms}
                | {"first call s": first_s}
            )
    return rows


def unseen_sizes(run: Prepared, largest: int = 64) -> float:
    """After one batch of the largest size, every other in random order: the worst first use beside the next ones."""
    compiled = compilations()
    run(torch.zeros(largest, 3, SIDE, SIDE, dtype=torch.uint8)).logits.cpu()
    ratios = []
    for batch in random.Random(0).sample(range(1, largest + 1), largest):
        pixels = torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            run(pixels).logits.cpu()
            times.append(time.perf_counter() - started)
        ratios.append(times[0] / statistics.median(times[1:]))
    assert compilations() == compiled, "a batch size was compiled for"
    return max(ratios)


def compilations() -> int:
    """How many forms of the forward kernel Triton has compiled."""
    return sum(len(cache[0]) for cache in cuda._forward.device_caches.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="JPEG files for the requests; default: random smooth ones")
    parser.add_argument("--compile-budget-s", type=float, default=60, help="for torch.compile, in each precision")
    options = parser.parse_args()
    card = torch.cuda.get_device_name()
    check_kernels()
    net = network("rednet50")
    most = ceilings()
    layers = [involution_row(*layer, most["copy GB/s"]) for layer in LAYERS]
    report("gpu-involution", f"fused involution, bfloat16, {card}, {most}", layers)
    rows: list[dict[str, object]] = []
    for precision in DTYPES:
        run = prepare(net, Preprocess(crop=SIDE), "cuda", precision)
        print(
            f"{precision}: {run.backend}, deviates by {run.deviation:.1e} of {TOLERANCE[precision]}; {run.passed_over}"
        )
        with exact_float32():
            rows += network_rows(net, precision, options.compile_budget_s)
    first = unseen_sizes(prepare(net, Preprocess(crop=SIDE), "cuda", "bf16"))
    report("gpu-network", f"rednet50, {SIDE}x{SIDE}, {card}", rows, worst_first_use=first)
    print(f"first use of a batch size, the worst beside the next uses: {first:.2f}")
    measure_serving(net, options.photos)


if __name__ == "__main__":
    main()
