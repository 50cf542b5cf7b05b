"""Batch norm fused with the residual add and the ReLU after it, for training in bfloat16 on the CPU.

Separate torch operations read and write each map eight times in a forward pass; the C code does so three times.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rednet.model.native import unavailable
from rednet.model.ops.native_ops import operators

STATISTICS, NORMALISE, GRADIENT_SUMS, GRADIENTS = range(4)  # passes of native/batch_norm.h
MAX_BLOCKS, ROWS_PER_BLOCK = 64, 256  # blocks of partial sums, and so results, depend only on the map
CHANNEL_MULTIPLE = 16  # torch is faster where the channels do not fill whole vectors


def batch_norm(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None, *, relu: bool = True) -> Tensor:
    """`norm(x)`, plus `shortcut` if there is one, and then ReLU if `relu`.

    Args:
        norm: a batch norm, or the module that replaces it in a network for inference.
        x: [B, C, H, W].
        shortcut: [B, C, H, W], or None to add nothing.
        relu: whether a ReLU follows.
    """
    if (
        _is_ordinary(norm)
        and _is_supported(x)
        and (shortcut is None or (_is_supported(shortcut) and shortcut.shape == x.shape))
    ):
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        result: Tensor = _BatchNorm.apply(x, norm.weight, norm.bias, shortcut, norm, relu)  # type: ignore[no-untyped-call]
        return result
    x = norm(x)
    if shortcut is not None:
        x = x + shortcut
    return F.relu(x) if relu else x


def _is_ordinary(norm: nn.Module) -> bool:
    """Whether the module is an ordinary batch norm in training mode, without hooks."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and not (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks)
    )


def _is_supported(x: Tensor) -> bool:
    """Whether the C code supports this map."""
    return (
        type(x) is Tensor
        and (x.device.type, x.dtype) == ("cpu", torch.bfloat16)
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.shape[1] % CHANNEL_MULTIPLE == 0
        and x.numel() > x.shape[1]  # torch raises an error for the variance of one value
        and not (unavailable() or torch.compiler.is_compiling())
    )


class _BatchNorm(torch.autograd.Function):
    """Adds up the partial sums in float64 and derives the factors of each channel from them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, norm: nn.BatchNorm2d, relu: bool
    ) -> Tensor:
        rows = x.numel() // x.shape[1]
        pivot = x[0, :, 0, 0].float()  # subtracted first, so that a large mean costs the variance no precision
        mean, square = _sums(STATISTICS, x, a=pivot) / rows
        variance = (square - mean * mean).clamp_min(0)
        mean = mean + pivot
        _track(norm, mean, variance * (rows / (rows - 1)))
        rstd = (variance + norm.eps).rsqrt()
        scale = weight * rstd
        y = torch.empty_like(x)
        _run(NORMALISE, x, relu=relu, a=scale, b=bias - mean * scale, shortcut=shortcut, out=y)
        ctx.save_for_backward(x, y if relu else None, weight, bias, shortcut, mean, rstd)
        ctx.eps = norm.eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, shortcut, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second-order gradient, for which torch has rules
            gradients = _differentiable_gradients(grad, x, weight, bias, shortcut, ctx.eps, y is not None)
            return *gradients, None, None
        grad = grad.contiguous(memory_format=torch.channels_last)
        rows = x.numel() // x.shape[1]
        grad_bias, products = _sums(GRADIENT_SUMS, x, grad=grad, y=y, a=mean)
        a = weight * rstd
        b = -a * rstd * rstd * products / rows
        c = -a * grad_bias / rows - b * mean
        grad_x, grad_shortcut = torch.empty_like(x), None if shortcut is None else torch.empty_like(x)
        _run(GRADIENTS, x, grad=grad, y=y, a=a, b=b, c=c, out=grad_x, grad_shortcut=grad_shortcut)
        return grad_x, (products * rstd).to(weight.dtype), grad_bias.to(bias.dtype), grad_shortcut, None, None


def _differentiable_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and shortcut as differentiable torch operations."""
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    if shortcut is not None:
        y = y + shortcut
    y = F.relu(y) if relu else y
    inputs = (x, weight, bias) if shortcut is None else (x, weight, bias, shortcut)
    leaves = [each for each in inputs if each.requires_grad]
    gradients = dict(zip(map(id, leaves), torch.autograd.grad(y, leaves, grad, create_graph=True), strict=True))
    return tuple(gradients.get(id(each)) for each in (x, weight, bias, shortcut))


def _track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Update the running statistics."""
    assert norm.momentum is not None
    for running, new in ((norm.running_mean, mean), (norm.running_var, variance)):
        assert running is not None
        running.lerp_(new.to(running.dtype), norm.momentum)


def _sums(batch_norm_pass: int, x: Tensor, a: Tensor, grad: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """Two sums over all rows, in float64: [2, C]."""
    sums = x.new_zeros(_blocks(x), 2, x.shape[1], dtype=torch.float32)
    _run(batch_norm_pass, x, a=a, grad=grad, y=y, sums=sums)
    return sums.double().sum(0)


def _blocks(x: Tensor) -> int:
    return max(1, min(MAX_BLOCKS, x.numel() // x.shape[1] // ROWS_PER_BLOCK))


def _run(batch_norm_pass: int, x: Tensor, *, relu: bool = False, **arrays: Tensor | None) -> None:
    names = ("grad", "y", "shortcut", "a", "b", "c", "sums", "out", "grad_shortcut")
    tensors = [x, *(arrays.get(name) for name in names)]
    tensors[4:7] = [each if each is None else each.float() for each in tensors[4:7]]  # a, b, c
    pointers = [(None, 0) if each is None else (each.data_ptr(), each.numel()) for each in tensors]
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    operators().batch_norm((batch_norm_pass, rows, channels, _blocks(x), int(relu)), pointers)
