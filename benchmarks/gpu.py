"""All measurements on a machine with a GPU: correctness, then speed, then serving, then slow compilers.

    python -m benchmarks.gpu [--photos DIR] [--official involution_cuda.py] [--budget-s 540]

Everything is timed with CUDA events on random data, after warm-up, as medians. Each table names the card, and is
printed and written as soon as it is complete, so that an interrupted run loses nothing.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.baselines.networks import Unfolded, with_involution
from benchmarks.gpu_kernels import LAYERS, ORDERS, check_kernels, choice_rows, device_ms, layer_row
from benchmarks.gpu_serving import measure_serving
from benchmarks.measure import report
from benchmarks.network import network
from benchmarks.official import official_layer
from rednet import Preprocess, RedNet, prepare
from rednet.model.inference.cuda.conv_fallback import ConvFallback
from rednet.model.inference.cuda.network import TritonRedNet
from rednet.model.inference.fold_batchnorm import fold_batchnorm
from rednet.model.inference.preparation import DTYPES, TOLERANCE, Prepared
from rednet.model.inference.tf32 import ieee_float32
from rednet.model.ops import triton_ops as cuda

SIDE = 224
BATCHES = (1, 8, 64, 256)
PRECISIONS = ("bf16", "fp16", "fp32")
COMPILED = (("definition", 64), ("ResNet-50", 64), ("definition", 1))  # for each precision, within the time budget
Run = Callable[[Tensor], object]


def peak_rates() -> dict[str, float]:
    """The peak rates of this card: bytes copied, and matrix products."""
    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy_ms, product_ms = device_ms(lambda: target.copy_(source)), device_ms(lambda: a @ b)
    return {"copy GB/s": 2 * (1 << 30) / copy_ms / 1e6, "bf16 TFLOP/s": 2 * 8192**3 / product_ms / 1e9}


def baselines(net: RedNet, precision: str, official: Path | None) -> dict[str, Run]:
    """The alternatives of a user, by name. Each takes uint8 pixels on the device."""
    preprocess, dtype = Preprocess(crop=SIDE), DTYPES[precision]
    mean, std = (torch.tensor(each, device="cuda").reshape(3, 1, 1) for each in (preprocess.mean, preprocess.std))

    def on_pixels(module: torch.nn.Module) -> Run:
        module = module.eval().to("cuda", dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return lambda pixels: module(((pixels / 255 - mean) / std).to(dtype, memory_format=torch.channels_last))

    found = {"definition": on_pixels(with_involution(fold_batchnorm(net), Unfolded))}
    if official and precision == "fp32":  # it does not support half precision
        found["official kernel"] = on_pixels(with_involution(fold_batchnorm(net), official_layer(official)))
    try:
        from torchvision.models import resnet50
    except ImportError:
        print("no torchvision here: ResNet-50 is left out")
        return found
    return found | {"ResNet-50": on_pixels(resnet50())}


def random_pixels(batch: int) -> Tensor:
    return torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8, device="cuda")


@torch.inference_mode()
def rate_row(name: str, precision: str, run: Run, batch: int) -> dict[str, object]:
    pixels = random_pixels(batch)
    started = time.perf_counter()
    run(pixels)
    torch.cuda.synchronize()
    first_s = time.perf_counter() - started
    ms = device_ms(lambda: run(pixels))
    rate = 1000 * batch / ms
    return {
        "precision": precision,
        "network": name,
        "batch": batch,
        "ms": ms,
        "images/s": rate,
        "first call s": first_s,
    }


@torch.inference_mode()
def convolution_rows(net: RedNet, batch: int = 64) -> list[dict[str, object]]:
    """Time each convolution with bias, sum and ReLU: fused by cuDNN, and as separate operations."""
    rows: dict[object, dict[str, object]] = {}

    def both(_: ConvFallback, key: object, fused: Callable[[], Tensor], separate: Callable[[], Tensor]) -> Tensor:
        if key not in rows:
            separate_ms = device_ms(separate, 0.1)
            try:
                fused_ms = device_ms(fused, 0.1)
            except RuntimeError:
                fused_ms = float("nan")
            rows[key] = {"shape": str(key), "one pass ms": fused_ms, "several ms": separate_ms}
        return separate()

    with patch.object(ConvFallback, "run", both):
        TritonRedNet(net, Preprocess(crop=SIDE), torch.device("cuda"), torch.bfloat16)(random_pixels(batch))
    return list(rows.values())


def unseen_sizes(run: Prepared, largest: int = 64) -> float:
    """The largest ratio of a first to a later use over all batch sizes in random order, after one batch of the largest
    size."""
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
    assert compilations() == compiled, "a batch size caused a compilation"
    return max(ratios)


def compilations() -> int:
    """The number of variants of the forward kernel that Triton has compiled."""
    return sum(len(cache[0]) for cache in cuda._forward.device_caches.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="JPEG files for the requests; default: random smooth ones")
    parser.add_argument("--official", type=Path, help="the authors' file, see benchmarks/official.py; it is run")
    parser.add_argument("--budget-s", type=float, default=540, help="after which no compiler is started any more")
    options = parser.parse_args()
    ends = time.monotonic() + options.budget_s
    card = torch.cuda.get_device_name()
    check_kernels()
    most = peak_rates()
    copy = most["copy GB/s"]
    layers = [layer_row(*layer, copy, order) for layer in LAYERS for order in ORDERS]
    report("gpu-involution", f"fused involution, bfloat16, {card}, {most}", layers)
    report("gpu-strips", f"fused involution by strips and programs, bfloat16, {card}", choice_rows(copy))
    net = network("rednet50")
    report("gpu-convolutions", f"convolutions, batch 64, bfloat16, {card}", convolution_rows(net))
    compilable: list[tuple[str, str, Run, int]] = []
    for precision in PRECISIONS:
        run = prepare(net, Preprocess(crop=SIDE), "cuda", precision)
        error, tolerance = run.max_relative_error, TOLERANCE["cuda"][precision]
        found = f"{run.backend}, relative error {error:.1e} of {tolerance}; {run.rejected_backends}"
        others = baselines(net, precision, options.official)
        backends: dict[str, Run] = {"ours": run, **others}
        with ieee_float32():
            rows = [rate_row(name, precision, each, batch) for name, each in backends.items() for batch in BATCHES]
        more = {"worst_first_use": unseen_sizes(run)} if precision == "bf16" else {}
        report(f"gpu-network-{precision}", f"rednet50, {SIDE}x{SIDE}, {card}; {found}; {more}", rows, **more)
        compilable += [(name, precision, others[name], batch) for name, batch in COMPILED if name in others]
        del run, backends
        torch.cuda.empty_cache()
    measure_serving(net, options.photos)
    rows = []
    for name, precision, each, batch in compilable:
        if time.monotonic() > ends:
            print(f"no time left to compile: {name}, {precision}, batch {batch}")
            continue
        mode = "reduce-overhead" if batch == 1 else "default"  # CUDA graphs, as in our backend
        with ieee_float32():
            compiled: Run = torch.compile(each, dynamic=False, mode=mode)
            rows.append(rate_row(f"{name}, torch.compile, {mode}", precision, compiled, batch))
        report("gpu-compiled", f"{SIDE}x{SIDE}, {card}", rows)


if __name__ == "__main__":
    main()
