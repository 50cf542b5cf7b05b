"""Triton on CUDA, for every shape by one compilation per kernel size, stride, group width and dtype.

Maps lie channels-last in memory, as convolutions leave them there: then the channels of a group at a pixel are one
short contiguous run. Kernels may lie in any order; reading them is fastest where a tap's values for neighbouring pixels
are neighbours, for then the lanes of a warp read one line of memory together. Sums are kept in float32 (float64 for
float64).

Batch, height and width are plain arguments, and Triton is told not to compile anew for values it finds special.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rednet.model.ops import torch_ops

# Forward, a program computes strips of outputs of one group, side by side: a pixel that several windows of a strip hold
# is read and converted once. Four at a time take 0.59 of the instructions, seven 0.55, but half as many registers again
# and half the programs (counted in code for sm_90).
STRIP = 4  # outputs
STRIPS = 32  # of a program
PIXELS = 64  # of a program of the gradients
STEPS = ("image_step", "tap_step", "pixel_step")  # elements from one to the next, in kernels [B, groups * K * K, h * w]
SHAPES = ("count", "height", "width", "h", "w", "groups", *STEPS)  # the arguments that no compilation may depend on


@triton.jit
def _share(groups, EACH: tl.constexpr):
    """Pixels or strips of a program, and its group; programs of the same pixels run together, for they share lines."""
    program = tl.program_id(0)
    return program // groups * EACH + tl.arange(0, EACH), program % groups


@triton.jit
def _window(pixel, h, w, K: tl.constexpr, STRIDE: tl.constexpr):
    """Image, row and column of the first tap of outputs that are numbered through [B, h, w]."""
    return pixel // (h * w), pixel // w % h * STRIDE - K // 2, pixel % w * STRIDE - K // 2


@triton.jit
def _channels(tensor, pixel, valid, group, groups, GROUP: tl.constexpr, LANES: tl.constexpr):
    """Addresses of a group's channels at pixels of a tensor [pixels, C], and which of them exist: [pixels, LANES]."""
    lane = tl.arange(0, LANES)
    start = (pixel.to(tl.int64) * groups + group) * GROUP
    return tensor + start[:, None] + lane[None, :], valid[:, None] & (lane < GROUP)[None, :]


@triton.jit
def _taps(kernel, image, pixel, group, image_step, tap_step, pixel_step, K: tl.constexpr):
    """Addresses of a group's first tap at pixels, numbered through [h, w], of images."""
    start = image.to(tl.int64) * image_step + pixel.to(tl.int64) * pixel_step
    return kernel + start + tap_step.to(tl.int64) * (group * K * K)


