"""1x1 convolutions, which make up most of a RedNet."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution.

    In training on the CPU it is computed as a matrix product, whose gradients in bfloat16 take 0.6 of the time of a
    convolution's.

    Args:
        in_channels, out_channels, stride, bias: as for `torch.nn.Conv2d`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        eager = type(x) is Tensor and not torch.compiler.is_compiling()
        if not (self.training and eager and x.device.type == "cpu" and x.dim() == 4):
            return super().forward(x)
        x = x.permute(0, 2, 3, 1)
        if self.stride[0] > 1:
            x = _Subsample.apply(x, self.stride[0])  # type: ignore[no-untyped-call]
        return F.linear(x, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class _Subsample(torch.autograd.Function):
    """Takes every n-th pixel of every n-th row of x [B, H, W, C] in one copy; the gradient of slicing makes two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, stride: int) -> Tensor:
        return x[:, ::stride, ::stride].contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:  # noqa: ARG004  (torch's signature)
        x, ctx.stride = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros(ctx.shape)
        out[:, :: ctx.stride, :: ctx.stride] = grad
        return out, None
