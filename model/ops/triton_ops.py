"""The involution operator in Triton, for CUDA devices.

Each kernel is compiled once per kernel size, stride, group width and dtype. Batch, height and width are ordinary
arguments, and Triton is told not to specialise on their values.

Maps are channels-last in memory, as convolutions leave them, so the channels of a group at a pixel are contiguous.
Involution kernels are read with whatever strides they have. Reading is fastest if the weights of one tap for
neighbouring pixels are neighbours in memory, because the lanes of a warp then share a cache line. Sums are accumulated
in float32 (float64 for float64).
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rednet.model.ops import torch_ops

# A forward program computes strips of neighbouring outputs of one group, and loads and converts a pixel once for all
# windows of a strip. Strips of 4 outputs take 0.59 of the instructions of single outputs. Strips of 7 would take 0.55,
# but half as many registers again and half the programs (counted in the code for sm_90).
STRIP = 4  # outputs per strip
BLOCK_STRIPS = 32  # strips per program
BLOCK_PIXELS = 64  # pixels per program of a gradient
# No compilation may depend on the values of these arguments. Strides are those of kernels [B, groups * K * K, h * w].
UNSPECIALIZED = "count", "height", "width", "h", "w", "groups", "stride_image", "stride_tap", "stride_pixel"


@triton.jit
def _block(groups, BLOCK: tl.constexpr):
    """The pixels (or strips) and the group of this program; neighbouring programs share pixels, and so cache lines."""
    program = tl.program_id(0)
    return program // groups * BLOCK + tl.arange(0, BLOCK), program % groups


@triton.jit
def _channel_pointers(tensor, pixel, valid, group, groups, GROUP_CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to a group's channels at pixels of a tensor [pixels, C], and their mask: [pixels, BLOCK_C]."""
    channel = tl.arange(0, BLOCK_C)
    start = (pixel.to(tl.int64) * groups + group) * GROUP_CHANNELS
    return tensor + start[:, None] + channel[None, :], valid[:, None] & (channel < GROUP_CHANNELS)[None, :]


