"""The involution operator in C, for the CPU, on channels-last maps.

The fast case is float32 or bfloat16 with 16 channels per group and the kernels in `FAST_CASES`. Half precisions are
computed in float32; the C code converts bfloat16 in the fast case, and torch converts everything else beforehand.
Shapes and dtypes that the C code does not support run in `torch_ops`.
"""

import os
from functools import lru_cache
from math import isqrt

import torch
from torch import Tensor

from rednet.model.native import Operators
from rednet.model.ops import torch_ops

DTYPES = (torch.float32, torch.float64)
HALF_DTYPES = (torch.float16, torch.bfloat16)
FAST_CASES = ((3, 1), (7, 1), (7, 2))  # kernel size, stride
MAX_KERNEL_SIZE, MAX_SIZE = 63, 1 << 24  # as in native/engine.c


def forward(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Involution of x [B, C, H, W] with kernel [B, G, K*K, h, w]; returns [B, C, h, w]."""
    if x.dtype in HALF_DTYPES and not _fast_bfloat16(x, kernel, stride):
        return forward(x.float(), kernel.float(), stride).to(x.dtype)
    if not _fits(x, kernel):
        return torch_ops.forward(x, kernel, stride)
    x, kernel = _channels_last(x), _taps_last(kernel)
    batch, h, w = kernel.shape[:3]
    out = x.new_empty(batch, h, w, x.shape[3])
    _call(stride, [x, kernel, out], gradients=False)
    return out.permute(0, 3, 1, 2)


def backward(grad: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and kernel from grad [B, C, h, w]."""
    if x.dtype in HALF_DTYPES and not _fast_bfloat16(x, kernel, stride):
        grad_x, grad_kernel = backward(grad.float(), x.float(), kernel.float(), stride)
        return grad_x.to(x.dtype), grad_kernel.to(x.dtype)
    if not _fits(grad, x, kernel):
        return torch_ops.backward(grad, x, kernel, stride)
    grad, x, kernel = _channels_last(grad), _channels_last(x), _taps_last(kernel)
    grad_x, grad_kernel = torch.empty_like(x), torch.empty_like(kernel)
    _call(stride, [x, kernel, grad, grad_x, grad_kernel], gradients=True)
    return grad_x.permute(0, 3, 1, 2), grad_kernel.permute(0, 3, 4, 1, 2)


def _fast_bfloat16(x: Tensor, kernel: Tensor, stride: int) -> bool:
    """Whether the C code computes these tensors without a prior conversion."""
    case = (x.shape[1], isqrt(kernel.shape[2]), stride)
    return x.dtype == torch.bfloat16 and case in ((16 * kernel.shape[1], *each) for each in FAST_CASES)


def _fits(*tensors: Tensor) -> bool:
    """Whether the C code supports these tensors: in CPU memory, of one supported dtype, within its size limits."""
    x, kernel = tensors[-2:]
    alike = all(tensor.device.type == "cpu" and tensor.dtype == x.dtype for tensor in tensors)
    return (
        alike
        and x.dtype in (torch.bfloat16, *DTYPES)
        and kernel.shape[2] <= MAX_KERNEL_SIZE**2
        and max(x.shape) <= MAX_SIZE
    )


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()  # [B, H, W, C]


def _taps_last(kernel: Tensor) -> Tensor:
    return kernel.permute(0, 3, 4, 1, 2).contiguous()  # [B, h, w, G, K*K]


def _call(stride: int, tensors: list[Tensor], gradients: bool) -> None:
    x, kernel = tensors[:2]
    batch, height, width, channels = x.shape
    h, w, groups, taps = kernel.shape[1:]
    if (h, w) != (-(-height // stride), -(-width // stride)):
        raise ValueError(f"a kernel map of {h}x{w} does not fit x of {height}x{width} at stride {stride}")
    if 0 in x.shape:
        for tensor in tensors[2:]:
            tensor.zero_()
        return
    sizes = (batch, groups, channels // groups, height, width, isqrt(taps), stride, int(gradients))
    pointers = [(tensor.data_ptr(), tensor.numel()) for tensor in tensors]
    operators().involution(sizes, pointers, x.element_size())


def operators() -> Operators:
    """The C functions, with as many threads as torch uses."""
    return _operators(torch.get_num_threads())


@lru_cache(maxsize=1)
def _operators(threads: int) -> Operators:
    return Operators(threads)


os.register_at_fork(after_in_child=_operators.cache_clear)  # threads do not outlive a fork
