"""Small operators of the network in Triton, each one pass over memory where PyTorch takes several.

Maps are [B, C, H, W], channels-last in memory. Batch, height and width are ordinary arguments that Triton does not
specialise on.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values per program
UNSPECIALIZED = "count", "height", "width", "h", "w"


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _normalise(
    pixels,  # uint8 [B, C, height, width], contiguous
    scale,  # [C]
    shift,  # [C]
    out,  # [B, height, width, C]
    count,  # B * height * width
    height,
    width,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    mask = (pixel < count)[:, None] & is_channel[None, :]
    area = height.to(tl.int64) * width
    source = (pixel // area * CHANNELS * area + pixel % area)[:, None] + (channel * area)[None, :]
    values = tl.load(pixels + source, mask, 0).to(tl.float32)
    values = values * tl.load(scale + channel, is_channel, 0) + tl.load(shift + channel, is_channel, 0)
    tl.store(out + pixel[:, None] * CHANNELS + channel[None, :], values.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _bias_relu(
    x,  # [rows, C], also the output
    bias,  # [C]
    residual,  # [rows, C], or None
    count,  # rows * C
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    values = tl.load(x + index, mask, 0).to(tl.float32) + tl.load(bias + index % CHANNELS, mask, 0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + index, mask, 0).to(tl.float32)
    values = tl.where(values < 0, 0, values)  # tl.maximum would turn NaN into 0
    tl.store(x + index, values.to(x.dtype.element_ty), mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _pool_bias_relu(
    x,  # [B, height, width, C]
    bias,  # [C]
    out,  # [B, h, w, C]
    count,  # B * h * w
    height,
    width,
    h,
    w,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_C)
    in_range, is_channel = pixel < count, channel < CHANNELS
    image, oh, ow = pixel // (h * w), pixel // w % h, pixel % w
    largest = tl.full((BLOCK, BLOCK_C), -float("inf"), tl.float32)
    for kh in tl.static_range(3):
        for kw in tl.static_range(3):
            row, column = oh * 2 + kh - 1, ow * 2 + kw - 1
            valid = in_range & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            source = ((image * height + row) * width + column) * CHANNELS
            mask = valid[:, None] & is_channel[None, :]
            values = tl.load(x + source[:, None] + channel[None, :], mask, -float("inf")).to(tl.float32)
            largest = tl.maximum(largest, values, propagate_nan=tl.PropagateNan.ALL)
    result = largest + tl.load(bias + channel, is_channel, 0).to(tl.float32)[None, :]
    result = tl.where(result < 0, 0, result)
    target = out + (pixel * CHANNELS)[:, None] + channel[None, :]
    tl.store(target, result.to(out.dtype.element_ty), in_range[:, None] & is_channel[None, :])


def normalise(pixels: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """Return pixels * scale + shift, for uint8 pixels [B, C, H, W], and scale and shift [C] in float32."""
    pixels = pixels.contiguous()
    batch, channels, height, width = pixels.shape
    out = pixels.new_empty(batch, height, width, channels, dtype=dtype)
    block_c = triton.next_power_of_2(channels)
    sizes, meta = (height, width), {"CHANNELS": channels, "BLOCK_C": block_c, "BLOCK": max(1, BLOCK // block_c)}
    _launch(_normalise, (pixels, scale, shift, out), batch * height * width, sizes, meta)
    return out.permute(0, 3, 1, 2)


def bias_relu(x: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return relu(x + bias + residual), in the memory of x if that is channels-last.

    Args:
        x: [B, C, H, W], overwritten.
        bias: [C].
        residual: of the shape of x, or None.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    _launch(_bias_relu, (x, bias, residual), x.numel(), (), {"CHANNELS": x.shape[1], "BLOCK": BLOCK})
    return x


def pool_bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """Return relu(max_pool(x) + bias), which is max_pool(relu(x + bias)), for windows of 3x3 at stride 2.

    Args:
        x: [B, C, H, W].
        bias: [C].
    """
    x = x.permute(0, 2, 3, 1).contiguous()
    batch, height, width, channels = x.shape
    h, w = -(-height // 2), -(-width // 2)
    out = x.new_empty(batch, h, w, channels)
    block_c = triton.next_power_of_2(channels)
    meta = {"CHANNELS": channels, "BLOCK_C": block_c, "BLOCK": max(1, BLOCK // block_c)}
    _launch(_pool_bias_relu, (x, bias, out), batch * h * w, (height, width, h, w), meta)
    return out.permute(0, 3, 1, 2)


def _launch(
    run: Any, tensors: tuple[Tensor | None, ...], count: int, sizes: tuple[int, ...], meta: dict[str, int]
) -> None:
    """Launch `run` on the device of the tensors, with one program for each block of `count` items."""
    if count:
        with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
            run[(triton.cdiv(count, meta["BLOCK"]),)](*tensors, count, *sizes, **meta)
