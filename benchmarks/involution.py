"""Forward pass and both gradients of one involution, for each implementation."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import bars, matrix_product_gflops, median_s, report
from rednet import involution
from rednet.model.ops import IMPLEMENTATIONS, use

SHAPES = (  # batch, channels, side, kernel size, stride: layers of RedNet-50 at 224 pixels, batch 8; of training at 128
    (8, 64, 56, 7, 1),
    (8, 128, 28, 7, 1),
    (8, 256, 14, 7, 1),
    (8, 512, 7, 7, 1),
    (8, 128, 56, 7, 2),
    (64, 64, 32, 7, 1),
    (64, 32, 64, 3, 1),
)


def with_gradients(x: Tensor, kernel: Tensor, stride: int) -> None:
    leaves = x.detach().requires_grad_(), kernel.detach().requires_grad_()
    involution(*leaves, stride).sum().backward()


def main() -> None:
    gflops = matrix_product_gflops()
    rows = []
    series: dict[str, dict[str, float]] = {}
    for batch, channels, side, k, stride in SHAPES:
        x = torch.randn(batch, channels, side, side).to(memory_format=torch.channels_last)
        out = side // stride
        kernel = torch.randn(batch, out, out, channels // 16, k * k).permute(0, 3, 4, 1, 2)
        work = 2 * batch * channels * out * out * k * k / 1e9
        shape = f"{batch}x{channels}x{side}x{side} K{k} s{stride}"
        for name in IMPLEMENTATIONS:
            with use(name):
                forward_s = median_s(partial(involution, x, kernel, stride), 1.0)
                both_s = median_s(partial(with_gradients, x, kernel, stride), 1.0)
            rows.append(
                {
                    "shape": shape,
                    "implementation": name,
                    "forward ms": 1000 * forward_s,
                    "with gradients ms": 1000 * both_s,
                    "GFLOP/s forward": work / forward_s,
                    "of matrix product": work / forward_s / gflops,
                }
            )
            series.setdefault(name, {})[shape] = 1000 * both_s
    report("involution", "involution, float32, channels-last", rows)
    bars("involution", "involution with both gradients", "ms", series)


if __name__ == "__main__":
    main()
