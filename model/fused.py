"""A network for inference with the Triton kernels: no value passes through memory only to be scaled or cut off.

Everything is channels-last. Batch norms are folded into the convolutions before them; biases, ReLUs and the residual
sum are done by the convolution that they follow, and what surrounds an involution by its kernel.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.fallback import first_that_runs
from model.folded import folded, scale_and_shift
from model.form import Maps
from model.involution import Involution
from model.kernels import cuda
from model.preprocess import Preprocess
from model.rednet import Bottleneck, RedNet


class Fused:
    """A copy of a network, on one device, in one dtype.

    Args:
        net: a RedNet for RGB.
        preprocess: how pixels are normalised.
        device: a CUDA device; the CPU only under Triton's interpreter.
        dtype: of weights and activations; sums are kept in float32.
    """

    def __init__(self, net: RedNet, preprocess: Preprocess, device: torch.device, dtype: torch.dtype) -> None:
        net = folded(net).to(device)
        stem = net.backbone.stem
        self._dtype = dtype
        # value * scale + shift is the network's input for a pixel's value; made here, for a graph may not upload them
        self._scale, self._shift = (tensor.to(device) for tensor in _normalisation(preprocess))
        self._stem = (
            _Convolution.of(stem.get_submodule("0.conv"), dtype),
            _Involution.of(stem[1], stem[2], dtype),
            _Convolution.of(stem.get_submodule("4.conv"), dtype),
        )
        self._stages = [
            [_Block.of(block, dtype) for block in net.backbone.get_submodule(f"layer{stage}").children()]
            for stage in range(1, 5)
        ]
        self._head = net.head

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor, Maps, Callable[[int], Tensor]]:
        """Logits [B, num_classes] and features [B, D] in float32; the four stage maps [B, C, h, w] in `dtype`; and a
        function that makes the summed kernels of a stage's last involution, [B, G, h, w].

        Args:
            pixels: [B, 3, H, W] on the device, uint8, or float32 that is normalised already.
        """
        x = torch.addcmul(self._shift, pixels, self._scale) if pixels.dtype == torch.uint8 else pixels
        first, involution, second = self._stem
        x = first(x.to(self._dtype, memory_format=torch.channels_last))
        x = F.max_pool2d(second(involution(x)), 3, 2, 1)
        maps: list[Tensor] = []
        inner: list[Tensor] = []  # what each stage's last involution gets
        for blocks in self._stages:
            for block in blocks:
                inside, x = block(x)
            maps.append(x)
            inner.append(inside)
        features = x.mean(dim=(2, 3), dtype=torch.float32)

        def kernel_sums(stage: int) -> Tensor:
            return self._stages[stage][-1].involution.kernel_sums(inner[stage])

        return self._head(features), features, tuple(maps), kernel_sums


class _Convolution(NamedTuple):
    """A convolution with its bias, and a ReLU after it."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    @classmethod
    def of(cls, conv: nn.Module, dtype: torch.dtype) -> "_Convolution":
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        assert not isinstance(conv.padding, str)
        weight = conv.weight.to(dtype, memory_format=torch.channels_last)
        return cls(weight, conv.bias.to(dtype), conv.stride, conv.padding)

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """relu(convolution + plus), in one pass where cuDNN can."""
        weight, bias, stride, padding = self

        def in_passes() -> Tensor:
            out = F.conv2d(x, weight, bias, stride, padding)
            return (out if plus is None else out + plus).relu()

        def in_one_pass() -> Tensor:
            if plus is None:
                return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, (1, 1), 1)
            return torch.cudnn_convolution_add_relu(x, weight, plus, 1.0, bias, stride, padding, (1, 1), 1)

        shape = (x.shape, weight.shape, x.dtype, plus is None)
        return first_that_runs(shape, in_one_pass, in_passes) if x.is_cuda else in_passes()

    def bare(self, x: Tensor) -> Tensor:
        """The convolution alone: no bias, no ReLU."""
        return F.conv2d(x, self.weight, None, self.stride, self.padding)


class _Involution(NamedTuple):
    """An involution layer with the batch norm and ReLU that follow it."""

    reduce: _Convolution
    span: Tensor  # [G * K * K, C / r], of the 1x1 convolution that makes the kernels; its
    bias: Tensor  # [G * K * K], is added where they are used
    scale: Tensor
    shift: Tensor
    groups: int
    stride: int

    @classmethod
    def of(cls, layer: nn.Module, bn: nn.Module, dtype: torch.dtype) -> "_Involution":
        assert isinstance(layer, Involution)
        reduce, span = (_Convolution.of(layer.get_submodule(f"conv{n}.conv"), dtype) for n in (1, 2))
        return cls(reduce, span.weight.flatten(1), span.bias, *scale_and_shift(bn), layer.groups, layer.stride)

    def __call__(self, x: Tensor) -> Tensor:
        return cuda.fused(x, self._kernel(x), self.stride, self.bias, self.scale, self.shift)

    def kernel_sums(self, x: Tensor) -> Tensor:
        return self._kernel(x).sum(dim=2) + self.bias.reshape(self.groups, -1).sum(dim=1)[:, None, None]

    def _kernel(self, x: Tensor) -> Tensor:  # [B, G, K*K, h, w], less the bias
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, self.stride, ceil_mode=True)
        reduced = self.reduce(x).permute(0, 2, 3, 1)  # [B, h, w, C / r]
        # A product instead of a convolution, for its order: a tap's values for all pixels lie side by side.
        taps = torch.mm(self.span, reduced.flatten(0, 2).T)
        return taps.reshape(self.groups, len(taps) // self.groups, *reduced.shape[:3]).permute(2, 0, 1, 3, 4)


class _Block(NamedTuple):
    """A bottleneck."""

    conv1: _Convolution
    involution: _Involution
    conv3: _Convolution  # with the bias of `downsample`, whose sum it is added to
    downsample: _Convolution | None

    @classmethod
    def of(cls, block: nn.Module, dtype: torch.dtype) -> "_Block":
        assert isinstance(block, Bottleneck)
        conv1, conv3 = _Convolution.of(block.conv1, dtype), _Convolution.of(block.conv3, dtype)
        downsample = None
        if block.downsample is not None:
            downsample = _Convolution.of(block.downsample[0], dtype)
            both = block.conv3.get_parameter("bias") + block.downsample[0].get_parameter("bias")
            conv3 = conv3._replace(bias=both.to(dtype))
        return cls(conv1, _Involution.of(block.conv2, block.bn2, dtype), conv3, downsample)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the involution gets, and the output."""
        inside = self.conv1(x)
        shortcut = x if self.downsample is None else self.downsample.bare(x)
        return inside, self.conv3(self.involution(inside), plus=shortcut)


def _normalisation(preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Scale and shift [3, 1, 1] that turn a pixel's value into the network's input."""
    ends = preprocess.normalise(torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)).double()[0]
    return ((ends[..., 1:] - ends[..., :1]) / 255).float(), ends[..., :1].float()
