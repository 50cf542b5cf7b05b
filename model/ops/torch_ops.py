"""The involution operator in plain torch, for any device: one multiply-add of shifted views per tap.

It needs no buffer of K*K copies. The batch is the last dimension while the taps are summed: a shifted window is a
strided view that is contiguous only along its last dimension, so inner loops stay long even for the 7x7 maps of the
last stage (batch 64, 6x6 maps: 4.6 ms instead of 17 ms on two cores). Sums are accumulated in at least float32.
"""

from collections.abc import Iterator
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Involution of x [B, C, H, W] with kernel [B, G, K*K, h, w]; returns [B, C, h, w]."""
    batch, groups, taps, h, w = kernel.shape
    padded = _padded(x, groups, isqrt(taps))
    weights = _batch_last(kernel)  # [G, K*K, h, w, B]
    out = padded.new_zeros(groups, x.shape[1] // groups, h, w, batch)
    for tap, window in _windows(padded, taps, h, w, stride):
        out.addcmul_(window, weights[:, tap].unsqueeze(1))
    return _batch_first(out).reshape(batch, x.shape[1], h, w).to(x.dtype)


def backward(grad: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and kernel from grad [B, C, h, w]."""
    batch, groups, taps, h, w = kernel.shape
    k = isqrt(taps)
    padded = _padded(x, groups, k)
    weights = _batch_last(kernel)
    grad_out = _batch_last(grad.reshape(batch, groups, x.shape[1] // groups, h, w))  # [G, C//G, h, w, B]
    grad_padded = torch.zeros_like(padded)
    grad_weights = torch.empty_like(weights)
    product = torch.empty_like(grad_out)
    windows = _windows(padded, taps, h, w, stride)
    grad_windows = _windows(grad_padded, taps, h, w, stride)
    for (tap, window), (_, grad_window) in zip(windows, grad_windows, strict=True):
        grad_window.addcmul_(grad_out, weights[:, tap].unsqueeze(1))
        torch.mul(window, grad_out, out=product)
        torch.sum(product, dim=1, out=grad_weights[:, tap])
    height, width = x.shape[2:]
    grad_x = grad_padded[:, :, k // 2 : k // 2 + height, k // 2 : k // 2 + width]
    return _batch_first(grad_x).reshape(x.shape).to(x.dtype), _batch_first(grad_weights).to(kernel.dtype)


def _windows(padded: Tensor, taps: int, h: int, w: int, stride: int) -> Iterator[tuple[int, Tensor]]:
    """For each tap, the view [G, C//G, h, w, B] of the pixels that it multiplies."""
    k = isqrt(taps)
    for tap in range(taps):
        top, left = divmod(tap, k)
        yield tap, padded[:, :, top : top + (h - 1) * stride + 1 : stride, left : left + (w - 1) * stride + 1 : stride]


def _padded(x: Tensor, groups: int, k: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = _batch_last(x.reshape(batch, groups, channels // groups, height, width))
    return F.pad(x, (0, 0, k // 2, k // 2, k // 2, k // 2))  # [G, C//G, H+K-1, W+K-1, B]


def _batch_last(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().to(torch.promote_types(x.dtype, torch.float32))


def _batch_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous()
