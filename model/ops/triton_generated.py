"""The involution of a network in one Triton kernel that also generates the involution kernels, on tensor cores.

`triton_ops.fused` reads kernels that a matrix product has written to memory: 49 values per output and group of 16
channels, a fifth of all memory traffic of RedNet-50. Here they exist in registers only. A program computes 4x4
neighbouring outputs of one image, group by group, in three steps:

    taps [16, K*K] = reduced [16, C/r] @ span [C/r, K*K]    a matrix product
    band [16, window]                                       the taps of each output, moved to the pixels they multiply
    out [16, group] = band @ x [window, group]              a matrix product

The window is the square of pixels that the 16 outputs use: 10x10 for 7x7 kernels. An output uses 49 of its 100 pixels,
and the band is zero at the others, so half of the products are wasted. Tensor cores have them to spare.

Zero times NaN is NaN, so a pixel that is not finite makes NaN of its channel in all outputs of a tile, those that do
not use it included. The definition makes NaN of fewer outputs. A network averages over each map, so the features of
that image are NaN in either case. Other images are never affected, since a tile lies in one image.
"""

from math import isqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4  # outputs per side of a tile; tensor cores multiply 16 rows at a time
REDUCED_BLOCK = 16  # columns that tensor cores multiply at a time: C/r must be a multiple
MAX_KERNEL_SIZE, MAX_GROUP_CHANNELS = 7, 32  # larger bands and windows do not fit into registers
# A program computes several groups of its tile, because the addresses and the band's pattern take more instructions
# than a group does, as long as so many programs remain. An H100 runs 800 at a time.
MIN_PROGRAMS = 2048
# No compilation may depend on the values of these arguments.
UNSPECIALIZED = "height", "width", "h", "w", "groups", "program_groups", "reduced_blocks"


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward(
    x,  # [B, height, width, C]
    reduced,  # [B, h, w, C/r]
    span,  # [groups * K * K, C/r]
    bias,  # [groups * K * K]
    scale,  # [C]
    shift,  # [C]
    out,  # [B, h, w, C]
    height,
    width,
    h,
    w,
    groups,
    program_groups,  # groups per program
    reduced_blocks,  # C/r in blocks of REDUCED_BLOCK
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
    REDUCED_BLOCK: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    SIDE: tl.constexpr,  # of the window
    BLOCK_WINDOW: tl.constexpr,
):
    chunks = tl.cdiv(groups, program_groups)
    image, oh, ow = tl.program_id(2).to(tl.int64), tl.program_id(1) * TILE, tl.program_id(0) // chunks * TILE
    first_group = tl.program_id(0) % chunks * program_groups
    top, left = oh * STRIDE - K // 2, ow * STRIDE - K // 2
    channels, reduced_channels = groups * GROUP_CHANNELS, reduced_blocks * REDUCED_BLOCK

    # Addresses are 64-bit for the tile and 32-bit inside it.
    output = tl.arange(0, TILE * TILE)
    dy, dx = output // TILE, output % TILE
    in_range = (oh + dy < h) & (ow + dx < w)
    first_output, output_offset = (image * h + oh) * w + ow, dy * w + dx
    pixel = tl.arange(0, BLOCK_WINDOW)
    row, column = pixel // SIDE, pixel % SIDE
    in_map = (top + row >= 0) & (top + row < height) & (left + column >= 0) & (left + column < width)
    in_map = in_map & (row < SIDE)
    first_pixel, pixel_offset = (image * height + top) * width + left, row * width + column

    # Where the weight of a window's pixel stands in an output's taps; column K * K of the taps is zero.
    # The comparisons are unsigned, and so also exclude negative numbers.
    kh = (row[None, :] - dy[:, None] * STRIDE).to(tl.uint32, bitcast=True)
    kw = (column[None, :] - dx[:, None] * STRIDE).to(tl.uint32, bitcast=True)
    tap_of_pixel = (row * K + column)[None, :] - ((dy * K + dx) * STRIDE)[:, None]
    source = tl.where((kh < K) & (kw < K), tap_of_pixel, K * K)

    tap, lane, reduced_lane = tl.arange(0, BLOCK_TAPS), tl.arange(0, BLOCK_C), tl.arange(0, REDUCED_BLOCK)
    is_tap, is_channel = tap < K * K, lane < GROUP_CHANNELS
    reduced += first_output * reduced_channels + (output_offset * reduced_channels)[:, None] + reduced_lane[None, :]
    x += first_pixel * channels + (pixel_offset * channels)[:, None] + lane[None, :]
    out += first_output * channels + (output_offset * channels)[:, None] + lane[None, :]
    for group in range(first_group, tl.minimum(first_group + program_groups, groups)):
        taps = tl.zeros((TILE * TILE, BLOCK_TAPS), tl.float32)
        weights = span + (group * K * K + tap[None, :]) * reduced_channels + reduced_lane[:, None]
        for block in range(reduced_blocks):
            features = tl.load(reduced + block * REDUCED_BLOCK, in_range[:, None], 0)
            generator = tl.load(weights + block * REDUCED_BLOCK, is_tap[None, :], 0)
            taps = tl.dot(features, generator, taps, input_precision="ieee")
        taps += tl.load(bias + group * K * K + tap, is_tap, 0).to(tl.float32)[None, :]
        band = tl.gather(taps.to(x.dtype.element_ty), source, 1)
        window = tl.load(x + group * GROUP_CHANNELS, in_map[:, None] & is_channel[None, :], 0)
        result = tl.dot(band, window, input_precision="ieee")
        channel = group * GROUP_CHANNELS + lane
        factor, offset = tl.load(scale + channel, is_channel, 0), tl.load(shift + channel, is_channel, 0)
        result = result * factor[None, :] + offset[None, :]
        result = tl.where(result < 0, 0, result)  # tl.maximum would turn NaN into 0
        mask = in_range[:, None] & is_channel[None, :]
        tl.store(out + group * GROUP_CHANNELS, result.to(out.dtype.element_ty), mask)


