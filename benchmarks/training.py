"""A training step of RedNet-26 (batch 64, 128x128) as `rednet train` runs it, compared with PyTorch operators."""

import argparse
import json
import subprocess
import sys

import torch
import torch.nn.functional as F

from benchmarks.measure import bars, matrix_product_gflops, median_s, report
from benchmarks.network import multiply_adds
from rednet import create_rednet
from rednet.model.ops import use
from rednet.model.training.steps import keep_freed_memory

BATCH, SIDE = 64, 128
VARIANTS = {  # implementation, memory format, whether freed memory is kept
    "native, as rednet train": ("native", torch.channels_last, True),
    "portable, same settings": ("torch", torch.channels_last, True),
    "portable": ("torch", torch.contiguous_format, False),
}


def child(variant: str) -> dict[str, object]:
    implementation, memory_format, keep = VARIANTS[variant]
    gflops = matrix_product_gflops()
    if keep:
        keep_freed_memory()
    torch.manual_seed(0)
    net = create_rednet("rednet26", num_classes=10)
    work = 3 * 2 * BATCH * multiply_adds(net.eval(), SIDE) / 1e9  # the backward pass counts as two forward passes
    net.train().to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's stubs lack it
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    x, targets = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(0, 10, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), targets).backward()
        optimizer.step()

    with use(implementation):
        step()
        step_s = median_s(step, 10.0)
    rate = work / step_s
    return {
        "variant": variant,
        "step s": step_s,
        "images/s": BATCH / step_s,
        "GFLOP/s": rate,
        "of matrix product": rate / gflops,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child)))
        return
    rows = []
    for variant in VARIANTS:
        command = [sys.executable, "-m", "benchmarks.training", "--child", variant]
        rows.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1]))
    heading = f"training step of rednet26, batch {BATCH}, {SIDE}x{SIDE}"
    report("training", heading, rows)
    bars("training", heading, "images per second", {"": {row["variant"]: row["images/s"] for row in rows}})


if __name__ == "__main__":
    main()
