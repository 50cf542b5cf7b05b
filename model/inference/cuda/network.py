"""RedNet with fused Triton operators: no pass over memory only scales, shifts or clips values.

Everything is channels-last. Batch norms are folded into the convolutions before them; a convolution also adds its bias
and the residual and applies the ReLU; an involution's Triton kernel applies the batch norm and ReLU that follow it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.backend import Maps
from rednet.model.inference.cuda.conv_fallback import ConvFallback
from rednet.model.inference.fold_batchnorm import fold_batchnorm, scale_and_shift
from rednet.model.nn.involution import Involution
from rednet.model.nn.rednet import Bottleneck, RedNet
from rednet.model.ops import triton_ops


class TritonRedNet:
    """An inference copy of a RedNet on one device and in one dtype.

    Args:
        net: a RedNet for RGB.
        preprocess: the normalisation of pixels.
        device: a CUDA device, or the CPU under Triton's interpreter.
        dtype: dtype of weights and activations; sums are accumulated in float32.
    """

    def __init__(self, net: RedNet, preprocess: Preprocess, device: torch.device, dtype: torch.dtype) -> None:
        net = fold_batchnorm(net).to(device)
        stem = net.backbone.stem
        self._dtype = dtype
        fallback = ConvFallback()
        # The network's input is value * scale + shift. Uploaded here, because a captured graph must not upload.
        self._scale, self._shift = (tensor.to(device) for tensor in _normalisation(preprocess))
        self._stem = (
            _Convolution.of(stem.get_submodule("0.conv"), dtype, fallback),
            _Involution.of(stem[1], stem[2], dtype, fallback),
            _Convolution.of(stem.get_submodule("4.conv"), dtype, fallback),
        )
        self._stages = [
            [_Block.of(block, dtype, fallback) for block in net.backbone.get_submodule(f"layer{stage}").children()]
            for stage in range(1, 5)
        ]
        self._head = net.head

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor, Maps, Callable[[int], Tensor]]:
        """Run a forward pass.

        Args:
            pixels: [B, 3, H, W] on the device, uint8, or normalised float32.

        Returns:
            Logits [B, num_classes] and features [B, D] in float32; the four stage maps [B, C, h, w] in `dtype`; and a
            function that computes the summed kernels of a stage's last involution, [B, G, h, w].
        """
        x = torch.addcmul(self._shift, pixels, self._scale) if pixels.dtype == torch.uint8 else pixels
        first, involution, second = self._stem
        x = first(x.to(self._dtype, memory_format=torch.channels_last))
        x = F.max_pool2d(second(involution(x)), 3, 2, 1)
        maps: list[Tensor] = []
        involution_inputs: list[Tensor] = []  # of each stage's last block
        for blocks in self._stages:
            for block in blocks:
                involution_input, x = block(x)
            maps.append(x)
            involution_inputs.append(involution_input)
        features = x.mean(dim=(2, 3), dtype=torch.float32)

        def kernel_sums(stage: int) -> Tensor:
            return self._stages[stage][-1].involution.kernel_sums(involution_inputs[stage])

        return self._head(features), features, tuple(maps), kernel_sums


class _Convolution(NamedTuple):
    """A convolution with bias and ReLU."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    fallback: ConvFallback

    @classmethod
    def of(cls, conv: nn.Module, dtype: torch.dtype, fallback: ConvFallback) -> "_Convolution":
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        assert not isinstance(conv.padding, str)
        weight = conv.weight.to(dtype, memory_format=torch.channels_last)
        return cls(weight, conv.bias.to(dtype), conv.stride, conv.padding, fallback)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return relu(convolution(x) + residual), computed in one pass where cuDNN supports it."""
        weight, bias, stride, padding, fallback = self

        def separate() -> Tensor:
            out = F.conv2d(x, weight, bias, stride, padding)
            return (out if residual is None else out + residual).relu()

        def fused() -> Tensor:
            if residual is None:
                return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, (1, 1), 1)
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, (1, 1), 1)

        if not x.is_cuda:
            return separate()
        key = (x.shape, x.stride(), x.device, x.dtype, weight.shape, stride, padding, residual is None)
        return fallback.run(key, fused, separate)

    def bare(self, x: Tensor) -> Tensor:
        """Return the convolution without bias and ReLU."""
        return F.conv2d(x, self.weight, None, self.stride, self.padding)


class _Involution(NamedTuple):
    """An involution layer with the batch norm and ReLU that follow it. `reduce` and `span` are the paper's names."""

    reduce: _Convolution
    span: Tensor  # [G * K * K, C / r], weights of the 1x1 convolution that generates the kernels
    bias: Tensor  # [G * K * K], its bias, which the Triton kernel adds where it reads the kernels
    scale: Tensor  # [C], batch norm
    shift: Tensor  # [C], batch norm
    groups: int
    stride: int

    @classmethod
    def of(cls, layer: nn.Module, bn: nn.Module, dtype: torch.dtype, fallback: ConvFallback) -> "_Involution":
        assert isinstance(layer, Involution)
        reduce, span = (_Convolution.of(layer.get_submodule(f"conv{n}.conv"), dtype, fallback) for n in (1, 2))
        return cls(reduce, span.weight.flatten(1), span.bias, *scale_and_shift(bn), layer.groups, layer.stride)

    def __call__(self, x: Tensor) -> Tensor:
        return triton_ops.fused(x, self._kernel(x), self.stride, self.bias, self.scale, self.shift)

    def kernel_sums(self, x: Tensor) -> Tensor:
        return self._kernel(x).sum(dim=2) + self.bias.reshape(self.groups, -1).sum(dim=1)[:, None, None]

    def _kernel(self, x: Tensor) -> Tensor:  # [B, G, K*K, h, w], without the bias
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, self.stride, ceil_mode=True)
        reduced = self.reduce(x).permute(0, 2, 3, 1)  # [B, h, w, C / r]
        # A matrix product instead of a convolution, for its layout: one tap's values for all pixels are adjacent.
        taps = torch.mm(self.span, reduced.flatten(0, 2).T)
        return taps.reshape(self.groups, len(taps) // self.groups, *reduced.shape[:3]).permute(2, 0, 1, 3, 4)


class _Block(NamedTuple):
    """A bottleneck block."""

    conv1: _Convolution
    involution: _Involution
    conv3: _Convolution  # its bias includes that of `downsample`, since both are summed
    downsample: _Convolution | None

    @classmethod
    def of(cls, block: nn.Module, dtype: torch.dtype, fallback: ConvFallback) -> "_Block":
        assert isinstance(block, Bottleneck)
        conv1, conv3 = (_Convolution.of(conv, dtype, fallback) for conv in (block.conv1, block.conv3))
        downsample = None
        if block.downsample is not None:
            downsample = _Convolution.of(block.downsample[0], dtype, fallback)
            both = block.conv3.get_parameter("bias") + block.downsample[0].get_parameter("bias")
            conv3 = conv3._replace(bias=both.to(dtype))
        return cls(conv1, _Involution.of(block.conv2, block.bn2, dtype, fallback), conv3, downsample)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the involution's input and the block's output."""
        involution_input = self.conv1(x)
        shortcut = x if self.downsample is None else self.downsample.bare(x)
        return involution_input, self.conv3(self.involution(involution_input), residual=shortcut)


def _normalisation(preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Return the scale and shift, [3, 1, 1] each, from a pixel's value to the network's input."""
    ends = preprocess.normalise(torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)).double()[0]
    return ((ends[..., 1:] - ends[..., :1]) / 255).float(), ends[..., :1].float()