def is_supported(kernel_size: int, group_channels: int) -> bool:
    """Whether `fused` can compute such an involution."""
    return kernel_size <= MAX_KERNEL_SIZE and group_channels <= MAX_GROUP_CHANNELS


def fused(x: Tensor, reduced: Tensor, span: Tensor, stride: int, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """relu(scale * involution(x, span @ reduced + bias) + shift), without gradients: [B, C, h, w].

    Args:
        x: [B, C, H, W], in float16, bfloat16 or float32 (with IEEE products, without tensor cores).
        reduced: [B, C/r, h, w]; C/r must be a multiple of `REDUCED_BLOCK`, with zeros after the last channel.
        span: [G, K*K, C/r], weights of the 1x1 convolution that generates the kernels.
        stride: distance between neighbouring outputs.
        bias: [G*K*K], of that convolution.
        scale, shift: [C], float32, of the batch norm that follows.
    """
    x, reduced = (each.permute(0, 2, 3, 1).contiguous() for each in (x, reduced))
    batch, height, width, channels = x.shape
    _, h, w, reduced_channels = reduced.shape
    groups, taps, _ = span.shape
    out = x.new_empty(batch, h, w, channels)
    columns, rows = triton.cdiv(w, TILE), triton.cdiv(h, TILE)
    program_groups = min(max(1, batch * rows * columns * groups // MIN_PROGRAMS), groups)
    sizes = height, width, h, w, groups, program_groups, reduced_channels // REDUCED_BLOCK
    meta = constants(isqrt(taps), stride, channels // groups) | {"num_warps": warps(x.dtype)}
    grid = columns * triton.cdiv(groups, program_groups), rows, batch  # programs of a tile are neighbours and share it
    _launch((x, reduced, span.contiguous(), bias, scale, shift, out), grid, sizes, meta)
    return out.permute(0, 3, 1, 2)


def _launch(
    tensors: tuple[Tensor, ...], grid: tuple[int, int, int], sizes: tuple[int, ...], meta: dict[str, int]
) -> None:
    if all(grid):
        with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
            _forward[grid](*tensors, *sizes, **meta)


def constants(kernel_size: int, stride: int, group_channels: int) -> dict[str, int]:
    """The compile-time arguments of the Triton kernel."""
    side = (TILE - 1) * stride + kernel_size
    return {
        "K": kernel_size,
        "STRIDE": stride,
        "GROUP_CHANNELS": group_channels,
        "BLOCK_C": _block(group_channels),
        "TILE": TILE,
        "REDUCED_BLOCK": REDUCED_BLOCK,
        "BLOCK_TAPS": _block(kernel_size**2 + 1),  # and a column of zeros
        "SIDE": side,
        "BLOCK_WINDOW": _block(side**2),
    }


def warps(dtype: torch.dtype) -> int:
    """Warps per program. Fewer need fewer instructions, but more registers each."""
    return 4 if dtype == torch.float32 else 2


def _block(size: int) -> int:
    block: int = triton.next_power_of_2(size)
    return max(16, block)  # tl.dot multiplies at least 16 by 16
