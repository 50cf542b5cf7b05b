"""Triton on CUDA, for every shape by one compilation per kernel size, stride, group width and dtype.

Everything lies channels-last in memory, as convolutions leave it there: then the channels of a group at a pixel are one
short contiguous run, and so are the taps of its kernel. A program computes some pixels of one group. Sums are kept in
float32 (float64 for float64).

Batch, height and width are plain arguments, and Triton is told not to compile anew for values it finds special.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import portable

PIXELS = 64  # of a program
SHAPES = ("pixels", "height", "width", "h", "w", "groups")  # the arguments that no compilation may depend on


@triton.jit
def _window(pixel, h, w, K: tl.constexpr, STRIDE: tl.constexpr):
    """Image, row and column of the first tap of outputs that are numbered through [B, h, w]."""
    return pixel // (h * w), pixel // w % h * STRIDE - K // 2, pixel % w * STRIDE - K // 2


@triton.jit
def _channels(tensor, pixel, valid, group, groups, GROUP: tl.constexpr, LANES: tl.constexpr):
    """Addresses of a group's channels at pixels of a tensor [pixels, C], and which of them exist: [PIXELS, LANES]."""
    lane = tl.arange(0, LANES)
    start = (pixel * groups + group) * GROUP
    return tensor + start[:, None] + lane[None, :], valid[:, None] & (lane < GROUP)[None, :]


