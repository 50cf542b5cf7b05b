"""Involution: a convolution whose kernel is generated at every position, from the features at that position.

Li et al., "Involution: Inverting the Inherence of Convolution for Visual Recognition", CVPR 2021, section 3;
https://arxiv.org/abs/2103.06255.
"""

from math import isqrt

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from rednet.model.nn.pointwise import PointwiseConv2d
from rednet.model.ops import forward
from rednet.model.ops.batch_norm import batch_norm


def involution(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """Weight the KxK neighbourhood of each position by that position's own kernel and sum (paper, equation 4).

    Under `torch.autocast` both tensors are cast to its dtype, float64 excepted, as for a convolution.

    Args:
        x: [B, C, H, W], padded with zeros.
        kernel: [B, G, K*K, h, w] with odd K, h = ceil(H / stride), w = ceil(W / stride). The C // G channels of a group
            share a kernel. Taps are in row-major order.
        stride: distance between neighbouring outputs, in pixels of x.

    Returns:
        [B, C, h, w] in the dtype of x; under autocast in autocast's dtype.

    Raises:
        ValueError: the shapes, dtypes or devices do not fit together.
        NotImplementedError: x or kernel carries a tangent (forward-mode differentiation).

    Example:
        >>> x = torch.ones(1, 16, 3, 3)
        >>> mean_filter = torch.full((1, 1, 9, 3, 3), 1 / 9)  # K = 3, one group, the same kernel at every position
        >>> involution(x, mean_filter)[0, 0]
        tensor([[0.4444, 0.6667, 0.4444],
                [0.6667, 1.0000, 0.6667],
                [0.4444, 0.6667, 0.4444]])
    """
    if has_torch_function((x, kernel)):  # torch.fx traces the call only, because the checks need sizes
        result: Tensor = handle_torch_function(involution, (x, kernel), x, kernel, stride)
        return result
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        x, kernel = _autocast(x), _autocast(kernel)
    if x.dim() != 4 or kernel.dim() != 5:
        raise ValueError(f"involution needs x [B, C, H, W] and kernel [B, G, K*K, h, w], got {_shapes(x, kernel)}")
    taps = kernel.shape[2]
    if stride < 1 or isqrt(taps) ** 2 != taps or taps % 2 == 0:
        raise ValueError(f"involution needs stride >= 1 and K*K taps with odd K, got stride {stride} and {taps} taps")
    if x.shape[0] != kernel.shape[0] or kernel.shape[1] == 0 or x.shape[1] % kernel.shape[1] != 0:
        raise ValueError(f"batch sizes must agree and groups must divide the channels, got {_shapes(x, kernel)}")
    height, width = -(-x.shape[2] // stride), -(-x.shape[3] // stride)
    if (height, width) != (kernel.shape[3], kernel.shape[4]):
        raise ValueError(f"at stride {stride} the kernel map must be {height}x{width}, got {_shapes(x, kernel)}")
    if x.dtype != kernel.dtype or x.device != kernel.device:
        raise ValueError(f"x is {x.dtype} on {x.device}, kernel is {kernel.dtype} on {kernel.device}")
    if not x.is_floating_point():
        raise ValueError(f"involution needs floating point, got {x.dtype}")
    if not torch.compiler.is_compiling() and any(
        forward_ad.unpack_dual(each).tangent is not None for each in (x, kernel)
    ):
        # The operator would drop the tangent and return a wrong derivative.
        raise NotImplementedError("involution does not support forward-mode differentiation (torch.func.jvp)")
    return forward(x, kernel, stride)


def _autocast(x: Tensor) -> Tensor:
    """Cast as autocast casts a convolution's operand: float64 and integers stay."""
    if not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _shapes(x: Tensor, kernel: Tensor) -> str:
    return f"x {list(x.shape)}, kernel {list(kernel.shape)}"


class ConvModule(nn.Module):
    """A convolution, with batch norm and ReLU unless `bare`. Attribute names are those of the checkpoints."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, bare: bool = False
    ) -> None:
        super().__init__()
        self.conv = (
            PointwiseConv2d(in_channels, out_channels, stride, bias=bare)
            if kernel_size == 1
            else nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bare)
        )
        self.bn = None if bare else nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.bn is None else batch_norm(self.bn, x)


class Involution(nn.Module):
    """The layer: two 1x1 convolutions generate a kernel per position from x, and `involution` applies it to x.

    At stride 2 the kernels are generated from averages over 2x2 pixels. At an odd border the average is over the pixels
    that exist, so every input size is well defined (the official code fails there, or reads out of bounds).

    Args:
        channels: C of the input and the output.
        kernel_size: K, odd.
        stride: 1 or more.
        reduction_ratio: the bottleneck of the kernel generator has C // reduction_ratio channels.
        group_channels: number of channels that share a kernel.

    Raises:
        ValueError: an argument is below 1, K is even, or `channels` is not a multiple of the ratio and the group.

    Example:
        >>> layer = Involution(32, kernel_size=7, stride=2)
        >>> layer(torch.zeros(1, 32, 15, 15)).shape
        torch.Size([1, 32, 8, 8])
    """

    def __init__(
        self, channels: int, kernel_size: int, stride: int = 1, reduction_ratio: int = 4, group_channels: int = 16
    ) -> None:
        super().__init__()
        if min(channels, kernel_size, stride, reduction_ratio, group_channels) < 1:
            raise ValueError(
                f"every argument must be at least 1, got channels {channels}, kernel_size {kernel_size}, stride "
                f"{stride}, reduction_ratio {reduction_ratio}, group_channels {group_channels}"
            )
        for name, divisor in (("group_channels", group_channels), ("reduction_ratio", reduction_ratio)):
            if channels % divisor:
                raise ValueError(f"{channels} channels are not a multiple of {name} {divisor}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} is not odd")
        self.channels, self.kernel_size, self.stride = channels, kernel_size, stride
        self.groups = channels // group_channels
        bottleneck = channels // reduction_ratio
        # The names conv1 and conv2 are those of the official checkpoints.
        self.conv1 = ConvModule(channels, bottleneck)
        self.conv2 = ConvModule(bottleneck, kernel_size**2 * self.groups, bare=True)
        self.avgpool = nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.conv2(self.conv1(self.avgpool(x)))  # [B, G*K*K, h, w]
        kernel = kernel.unflatten(1, (self.groups, self.kernel_size**2))
        return involution(x, kernel, self.stride)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, groups={self.groups}"
