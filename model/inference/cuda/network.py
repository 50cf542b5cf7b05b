"""RedNet with fused Triton operators: no pass over memory only scales, shifts or clips values.

Everything is channels-last. Batch norms are folded into the convolutions before them. A 1x1 convolution is a matrix
product that also adds its bias and applies the ReLU; the last one of a block adds the residual, too. An involution's
Triton kernel applies the batch norm and ReLU that follow it, and optionally generates the involution kernels itself.

torch's `cudnn_convolution_relu` is not used: it passes its uninitialised output to cuDNN as a residual, to be
multiplied by zero. If cuDNN computes that product, a NaN in the memory stays.
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
from rednet.model.ops import triton_fused, triton_generated, triton_ops

ALIGNMENT = 8  # pixels; 16 bytes in half precision


class TritonRedNet:
    """An inference copy of a RedNet on one device and in one dtype.

    Args:
        net: a RedNet for RGB.
        preprocess: the normalisation of pixels.
        device: a CUDA device, or the CPU under Triton's interpreter.
        dtype: dtype of weights and activations; sums are accumulated in float32.
        fuse_generation: generate involution kernels inside the involution where `triton_generated` supports it, instead
            of writing them to memory.
    """

    def __init__(
        self,
        net: RedNet,
        preprocess: Preprocess,
        device: torch.device,
        dtype: torch.dtype,
        fuse_generation: bool = False,
    ) -> None:
        net = fold_batchnorm(net).to(device)
        stem = net.backbone.stem
        self._dtype = dtype
        make = _Maker(dtype, ConvFallback(), _fused_relu_keeps_nan(device, dtype), fuse_generation)
        # The network's input is value * scale + shift. Uploaded here, because a captured graph must not upload.
        self._scale, self._shift = (tensor.to(device) for tensor in _normalisation(preprocess))
        self._stem = (
            make.convolution(stem.get_submodule("0.conv")),
            make.involution(stem[1], stem[2]),
            make.convolution(stem.get_submodule("4.conv")),
        )
        self._stages = [
            [make.block(block) for block in net.backbone.get_submodule(f"layer{stage}").children()]
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
        if pixels.dtype == torch.uint8:
            x = triton_fused.normalise(pixels, self._scale, self._shift, self._dtype)
        else:
            x = pixels.to(self._dtype, memory_format=torch.channels_last)
        first, involution, second = self._stem
        x = involution(triton_fused.bias_relu(first(x), first.bias))
        x = triton_fused.pool_bias_relu(second(x), second.bias)
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
    """A convolution, without its bias."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, self.stride, self.padding)


class _Pointwise(NamedTuple):
    """A 1x1 convolution with bias and ReLU, as a product of matrices [pixels, channels]."""

    weight: Tensor  # [C_in, C_out]
    bias: Tensor
    keeps_nan: bool  # whether the ReLU inside the product does

    def __call__(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)  # [B, h, w, C_in]
        rows = pixels.flatten(0, 2)
        if self.keeps_nan:
            out = torch._addmm_activation(self.bias, rows, self.weight)
        else:
            out = triton_fused.bias_relu(torch.mm(rows, self.weight)[..., None, None], self.bias)
        return out.reshape(*pixels.shape[:3], len(self.bias)).permute(0, 3, 1, 2)


class _Residual(NamedTuple):
    """A convolution with bias, residual and ReLU, in one pass where cuDNN supports it."""

    convolution: _Convolution
    fallback: ConvFallback

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        weight, bias, stride, padding = self.convolution

        def fused() -> Tensor:
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, (1, 1), 1)

        def separate() -> Tensor:
            return triton_fused.bias_relu(self.convolution(x), bias, residual)

        if not x.is_cuda:
            return separate()
        key = (x.shape, x.stride(), x.device, x.dtype, weight.shape, stride, padding)
        return self.fallback.run(key, fused, separate)


