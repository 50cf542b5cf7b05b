"""The network on the CPU for several batch sizes, compared with the baselines.

Each baseline runs in a separate process, for its own peak memory and time to a first result. All compute the same
network from the same bytes. Rates are compared with the machine's matrix product, measured in the same process.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.baselines.networks import ANY_BATCH, BASELINES, Pixels, Run
from benchmarks.measure import bars, matrix_product_gflops, median_s, report
from rednet import Preprocess, RedNet, create_rednet
from rednet.model.nn.involution import Involution

ORDER = 33  # largest batch size of the random order


def network(name: str) -> RedNet:
    """A network of random weights whose activations stay in range."""
    torch.manual_seed(0)
    net = create_rednet(name).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
    return net


def multiply_adds(net: RedNet, side: int) -> int:
    """Multiply-adds of one image, counted while the network runs."""
    count = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal count
        match module:
            case nn.Conv2d():
                count += out.numel() * module.weight[0].numel()
            case nn.Linear():
                count += module.weight.numel()
            case Involution():
                count += out.numel() * module.kernel_size**2

    handles = [module.register_forward_hook(add) for module in net.modules()]
    with torch.inference_mode():
        net(torch.zeros(1, 3, side, side))
    for handle in handles:
        handle.remove()
    return count


def child(baseline: str, name: str, side: int, batches: list[int]) -> dict[str, Any]:
    """All measurements of one baseline, in its own process."""
    net, preprocess = network(name), Preprocess(resize=side, crop=side)
    photos = np.random.default_rng(0).integers(0, 256, (max(*batches, ORDER), 3, side, side), dtype=np.uint8)
    gflops = matrix_product_gflops()
    gmacs = multiply_adds(net, side) / 1e9
    base_mb = _peak_mb()
    rows: list[dict[str, Any]] = []
    run: Run | None = None
    for batch in batches:
        started = time.perf_counter()
        if run is None or baseline not in ANY_BATCH:
            run = BASELINES[baseline](net, preprocess, batch)
        run(photos[:batch])
        first_s = time.perf_counter() - started
        batch_s = median_s(partial(run, photos[:batch]))
        rate = batch / batch_s
        rows.append(
            {
                "network": name,
                "baseline": baseline,
                "batch": batch,
                "images/s": rate,
                "ms": 1000 * batch_s,
                "first answer s": first_s,
                "GFLOP/s": 2 * gmacs * rate,
                "of matrix product": 2 * gmacs * rate / gflops,
                "peak MB": _peak_mb(),
                "of it before": base_mb,
            }
        )
    return {"rows": rows, "order": in_random_order(run, photos) if baseline == "ours" and run else None}


def in_random_order(run: Run, photos: Pixels) -> float:
    """The largest ratio of a batch size's first use to the uses right after it, over all sizes up to 33 in random
    order."""
    run(photos[:1])
    ratios = []
    for batch in random.Random(0).sample(range(1, ORDER + 1), ORDER):
        times = []
        for _ in range(4):  # immediately, so that a slow moment of the machine affects all of them
            started = time.perf_counter()
            run(photos[:batch])
            times.append(time.perf_counter() - started)
        ratios.append(times[0] / statistics.median(times[1:]))
    return max(ratios)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="rednet50")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--baselines", nargs="+", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--child", choices=BASELINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.network, options.side, options.batches)))
        return
    rows: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    for baseline in options.baselines:
        print(f"{baseline} ...", file=sys.stderr)
        batches = [str(batch) for batch in options.batches]
        command = [sys.executable, "-m", "benchmarks.network", "--child", baseline, "--network", options.network]
        command += ["--side", str(options.side), "--batches", *batches]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"{baseline} failed", file=sys.stderr)
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        rows += result["rows"]
        if result["order"]:
            more["first use in random order, ratio"] = result["order"]
    name = f"network-{options.network}-{options.side}"
    heading = f"{options.network}, {options.side}x{options.side}, float32"
    report(name, heading, rows, **more)
    print(more)
    series = {f"batch {b}": {r["baseline"]: r["images/s"] for r in rows if r["batch"] == b} for b in options.batches}
    bars(name, heading, "images per second", series)


if __name__ == "__main__":
    main()