@triton.jit(do_not_specialize=SHAPES)
def _forward(
    x,  # [B, height, width, C]
    kernel,  # [B, groups * K * K, h * w] by its steps
    out,  # [B, h, w, C]
    bias,  # [groups * K * K], added to every kernel, and
    scale,  # [C], and
    shift,  # [C], after which comes a ReLU; None, all three: the bare involution
    count,  # of strips: B * h * the strips of a row, the last of which may be cut
    height,
    width,
    h,
    w,
    groups,
    image_step,
    tap_step,
    pixel_step,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    SUM: tl.constexpr,
    STRIP: tl.constexpr,
    EACH: tl.constexpr,
):
    strip, group = _share(groups, EACH)
    in_row = tl.cdiv(w, STRIP)
    image, y, z = strip // (h * in_row), strip // in_row % h, strip % in_row * STRIP
    top, left = y * STRIDE - K // 2, z * STRIDE - K // 2
    inside = strip < count
    # what is the same for every tap
    lane = tl.arange(0, LANES)
    channel = group * GROUP + lane
    channels, used = groups * GROUP, (lane < GROUP)[None, :]
    tap_step = tap_step.to(tl.int64)
    totals, first, there = (tl.zeros((EACH, LANES), SUM),) * STRIP, (), ()
    for output in tl.static_range(STRIP):
        first += (_taps(kernel, image, y * w + z + output, group, image_step, tap_step, pixel_step, K),)  # type: ignore[assignment]
        there += (inside & (z + output < w),)  # type: ignore[assignment]
    for u in range(K):
        row = (image.to(tl.int64) * height + top + u) * width + left
        valid = inside & (top + u >= 0) & (top + u < height)
        for column in tl.static_range((STRIP - 1) * STRIDE + K):
            exists = valid & (left + column >= 0) & (left + column < width)
            place = x + ((row + column) * channels)[:, None] + channel[None, :]
            values = tl.load(place, exists[:, None] & used, 0).to(SUM)
            sums = ()
            for output in tl.static_range(STRIP):
                total = totals[output]
                v = column - output * STRIDE
                if v >= 0 and v < K:
                    weight = tl.load(first[output] + tap_step * (u * K + v), there[output], 0).to(SUM)
                    if bias is not None:
                        weight += tl.load(bias + group * K * K + u * K + v).to(SUM)
                    total += values * weight[:, None]
                sums += (total,)  # type: ignore[assignment]
            totals = sums
    for output in tl.static_range(STRIP):
        total = totals[output]
        if scale is not None:
            factor = tl.load(scale + channel, lane < GROUP, 0).to(SUM)
            offset = tl.load(shift + channel, lane < GROUP, 0).to(SUM)
            total = total * factor[None, :] + offset[None, :]
            total = tl.where(total < 0, 0, total)  # a maximum would hide NaNs
        pixel = (image.to(tl.int64) * h + y) * w + z + output
        place = out + (pixel * channels)[:, None] + channel[None, :]
        tl.store(place, total.to(out.dtype.element_ty), there[output][:, None] & used)


@triton.jit(do_not_specialize=SHAPES)
def _kernel_gradient(
    grad,  # [B, h, w, C]
    x,  # [B, height, width, C]
    grad_kernel,  # [B, groups * K * K, h * w] by its steps
    count,  # B * h * w
    height,
    width,
    h,
    w,
    groups,
    image_step,
    tap_step,
    pixel_step,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    SUM: tl.constexpr,
    EACH: tl.constexpr,
):
    """A tap's gradient is the product of what it multiplied and what came of it, summed over the group."""
    pixel, group = _share(groups, EACH)
    inside = pixel < count
    image, top, left = _window(pixel, h, w, K, STRIDE)
    first = _taps(grad_kernel, image, pixel % (h * w), group, image_step, tap_step, pixel_step, K)
    place, exists = _channels(grad, pixel, inside, group, groups, GROUP, LANES)
    came = tl.load(place, exists, 0).to(SUM)
    for u in range(K):
        for v in tl.static_range(K):
            y, z = top + u, left + v
            valid = inside & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            place, exists = _channels(x, (image * height + y) * width + z, valid, group, groups, GROUP, LANES)
            values = tl.load(place, exists, 0)
            product = tl.sum(values.to(SUM) * came, axis=1)
            tap = first + tap_step.to(tl.int64) * (u * K + v)
            tl.store(tap, product.to(grad_kernel.dtype.element_ty), inside)


@triton.jit(do_not_specialize=SHAPES)
def _input_gradient(
    grad,  # [B, h, w, C]
    kernel,  # [B, groups * K * K, h * w] by its steps
    grad_x,  # [B, height, width, C]
    count,  # B * height * width
    height,
    width,
    h,
    w,
    groups,
    image_step,
    tap_step,
    pixel_step,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    SUM: tl.constexpr,
    EACH: tl.constexpr,
):
    """Gathered from all outputs that a pixel went into, so that nothing is added by two programs at once."""
    pixel, group = _share(groups, EACH)
    inside = pixel < count
    image, bottom, right = pixel // (height * width), pixel // width % height + K // 2, pixel % width + K // 2
    total = tl.zeros((EACH, LANES), SUM)
    for u in range(K):
        for v in tl.static_range(K):
            # the output at (y, z) took this pixel by its tap (u, v): y * STRIDE + u - K // 2 is the pixel's row
            far_y, far_z = bottom - u, right - v
            y, z = far_y // STRIDE, far_z // STRIDE
            valid = inside & (far_y >= 0) & (far_z >= 0) & (y < h) & (z < w)
            valid = valid & (far_y % STRIDE == 0) & (far_z % STRIDE == 0)
            first = _taps(kernel, image, y * w + z, group, image_step, tap_step, pixel_step, K)
            weight = tl.load(first + tap_step.to(tl.int64) * (u * K + v), valid, 0).to(SUM)
            place, exists = _channels(grad, (image * h + y) * w + z, valid, group, groups, GROUP, LANES)
            came = tl.load(place, exists, 0)
            total += came.to(SUM) * weight[:, None]
    place, exists = _channels(grad_x, pixel, inside, group, groups, GROUP, LANES)
    tl.store(place, total.to(grad_x.dtype.element_ty), exists)


