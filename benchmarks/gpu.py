"""All measurements on a machine with a GPU: correctness, then speed, then serving, then slow compilers.

    python -m benchmarks.gpu [--photos DIR] [--official involution_cuda.py] [--only network-bf16 ...] [--budget-s 560]

Everything is timed with CUDA events on random data, after warm-up, as medians. Each section is a process of its own;
`build/benchmarks/gpu.tar.gz` has all logs and tables. Run `benchmarks.gpu_first` first.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import sections
from benchmarks.baselines.networks import Unfolded, with_involution
from benchmarks.gpu_kernels import LAYERS, ORDERS, check_kernels, choice_rows, device_ms, layer_row
from benchmarks.measure import report
from benchmarks.network import network
from benchmarks.official import official_layer
from benchmarks.sections import Section
from rednet import Preprocess, RedNet, prepare
from rednet.model.inference.cuda.conv_fallback import ConvFallback
from rednet.model.inference.cuda.network import TritonRedNet
from rednet.model.inference.fold_batchnorm import fold_batchnorm
from rednet.model.inference.preparation import DTYPES, TOLERANCE, Prepared
from rednet.model.inference.tf32 import ieee_float32
from rednet.model.ops import triton_ops as cuda

NAME = "gpu"
SIDE = 224
BATCHES = (1, 8, 64, 256)
PRECISIONS = ("bf16", "fp16", "fp32")
COMPILED = (("definition", 64), ("ResNet-50", 64), ("definition", 1))  # for each precision
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


def measure_involution(_: argparse.Namespace) -> None:
    most = peak_rates()
    rows = [layer_row(*layer, most["copy GB/s"], order) for layer in LAYERS for order in ORDERS]
    report(f"{NAME}/involution", f"fused involution, bfloat16, {card()}, {most}", rows)


def measure_strips(_: argparse.Namespace) -> None:
    rows = choice_rows(peak_rates()["copy GB/s"])
    report(f"{NAME}/strips", f"fused involution by strips and programs, bfloat16, {card()}", rows)


def measure_convolutions(_: argparse.Namespace) -> None:
    rows = convolution_rows(network("rednet50"))
    report(f"{NAME}/convolutions", f"convolutions, batch 64, bfloat16, {card()}", rows)


def measure_network(precision: str, options: argparse.Namespace) -> None:
    net = network("rednet50")
    run = prepare(net, Preprocess(crop=SIDE), "cuda", precision)
    error, tolerance = run.max_relative_error, TOLERANCE["cuda"][precision]
    found = f"{run.backend}, relative error {error:.1e} of {tolerance}; {run.rejected_backends}"
    more = {"worst_first_use": unseen_sizes(run)} if precision == "bf16" else {}
    backends: dict[str, Run] = {"ours": run, **baselines(net, precision, options.official)}
    rows: list[dict[str, object]] = []
    with ieee_float32():
        for name, each in backends.items():
            for batch in BATCHES:
                rows.append(rate_row(name, precision, each, batch))
                heading = f"rednet50, {SIDE}x{SIDE}, {card()}; {found}; {more}"
                report(f"{NAME}/network-{precision}", heading, rows, **more)


def measure_compiled(name: str, batch: int, precision: str, options: argparse.Namespace) -> None:
    each = baselines(network("rednet50"), precision, options.official)[name]
    mode = "reduce-overhead" if batch == 1 else "default"  # CUDA graphs, as in our backend
    with ieee_float32():
        compiled: Run = torch.compile(each, dynamic=False, mode=mode)
        row = rate_row(f"{name}, torch.compile, {mode}", precision, compiled, batch)
    report(f"{NAME}/compiled-{name}-{batch}-{precision}", f"{SIDE}x{SIDE}, {card()}", [row])


def measure_server(options: argparse.Namespace) -> None:
    from benchmarks.gpu_serving import measure_serving  # it needs the server's packages

    measure_serving(network("rednet50"), options.photos, f"{NAME}/serving")


def card() -> str:
    return torch.cuda.get_device_name()


SECTIONS = {
    "kernels": Section(lambda _: check_kernels(), 120),
    "involution": Section(measure_involution, 60),
    "convolutions": Section(measure_convolutions, 40),
    **{f"network-{each}": Section(partial(measure_network, each), 150) for each in PRECISIONS},
    "serving": Section(measure_server, 200),
    **{
        f"compiled-{name}-{batch}-{precision}": Section(partial(measure_compiled, name, batch, precision), 180)
        for precision in PRECISIONS
        for name, batch in COMPILED
    },
    "strips": Section(measure_strips, 130),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="JPEG files for the requests; default: random smooth ones")
    parser.add_argument("--official", type=Path, help="the authors' file, see benchmarks/official.py; it is run")
    sys.exit(sections.main(NAME, "benchmarks.gpu", SECTIONS, parser))


if __name__ == "__main__":
    main()