@triton.jit
def _tap_pointers(kernel, image, pixel, group, stride_image, stride_tap, stride_pixel, K: tl.constexpr):
    """Pointers to the first tap of a group; `pixel` is an index into [h, w] of each image."""
    start = image.to(tl.int64) * stride_image + pixel.to(tl.int64) * stride_pixel
    return kernel + start + stride_tap.to(tl.int64) * (group * K * K)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward(
    x,  # [B, height, width, C]
    kernel,  # [B, groups * K * K, h * w], with the strides below
    out,  # [B, h, w, C]
    bias,  # [groups * K * K], added to every kernel, or None
    scale,  # [C], or None
    shift,  # [C]: with a scale, the output is relu(scale * sum + shift)
    count,  # number of strips: B * h * ceil(w / STRIP); the last strip of a row may be shorter
    height,
    width,
    h,
    w,
    groups,
    stride_image,
    stride_tap,
    stride_pixel,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    strip, group = _block(groups, BLOCK)
    row_strips = tl.cdiv(w, STRIP)
    image, oh, ow = strip // (h * row_strips), strip // row_strips % h, strip % row_strips * STRIP
    top, left = oh * STRIDE - K // 2, ow * STRIDE - K // 2
    in_range = strip < count
    lane = tl.arange(0, BLOCK_C)
    channel = group * GROUP_CHANNELS + lane
    channels, channel_mask = groups * GROUP_CHANNELS, (lane < GROUP_CHANNELS)[None, :]
    stride_tap = stride_tap.to(tl.int64)
    accumulators, taps, masks = (tl.zeros((BLOCK, BLOCK_C), ACC_DTYPE),) * STRIP, (), ()
    for output in tl.static_range(STRIP):
        taps += (_tap_pointers(kernel, image, oh * w + ow + output, group, stride_image, stride_tap, stride_pixel, K),)  # type: ignore[assignment]
        masks += (in_range & (ow + output < w),)  # type: ignore[assignment]
    for kh in range(K):
        row = (image.to(tl.int64) * height + top + kh) * width + left
        row_mask = in_range & (top + kh >= 0) & (top + kh < height)
        for column in tl.static_range((STRIP - 1) * STRIDE + K):
            mask = row_mask & (left + column >= 0) & (left + column < width)
            pointers = x + ((row + column) * channels)[:, None] + channel[None, :]
            values = tl.load(pointers, mask[:, None] & channel_mask, 0).to(ACC_DTYPE)
            sums = ()
            for output in tl.static_range(STRIP):
                accumulator = accumulators[output]
                kw = column - output * STRIDE
                if kw >= 0 and kw < K:
                    weight = tl.load(taps[output] + stride_tap * (kh * K + kw), masks[output], 0).to(ACC_DTYPE)
                    if bias is not None:
                        weight += tl.load(bias + group * K * K + kh * K + kw).to(ACC_DTYPE)
                    accumulator += values * weight[:, None]
                sums += (accumulator,)  # type: ignore[assignment]
            accumulators = sums
    for output in tl.static_range(STRIP):
        result = accumulators[output]
        if scale is not None:
            factor = tl.load(scale + channel, lane < GROUP_CHANNELS, 0).to(ACC_DTYPE)
            offset = tl.load(shift + channel, lane < GROUP_CHANNELS, 0).to(ACC_DTYPE)
            result = result * factor[None, :] + offset[None, :]
            result = tl.where(result < 0, 0, result)  # tl.maximum would turn NaN into 0
        pixel = (image.to(tl.int64) * h + oh) * w + ow + output
        pointers = out + (pixel * channels)[:, None] + channel[None, :]
        tl.store(pointers, result.to(out.dtype.element_ty), masks[output][:, None] & channel_mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _kernel_gradient(
    grad,  # [B, h, w, C]
    x,  # [B, height, width, C]
    grad_kernel,  # [B, groups * K * K, h * w], with the strides below
    count,  # B * h * w
    height,
    width,
    h,
    w,
    groups,
    stride_image,
    stride_tap,
    stride_pixel,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of a tap is the dot product, over the group, of its input pixel and the output's gradient."""
    pixel, group = _block(groups, BLOCK)
    in_range = pixel < count
    image, top, left = pixel // (h * w), pixel // w % h * STRIDE - K // 2, pixel % w * STRIDE - K // 2
    taps = _tap_pointers(grad_kernel, image, pixel % (h * w), group, stride_image, stride_tap, stride_pixel, K)
    pointers, mask = _channel_pointers(grad, pixel, in_range, group, groups, GROUP_CHANNELS, BLOCK_C)
    gradient = tl.load(pointers, mask, 0).to(ACC_DTYPE)
    for kh in range(K):
        for kw in tl.static_range(K):
            row, column = top + kh, left + kw
            valid = in_range & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            source = (image * height + row) * width + column
            pointers, mask = _channel_pointers(x, source, valid, group, groups, GROUP_CHANNELS, BLOCK_C)
            product = tl.sum(tl.load(pointers, mask, 0).to(ACC_DTYPE) * gradient, axis=1)
            tap = taps + stride_tap.to(tl.int64) * (kh * K + kw)
            tl.store(tap, product.to(grad_kernel.dtype.element_ty), in_range)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _input_gradient(
    grad,  # [B, h, w, C]
    kernel,  # [B, groups * K * K, h * w], with the strides below
    grad_x,  # [B, height, width, C]
    count,  # B * height * width
    height,
    width,
    h,
    w,
    groups,
    stride_image,
    stride_tap,
    stride_pixel,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gathers from all outputs whose windows contain a pixel, so that no two programs add to the same address."""
    pixel, group = _block(groups, BLOCK)
    in_range = pixel < count
    image, bottom, right = pixel // (height * width), pixel // width % height + K // 2, pixel % width + K // 2
    accumulator = tl.zeros((BLOCK, BLOCK_C), ACC_DTYPE)
    for kh in range(K):
        for kw in tl.static_range(K):
            # The output (oh, ow) reads pixel (oh * STRIDE + kh - K // 2, ow * STRIDE + kw - K // 2) with tap (kh, kw).
            strided_oh, strided_ow = bottom - kh, right - kw
            oh, ow = strided_oh // STRIDE, strided_ow // STRIDE
            valid = in_range & (strided_oh >= 0) & (strided_ow >= 0) & (oh < h) & (ow < w)
            valid = valid & (strided_oh % STRIDE == 0) & (strided_ow % STRIDE == 0)
            taps = _tap_pointers(kernel, image, oh * w + ow, group, stride_image, stride_tap, stride_pixel, K)
            weight = tl.load(taps + stride_tap.to(tl.int64) * (kh * K + kw), valid, 0).to(ACC_DTYPE)
            source = (image * h + oh) * w + ow
            pointers, mask = _channel_pointers(grad, source, valid, group, groups, GROUP_CHANNELS, BLOCK_C)
            accumulator += tl.load(pointers, mask, 0).to(ACC_DTYPE) * weight[:, None]
    pointers, mask = _channel_pointers(grad_x, pixel, in_range, group, groups, GROUP_CHANNELS, BLOCK_C)
    tl.store(pointers, accumulator.to(grad_x.dtype.element_ty), mask)


def forward(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Involution of x [B, C, H, W] with kernel [B, G, K*K, h, w]; returns [B, C, h, w]."""
    if not _fits(x, kernel):
        return torch_ops.forward(x, kernel, stride)
    return fused(x, kernel, stride)


def fused(
    x: Tensor,
    kernel: Tensor,
    stride: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """relu(scale * involution(x, kernel + bias) + shift), without gradients: [B, C, h, w].

    Fuses what surrounds an involution in the network: the bias of the convolution that generates the kernels, which
    would take a pass over the largest tensor of the network, and the batch norm and ReLU that follow.

    Args:
        x: [B, C, H, W].
        kernel: [B, G, K*K, h, w].
        stride: as in `forward`.
        bias: [G * K * K], or None to add nothing.
        scale, shift: [C], float32, of the batch norm, or None for the bare involution.
    """
    batch, _, _, h, w = shape = kernel.shape
    x, kernel = _channels_last(x), _flat(kernel)
    out = x.new_empty(batch, h, w, x.shape[3])
    strips = batch * h * triton.cdiv(w, STRIP)
    # as many warps as make each lane load 16 bytes of a pixel, the most that one instruction can
    warps = max(1, BLOCK_STRIPS * triton.next_power_of_2(x.shape[3] // shape[1]) * x.itemsize // (16 * 32))
    meta = {"BLOCK": BLOCK_STRIPS, "STRIP": STRIP, "num_warps": warps}
    _launch(_forward, (x, kernel, out, bias, scale, shift), strips, x, kernel, shape, stride, **meta)
    return out.permute(0, 3, 1, 2)


def backward(grad: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and kernel from grad [B, C, h, w]."""
    if not _fits(grad, x, kernel):
        return torch_ops.backward(grad, x, kernel, stride)
    shape = kernel.shape
    grad, x, kernel = _channels_last(grad), _channels_last(x), _flat(kernel)
    grad_x, grad_kernel = torch.empty_like(x), torch.empty_like(kernel)
    outputs, inputs = (t[..., 0].numel() for t in (grad, x))
    _launch(_kernel_gradient, (grad, x, grad_kernel), outputs, x, grad_kernel, shape, stride, BLOCK=BLOCK_PIXELS)
    _launch(_input_gradient, (grad, kernel, grad_x), inputs, x, kernel, shape, stride, BLOCK=BLOCK_PIXELS)
    return grad_x.permute(0, 3, 1, 2), grad_kernel.reshape(shape)


def _fits(*tensors: Tensor) -> bool:
    """Whether Triton can compute on these tensors: on CUDA devices only, unless its interpreter is in use."""
    return all(tensor.is_cuda or triton.knobs.runtime.interpret for tensor in tensors)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()  # [B, H, W, C]


def _flat(kernel: Tensor) -> Tensor:
    return kernel.flatten(3).flatten(1, 2)  # [B, G*K*K, h*w]; a view wherever strides can express it


def _launch(
    run: Any,
    tensors: Sequence[Tensor | None],
    count: int,
    x: Tensor,
    kernel: Tensor,
    shape: Sequence[int],
    stride: int,
    **meta: int,
) -> None:
    """Launch `run` on the device of x, with one program for each block of `count` pixels (or strips) and each group.

    Args:
        x: [B, H, W, C].
        kernel: [B, G*K*K, h*w]; its strides are passed to `run`.
        shape: of the kernel as [B, G, K*K, h, w].
        meta: compile-time arguments of `run`, in addition to those that follow from the shapes.
    """
    _, height, width, channels = x.shape
    _, groups, taps, h, w = shape
    if count == 0 or channels == 0:
        return
    with torch.cuda.device_of(x):  # Triton launches on the current device
        run[(triton.cdiv(count, meta["BLOCK"]) * groups,)](
            *tensors,
            count,
            height,
            width,
            h,
            w,
            groups,
            *kernel.stride(),
            K=isqrt(taps),
            STRIDE=stride,
            GROUP_CHANNELS=channels // groups,
            BLOCK_C=triton.next_power_of_2(channels // groups),
            ACC_DTYPE=tl.float64 if x.dtype == torch.float64 else tl.float32,
            **meta,
        )
