"""A trained network in its fast inference form."""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.involution import ConvModule
from model.kernels import implementation_name
from model.preprocess import Preprocess
from model.rednet import Bottleneck, RedNet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Output(NamedTuple):
    """One forward pass, float32, on the device that ran it."""

    logits: Tensor  # [B, num_classes]
    features: Tensor  # [B, feature_channels]


@dataclass(frozen=True)
class Prepared:
    """Call it with uint8 pixels [B, 3, H, W], any B; made by `prepare`."""

    net: RedNet
    preprocess: Preprocess
    device: torch.device
    precision: str

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Output:
        x = self.preprocess.normalise(pixels.to(self.device, non_blocking=True))
        features = self.net.features(x.to(DTYPES[self.precision]))
        return Output(self.net.head(features).float(), features.float())

    @property
    def backend(self) -> str:
        """What runs the network, for people."""
        return f"torch, {implementation_name(self.device)} involution"


def prepare(
    net: RedNet, preprocess: Preprocess | None = None, device: str | torch.device = "auto", precision: str = "auto"
) -> Prepared:
    """Make the inference form of a network; the network itself stays as it is.

    Args:
        net: any RedNet.
        preprocess: how pixels are normalised; None: ImageNet's mean and standard deviation.
        device: auto (the GPU if there is one), cpu, cuda or cuda:N.
        precision: auto, fp32, bf16 or fp16.

    Raises:
        ValueError: there is no such device or precision here, or the network is not for RGB.
    """
    if net.config.in_channels != 3:
        raise ValueError(f"only networks for RGB can be prepared, this one has {net.config.in_channels} input channels")
    device = resolve_device(device)
    precision = "fp32" if precision == "auto" else precision
    if precision not in DTYPES:
        raise ValueError(f"precision must be auto, {', '.join(DTYPES)}, got {precision!r}")
    net = _folded(net).to(device, DTYPES[precision])
    return Prepared(net, preprocess or Preprocess(), device, precision)


def resolve_device(name: str | torch.device) -> torch.device:
    """The device of that name; auto: the GPU if there is one.

    Raises:
        ValueError: it is not here.
    """
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (not cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"there is no {device} here; torch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
    return device


def _folded(net: RedNet) -> RedNet:
    """A copy in evaluation mode whose convolutions have taken in the batch norms that follow them."""
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, ConvModule) and isinstance(module.bn, nn.BatchNorm2d):
            _fuse(module, "conv", "bn")
        elif isinstance(module, Bottleneck):
            _fuse(module, "conv1", "bn1")
            _fuse(module, "conv3", "bn3")
            if module.downsample is not None:
                _fuse(module.downsample, "0", "1")
    return net


def _fuse(parent: nn.Module, conv_name: str, bn_name: str) -> None:
    conv, bn = parent.get_submodule(conv_name), parent.get_submodule(bn_name)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(bn, nn.BatchNorm2d)
    parent.set_submodule(conv_name, fuse_conv_bn_eval(conv, bn))
    parent.set_submodule(bn_name, nn.Identity())