def forward(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Involution of x [B, C, H, W] with kernel [B, G, K*K, h, w]; returns [B, C, h, w]."""
    if not _fits(x, kernel):
        return torch_ops.forward(x, kernel, stride)
    return _involution(x, kernel, stride, (None, None, None))


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
    return _involution(x, kernel, stride, (bias, scale, shift))


def backward(grad: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and kernel from grad [B, C, h, w]."""
    if not _fits(grad, x, kernel):
        return torch_ops.backward(grad, x, kernel, stride)
    shape = kernel.shape
    grad, x, kernel = _channels_last(grad), _channels_last(x), _flat(kernel)
    grad_x, grad_kernel = torch.empty_like(x), torch.empty_like(kernel)
    outputs, inputs = (t[..., 0].numel() for t in (grad, x))
    _launch(_kernel_gradient, (grad, x, grad_kernel), outputs, x, grad_kernel, shape, stride, EACH=PIXELS)
    _launch(_input_gradient, (grad, kernel, grad_x), inputs, x, kernel, shape, stride, EACH=PIXELS)
    return grad_x.permute(0, 3, 1, 2), grad_kernel.reshape(shape)


def _involution(
    x: Tensor, kernel: Tensor, stride: int, around: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> Tensor:
    """With what is around it: bias, scale, shift."""
    batch, _, _, h, w = shape = kernel.shape
    x, kernel = _channels_last(x), _flat(kernel)
    out = x.new_empty(batch, h, w, x.shape[3])
    strips = batch * h * triton.cdiv(w, STRIP)
    # so many warps that each lane reads the 16 bytes of a pixel that an instruction can
    lanes = triton.next_power_of_2(x.shape[3] // shape[1])
    warps = max(1, STRIPS * lanes * x.itemsize // (16 * 32))
    more = {"EACH": STRIPS, "STRIP": STRIP, "num_warps": warps}
    _launch(_forward, (x, kernel, out, *around), strips, x, kernel, shape, stride, **more)
    return out.permute(0, 3, 1, 2)


def _fits(*tensors: Tensor) -> bool:
    """Triton computes where its tensors are, which must be a CUDA device, unless its interpreter runs on the CPU."""
    return all(tensor.is_cuda or triton.knobs.runtime.interpret for tensor in tensors)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()  # [B, H, W, C]


def _flat(kernel: Tensor) -> Tensor:
    return kernel.flatten(3).flatten(1, 2)  # [B, G*K*K, h*w]; copied only if no steps lead through it


def _launch(
    run: Any,
    tensors: Sequence[Tensor | None],
    count: int,
    x: Tensor,
    kernel: Tensor,
    shape: Sequence[int],
    stride: int,
    **more: int,
) -> None:
    """Run as many programs as `count` pixels or strips take.

    Args:
        x: [B, H, W, C].
        kernel: flat; its steps are passed on.
        shape: of the kernel before that.
    """
    _, height, width, channels = x.shape
    _, groups, taps, h, w = shape
    if count == 0 or channels == 0:
        return
    run[(triton.cdiv(count, more["EACH"]) * groups,)](
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
        GROUP=channels // groups,
        LANES=triton.next_power_of_2(channels // groups),
        SUM=tl.float64 if x.dtype == torch.float64 else tl.float32,
        **more,
    )
