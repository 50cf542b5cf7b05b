"""The definition of the int8 network: every code that it stores, to the last bit, for networks of any shape.

Integers are kept in float64, in which sums of them are exact up to 2^53. What the engine does in float32 is done in
float32 here, operation by operation: of a sum of products one fused multiply-add (another adds the way around a block),
one rounding to the nearest integer, halves to the even one, and saturation. Factors are worked out in float64 and
rounded to float32 once, but for the weights of the first convolution, which are float32 throughout.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.fold_batchnorm import fold_batchnorm, scale_and_shift
from rednet.model.nn.involution import Involution
from rednet.model.nn.rednet import Bottleneck, RedNet
from rednet.model.ops import reference


class Answer(NamedTuple):
    """One forward pass."""

    logits: Tensor  # float32 [B, num_classes]; alone not exact to the bit: their sums may be made in any order
    features: Tensor  # float32 [B, feature_channels]
    codes: dict[str, Tensor]  # uint8 or int8 [B, C, h, w], by the names of `rednet.model.inference.activation_ranges`


class Codes(NamedTuple):
    """A stored activation."""

    values: Tensor  # float64 [B, C, h, w], integers
    step: float  # what code 1 stands for


class Int8Reference:
    """A network with int8 weights, and scales as `rednet.model.inference.activation_ranges` gives them."""

    def __init__(self, net: RedNet, preprocess: Preprocess, scales: Mapping[str, float]) -> None:
        self._net, self._preprocess, self._scales = fold_batchnorm(net), preprocess, scales
        self._stored: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Answer:
        """Forward uint8 pixels [B, 3, H, W]."""
        self._stored = {}
        stem = self._net.backbone.stem
        x = self._first_convolution(stem.get_submodule("0.conv"), self._preprocess.normalise(pixels))
        x = self._involution(stem[1], stem[2], x, "backbone.stem.1")
        x = self._convolution(stem.get_submodule("4.conv"), x, "backbone.stem.4")
        x = Codes(F.max_pool2d(x.values, 3, 2, 1), x.step)
        for name, block in self._net.named_modules():
            if isinstance(block, Bottleneck):
                x = self._block(block, x, name)
        pixels_left = x.values[0, 0].numel()
        features = x.values.sum(dim=(2, 3)).float() * single(torch.tensor(x.step / pixels_left))
        return Answer(self._net.head(features), features, self._stored)

    def _first_convolution(self, conv: nn.Module, x: Tensor) -> Codes:
        """Of normalised pixels with float32 weights: from the bias on, tap by tap (row, column, channel), fused."""
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        step = self._step("backbone.stem.0", signed=False)
        weight, bias = conv.weight / step, conv.bias / step  # in float32
        h, w = -(-x.shape[2] // 2), -(-x.shape[3] // 2)
        padded = F.pad(x, (1, 1, 1, 1))
        total = bias.reshape(1, -1, 1, 1).expand(x.shape[0], -1, h, w)
        for row in range(3):
            for column in range(3):
                window = padded[:, :, row : row + 2 * h - 1 : 2, column : column + 2 * w - 1 : 2]
                for channel in range(3):
                    total = fused(window[:, channel : channel + 1], weight[:, channel, row, column], total)
        return self._store("backbone.stem.0", total, signed=False)

    def _block(self, block: Bottleneck, x: Codes, name: str) -> Codes:
        around = x
        if block.downsample is not None:
            around = self._convolution(block.downsample[0], x, f"{name}.downsample", signed=True)
        middle = self._convolution(block.conv1, x, f"{name}.conv1")
        middle = self._involution(block.conv2, block.bn2, middle, f"{name}.conv2")
        return self._convolution(block.conv3, middle, name, around=around)

    def _convolution(
        self, conv: nn.Module, x: Codes, name: str, *, signed: bool = False, around: Codes | None = None
    ) -> Codes:
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        weights, weight_steps = quantised(conv.weight)
        total = F.conv2d(x.values, weights, None, conv.stride, conv.padding)
        step = self._step(name, signed)
        bias = single(conv.bias.double() / step).reshape(-1, 1, 1)
        value = fused(total.float(), single(weight_steps * x.step / step), bias)
        if around is not None:
            value = fused(around.values.float(), single(torch.tensor([around.step / step])), value)
        return self._store(name, value, signed)

    def _involution(self, layer: nn.Module, bn: nn.Module, x: Codes, name: str) -> Codes:
        assert isinstance(layer, Involution)
        reduced = self._convolution(layer.get_submodule("conv1.conv"), averaged(x, layer.stride), f"{name}.conv1")
        kernels = self._convolution(layer.get_submodule("conv2.conv"), reduced, f"{name}.conv2", signed=True)
        taps = kernels.values.unflatten(1, (layer.groups, layer.kernel_size**2))
        total = reference.forward(x.values, taps, layer.stride)
        scale, shift = scale_and_shift(bn)
        step = self._step(name, signed=False)
        factor, offset = scale.double() * x.step * kernels.step / step, shift.double() / step
        return self._store(name, fused(total.float(), single(factor), single(offset).reshape(-1, 1, 1)), signed=False)

    def _step(self, name: str, signed: bool) -> float:
        return self._scales[name] / (127 if signed else 255)

    def _store(self, name: str, value: Tensor, signed: bool) -> Codes:
        """Round and saturate: that is the ReLU, too, of what has no sign."""
        lowest, highest, dtype = (-128, 127, torch.int8) if signed else (0, 255, torch.uint8)
        codes = value.round().clamp(lowest, highest)  # halves to even
        self._stored[name] = codes.to(dtype)
        return Codes(codes.double(), self._step(name, signed))


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights of a convolution as float64, and what code 1 stands for in each output channel [out]."""
    weight = weight.double()
    steps = weight.abs().amax(dim=(1, 2, 3)) / 127
    steps[steps == 0] = 1
    return (weight / steps.reshape(-1, 1, 1, 1)).round(), steps


def averaged(x: Codes, stride: int) -> Codes:
    """Over squares of pixels, fewer at the border; to the nearest integer, halves up."""
    sums, counts = (
        F.avg_pool2d(each, stride, stride, ceil_mode=True, divisor_override=1)
        for each in (x.values, torch.ones_like(x.values))
    )
    return Codes(((sums + (counts / 2).floor()) / counts).floor(), x.step)


def single(values: Tensor) -> Tensor:
    return values.to(torch.float32)


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c in float32, rounded once; b [C] belongs to the channels of a [B, C or 1, h, w].

    In float64 the product is exact. A sum that is not is rounded to the neighbour with an odd last bit, so that the
    second rounding, to float32, gives what a single one gives (Boldo & Melquiond, "When double rounding is odd", 2005).
    """
    product, addend = a.double() * b.double().reshape(-1, 1, 1), c.double()
    total = product + addend
    restored = total - product
    error = (product - (total - restored)) + (addend - restored)  # exact (Knuth's two-sum)
    bits = total.contiguous().view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)  # larger numbers have larger bit patterns
    odd = torch.where((error != 0) & (bits % 2 == 0), bits + away, bits)
    return odd.view(torch.float64).float()
