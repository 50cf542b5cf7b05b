"""Folds the batch norms of a trained network into the convolutions before them."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rednet.model.nn.involution import ConvModule
from rednet.model.nn.rednet import Bottleneck, RedNet


def fold_batchnorm(net: RedNet) -> RedNet:
    """Return a float32 copy in evaluation mode whose convolutions include the batch norms that followed them.

    Batch norms after an involution remain: there is no convolution to fold them into (see `scale_and_shift`).
    """
    net = copy.deepcopy(net).eval().requires_grad_(False).float()
    for module in net.modules():
        if isinstance(module, ConvModule) and isinstance(module.bn, nn.BatchNorm2d):
            _fuse(module, "conv", "bn")
        elif isinstance(module, Bottleneck):
            _fuse(module, "conv1", "bn1")
            _fuse(module, "conv3", "bn3")
            if module.downsample is not None:
                _fuse(module.downsample, "0", "1")
    return net


def scale_and_shift(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a batch norm in evaluation mode as a scale and a shift per channel, both [C]."""
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return scale, bn.bias - bn.running_mean * scale


def _fuse(parent: nn.Module, conv_name: str, bn_name: str) -> None:
    conv, bn = parent.get_submodule(conv_name), parent.get_submodule(bn_name)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(bn, nn.BatchNorm2d)
    parent.set_submodule(conv_name, fuse_conv_bn_eval(conv, bn))
    parent.set_submodule(bn_name, nn.Identity())
