"""Involution as the paper defines it: unfold KxK windows, multiply, sum (Li et al., CVPR 2021, algorithm 1).

It is short enough to check against the paper by eye, and all other implementations are compared with it. It holds K*K
copies of its input (49 for a 7x7 kernel), so only tests and comparisons should run it.
"""

from math import isqrt

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Involution of x [B, C, H, W] with kernel [B, G, K*K, h, w]; returns [B, C, h, w]."""
    batch, groups, taps, h, w = kernel.shape
    windows = _windows(x, kernel, stride)  # [B, G, C//G, K*K, h, w]
    weighted = kernel.reshape(batch, groups, 1, taps, h, w) * windows
    return weighted.sum(dim=3).reshape(batch, x.shape[1], h, w)


def backward(grad: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and kernel from grad [B, C, h, w]; `fold` is the adjoint of `unfold`."""
    batch, groups, taps, h, w = kernel.shape
    grouped = grad.reshape(batch, groups, x.shape[1] // groups, 1, h, w)
    grad_kernel = (grouped * _windows(x, kernel, stride)).sum(dim=2)
    grad_windows = grouped * kernel.reshape(batch, groups, 1, taps, h, w)
    k = isqrt(taps)
    columns = grad_windows.reshape(batch, x.shape[1] * taps, h * w)
    grad_x = F.fold(columns, (x.shape[2], x.shape[3]), k, padding=k // 2, stride=stride)
    return grad_x, grad_kernel


def _windows(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    batch, groups, taps, h, w = kernel.shape
    k = isqrt(taps)
    columns = F.unfold(x, k, padding=k // 2, stride=stride)  # [B, C*K*K, h*w]
    return columns.reshape(batch, groups, x.shape[1] // groups, taps, h, w)