class _Involution(NamedTuple):
    """An involution layer with the batch norm and ReLU that follow it. `reduce` and `span` are the paper's names."""

    reduce: _Pointwise
    span: Tensor  # [G, K * K, C / r], weights of the 1x1 convolution that generates the kernels
    bias: Tensor  # [G * K * K], its bias, which the Triton kernel adds where it reads the kernels
    scale: Tensor  # [C], batch norm
    shift: Tensor  # [C], batch norm
    stride: int
    fuse_generation: bool

    def __call__(self, x: Tensor) -> Tensor:
        reduced, others = self._reduced(x), (self.stride, self.bias, self.scale, self.shift)
        if self.fuse_generation:
            return triton_generated.fused(x, reduced, self.span, *others)
        return triton_ops.fused(x, self._kernel(reduced), *others)

    def kernel_sums(self, x: Tensor) -> Tensor:
        # What the summed weights generate is the sum of what they generate one by one, without the tensor of all taps.
        span, bias = self.span.sum(dim=1), self.bias.reshape(len(self.span), -1).sum(dim=1)
        return torch.einsum("gc,bcyx->bgyx", span, self._reduced(x)) + bias[:, None, None]

    def _reduced(self, x: Tensor) -> Tensor:  # [B, C / r, h, w]
        return self.reduce(F.avg_pool2d(x, self.stride, self.stride, ceil_mode=True) if self.stride > 1 else x)

    def _kernel(self, reduced: Tensor) -> Tensor:  # [B, G, K*K, h, w], without the bias
        pixels = reduced.permute(0, 2, 3, 1)
        rows, span = pixels.flatten(0, 2), self.span.flatten(0, 1)
        # A matrix product instead of a convolution, for its layout: one tap's values for all pixels are adjacent. Each
        # tap begins at a multiple of 16 bytes, without which cuBLAS takes slow algorithms (7x7 maps in small batches).
        padded = rows.new_empty(len(span), -(-len(rows) // ALIGNMENT) * ALIGNMENT)
        taps = torch.mm(span, rows.T, out=padded[:, : len(rows)])
        return taps.reshape(*self.span.shape[:2], *pixels.shape[:3]).permute(2, 0, 1, 3, 4)


class _Block(NamedTuple):
    """A bottleneck block."""

    conv1: _Pointwise
    involution: _Involution
    conv3: _Residual  # its bias includes that of `downsample`, since both are summed
    downsample: _Convolution | None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the involution's input and the block's output."""
        involution_input = self.conv1(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        return involution_input, self.conv3(self.involution(involution_input), shortcut)


class _Maker(NamedTuple):
    """Makes the parts of the network from its modules with folded batch norms."""

    dtype: torch.dtype
    fallback: ConvFallback
    keeps_nan: bool
    fuse_generation: bool

    def convolution(self, conv: nn.Module) -> _Convolution:
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        assert not isinstance(conv.padding, str)
        weight = conv.weight.to(self.dtype, memory_format=torch.channels_last)
        return _Convolution(weight, conv.bias.to(self.dtype), conv.stride, conv.padding)

    def pointwise(self, conv: nn.Module) -> _Pointwise:
        weight, bias, *_ = self.convolution(conv)
        return _Pointwise(weight.flatten(1).T, bias, self.keeps_nan)

    def involution(self, layer: nn.Module, bn: nn.Module) -> _Involution:
        assert isinstance(layer, Involution)
        reduce = self.pointwise(layer.get_submodule("conv1.conv"))
        weight, bias, *_ = self.convolution(layer.get_submodule("conv2.conv"))
        span = weight.reshape(layer.groups, layer.kernel_size**2, -1)
        scale, shift = scale_and_shift(bn)
        fuse = self.fuse_generation and triton_generated.is_supported(layer.kernel_size, len(scale) // layer.groups)
        if fuse:  # channels of zeros, up to what tensor cores multiply at a time
            missing = -span.shape[2] % triton_generated.REDUCED_BLOCK
            reduce = reduce._replace(weight=F.pad(reduce.weight, (0, missing)), bias=F.pad(reduce.bias, (0, missing)))
            span = F.pad(span, (0, missing))
        return _Involution(reduce, span, bias, scale, shift, layer.stride, fuse)

    def block(self, block: nn.Module) -> _Block:
        assert isinstance(block, Bottleneck)
        conv3, downsample = self.convolution(block.conv3), None
        if block.downsample is not None:
            downsample = self.convolution(block.downsample[0])
            both = block.conv3.get_parameter("bias") + block.downsample[0].get_parameter("bias")
            conv3 = conv3._replace(bias=both.to(self.dtype))
        conv1, involution = self.pointwise(block.conv1), self.involution(block.conv2, block.bn2)
        return _Block(conv1, involution, _Residual(conv3, self.fallback), downsample)


def _fused_relu_keeps_nan(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product with bias and ReLU returns NaN for NaN. cuBLAS describes its ReLU as max(x, 0)."""
    broken = torch.full((64, 64), torch.nan, dtype=dtype, device=device)
    return bool(torch._addmm_activation(broken[0], broken, broken).isnan().all())


def _normalisation(preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Return the scale and shift, [3] each, from a pixel's value to the network's input."""
    ends = preprocess.normalise(torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)).double()[0]
    return ((ends[:, 0, 1] - ends[:, 0, 0]) / 255).float(), ends[:, 0, 0].float()