@triton.jit(do_not_specialize=SHAPES)
def _forward(
    x,  # [B, height, width, C]
    kernel,  # [B, h, w, groups, K * K]
    out,  # [B, h, w, C]
    bias,  # [groups, K * K], added to every kernel, and
    scale,  # [C], and
    shift,  # [C], after which comes a ReLU; None, all three: the bare involution
    pixels,  # B * h * w
    height,
    width,
    h,
    w,
    groups,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    SUM: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    group = tl.program_id(1)
    inside = pixel < pixels
    image, top, left = _window(pixel, h, w, K, STRIDE)
    total = tl.zeros((PIXELS, LANES), SUM)
    for u in range(K):
        for v in tl.static_range(K):
            y, z = top + u, left + v
            valid = inside & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            weight = tl.load(kernel + (pixel * groups + group) * K * K + u * K + v, valid, 0).to(SUM)
            if bias is not None:
                weight += tl.load(bias + group * K * K + u * K + v).to(SUM)
            place, exists = _channels(x, (image * height + y) * width + z, valid, group, groups, GROUP, LANES)
            values = tl.load(place, exists, 0)
            total += values.to(SUM) * weight[:, None]
    if scale is not None:
        lane = tl.arange(0, LANES)
        channel = group * GROUP + lane
        factor = tl.load(scale + channel, lane < GROUP, 0).to(SUM)
        offset = tl.load(shift + channel, lane < GROUP, 0).to(SUM)
        total = total * factor[None, :] + offset[None, :]
        total = tl.where(total < 0, 0, total)  # a maximum would hide NaNs
    place, exists = _channels(out, pixel, inside, group, groups, GROUP, LANES)
    tl.store(place, total.to(out.dtype.element_ty), exists)


@triton.jit(do_not_specialize=SHAPES)
def _kernel_gradient(
    grad,  # [B, h, w, C]
    x,  # [B, height, width, C]
    grad_kernel,  # [B, h, w, groups, K * K]
    pixels,
    height,
    width,
    h,
    w,
    groups,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    SUM: tl.constexpr,
):
    """A tap's gradient is the product of what it multiplied and what came of it, summed over the group."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    group = tl.program_id(1)
    inside = pixel < pixels
    image, top, left = _window(pixel, h, w, K, STRIDE)
    place, exists = _channels(grad, pixel, inside, group, groups, GROUP, LANES)
    came = tl.load(place, exists, 0).to(SUM)
    for u in range(K):
        for v in tl.static_range(K):
            y, z = top + u, left + v
            valid = inside & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            place, exists = _channels(x, (image * height + y) * width + z, valid, group, groups, GROUP, LANES)
            values = tl.load(place, exists, 0)
            product = tl.sum(values.to(SUM) * came, axis=1)
            tap = grad_kernel + (pixel * groups + group) * K * K + u * K + v
            tl.store(tap, product.to(grad_kernel.dtype.element_ty), inside)


@triton.jit(do_not_specialize=SHAPES)
def _input_gradient(
    grad,  # [B, h, w, C]
    kernel,  # [B, h, w, groups, K * K]
    grad_x,  # [B, height, width, C]
    pixels,  # B * height * width
    height,
    width,
    h,
    w,
    groups,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    SUM: tl.constexpr,
):
    """Gathered from all outputs that a pixel went into, so that nothing is added by two programs at once."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    group = tl.program_id(1)
    inside = pixel < pixels
    image, bottom, right = pixel // (height * width), pixel // width % height + K // 2, pixel % width + K // 2
    total = tl.zeros((PIXELS, LANES), SUM)
    for u in range(K):
        for v in tl.static_range(K):
            # the output at (y, z) took this pixel by its tap (u, v): y * STRIDE + u - K // 2 is the pixel's row
            far_y, far_z = bottom - u, right - v
            y, z = far_y // STRIDE, far_z // STRIDE
            valid = inside & (far_y >= 0) & (far_z >= 0) & (y < h) & (z < w)
            valid = valid & (far_y % STRIDE == 0) & (far_z % STRIDE == 0)
            output = (image * h + y) * w + z
            weight = tl.load(kernel + (output * groups + group) * K * K + u * K + v, valid, 0).to(SUM)
            place, exists = _channels(grad, output, valid, group, groups, GROUP, LANES)
            came = tl.load(place, exists, 0)
            total += came.to(SUM) * weight[:, None]
    place, exists = _channels(grad_x, pixel, inside, group, groups, GROUP, LANES)
    tl.store(place, total.to(grad_x.dtype.element_ty), exists)


def forward(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Involution of x [B, C, H, W] with kernel [B, G, K*K, h, w]; returns [B, C, h, w]."""
    if not _fits(x, kernel):
        return portable.forward(x, kernel, stride)
    return _involution(_channels_last(x), _taps_last(kernel), stride, (None, None, None))


def fused(x: Tensor, kernel: Tensor, stride: int, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """relu(scale * involution(x, kernel + bias) + shift), without gradients: [B, C, h, w].

    What surrounds involution in a network is done where its values are at hand: the bias of the convolution that makes
    the kernels, which else takes a pass over the largest of all tensors, and the batch norm and ReLU that follow.

    Args:
        x: [B, C, H, W].
        kernel: [B, G, K*K, h, w].
        stride: as in `forward`.
        bias: [G * K * K].
        scale, shift: [C], float32, of the batch norm.
    """
    return _involution(_channels_last(x), _taps_last(kernel), stride, (bias, scale, shift))


def backward(grad: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and kernel from grad [B, C, h, w]."""
    if not _fits(grad, x, kernel):
        return portable.backward(grad, x, kernel, stride)
    grad, x, kernel = _channels_last(grad), _channels_last(x), _taps_last(kernel)
    grad_x, grad_kernel = torch.empty_like(x), torch.empty_like(kernel)
    batch, h, w = kernel.shape[:3]
    _launch(_kernel_gradient, (grad, x, grad_kernel), x, kernel, stride, batch * h * w)
    _launch(_input_gradient, (grad, kernel, grad_x), x, kernel, stride, batch * x.shape[1] * x.shape[2])
    return grad_x.permute(0, 3, 1, 2), grad_kernel.permute(0, 3, 4, 1, 2)


def _involution(
    x: Tensor, kernel: Tensor, stride: int, around: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> Tensor:
    """Of x [B, H, W, C] with kernel [B, h, w, G, K*K] and what is around it: bias, scale, shift."""
    batch, h, w = kernel.shape[:3]
    out = x.new_empty(batch, h, w, x.shape[3])
    _launch(_forward, (x, kernel, out, *around), x, kernel, stride, batch * h * w)
    return out.permute(0, 3, 1, 2)


def _fits(*tensors: Tensor) -> bool:
    """Triton computes where its tensors are, which must be a CUDA device, unless its interpreter runs on the CPU."""
    return all(tensor.is_cuda or triton.knobs.runtime.interpret for tensor in tensors)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()  # [B, H, W, C]


def _taps_last(kernel: Tensor) -> Tensor:
    return kernel.permute(0, 3, 4, 1, 2).contiguous()  # [B, h, w, G, K*K]


def _launch(run: Any, tensors: Sequence[Tensor | None], x: Tensor, kernel: Tensor, stride: int, n: int) -> None:
    _, height, width, channels = x.shape
    _, h, w, groups, taps = kernel.shape
    if n == 0 or channels == 0:
        return
    run[(triton.cdiv(n, PIXELS), groups)](
        *tensors,
        n,
        height,
        width,
        h,
        w,
        groups,
        K=isqrt(taps),
        STRIDE=stride,
        GROUP=channels // groups,
        LANES=triton.next_power_of_2(channels // groups),
        PIXELS=PIXELS,
        SUM=tl.float64 if x.dtype == torch.float64 else tl.float32,
    )
