"""The inference backend of the native engine: float32 on the CPU, one call into C per batch."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.backend import Maps, Output, Stages
from rednet.model.inference.fold_batchnorm import fold_batchnorm, scale_and_shift
from rednet.model.native import Engine, Floats, unavailable
from rednet.model.nn.involution import Involution
from rednet.model.nn.rednet import BLOCKS, Bottleneck, RedNet, RedNetConfig

GROUP_CHANNELS = 16  # the group width that the engine is built for: one vector register of floats


class NativeBackend:
    """A copy of a network inside the native engine.

    Args:
        net: a RedNet for RGB.
        preprocess: the normalisation of pixels.
        threads: cores to use; None: as many as torch uses.
        build: as for `Engine`.

    Raises:
        ValueError: the engine does not support this network or is not available; the message says why.
    """

    def __init__(
        self, net: RedNet, preprocess: Preprocess, threads: int | None = None, build: str | None = None
    ) -> None:
        config = net.config
        if reason := unavailable():
            raise ValueError(reason)
        if config.group_channels != GROUP_CHANNELS:
            raise ValueError(
                f"the native engine supports {GROUP_CHANNELS} channels per group, not {config.group_channels}"
            )
        arrays = [np.ascontiguousarray(array.numpy(), np.float32) for array in self._arrays(net, preprocess)]
        self._config = config
        self._engine = Engine(_numbers(config), arrays, threads or torch.get_num_threads(), build)
        self.name = f"native engine, {self._engine.build}, {self._engine.threads} threads"

    def _arrays(self, net: RedNet, preprocess: Preprocess) -> Iterator[Tensor]:
        return _arrays(fold_batchnorm(net).cpu(), preprocess)

    def __call__(self, pixels: Tensor, stages: Stages = (), kernel_sums: Stages = ()) -> Output:
        config, (batch, _, height, width) = self._config, pixels.shape
        logits = np.empty((batch, config.num_classes), np.float32)
        features = np.empty((batch, config.feature_channels), np.float32)
        maps: list[Floats | None] = []
        sums: list[Floats | None] = []
        height, width = -(-height // 4), -(-width // 4)
        for stage, stride in enumerate(config.strides):
            height, width = -(-height // stride), -(-width // stride)
            channels = config.base_channels << stage
            shape = (batch, height, width)
            maps.append(np.empty((*shape, 4 * channels), np.float32) if stage in stages else None)
            sums.append(np.empty((*shape, channels // GROUP_CHANNELS), np.float32) if stage in kernel_sums else None)
        self._engine.run(pixels.detach().cpu().numpy(), [logits, features, *maps, *sums])
        return Output(
            torch.from_numpy(logits),
            torch.from_numpy(features),
            _channels_first(maps) if stages else None,
            _channels_first(sums) if kernel_sums else None,
        )


def _channels_first(maps: list[Floats | None]) -> Maps:
    return tuple(torch.from_numpy(each).permute(0, 3, 1, 2) for each in maps if each is not None)


def _numbers(config: RedNetConfig) -> list[int]:
    """Return the fields of `struct config` in native/weights.h."""
    return [
        *BLOCKS[config.depth],
        *config.strides,
        config.stem_channels,
        config.base_channels,
        config.num_classes,
        config.kernel_size,
        config.stem_kernel_size,
        config.reduction_ratio,
    ]


def _arrays(net: RedNet, preprocess: Preprocess) -> Iterator[Tensor]:
    """Yield a network with folded batch norms in the order of `network_create` in native/weights.h."""
    values = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    yield preprocess.normalise(values)  # the network's input for each pixel value: [1, 3, 1, 256]
    stem = net.backbone.stem
    yield from ohwi_weights(stem.get_submodule("0.conv"))
    yield from _involution(stem[1], stem[2])
    yield from ohwi_weights(stem.get_submodule("4.conv"))
    for block in net.modules():
        if isinstance(block, Bottleneck):
            yield from ohwi_weights(block.conv1)
            yield from _involution(block.conv2, block.bn2)
            yield from ohwi_weights(block.conv3)
            if block.downsample is not None:
                yield from ohwi_weights(block.downsample[0])
    yield net.head.fc.weight
    yield net.head.fc.bias


def ohwi_weights(conv: nn.Module) -> Iterator[Tensor]:
    """Yield the weights [out, row, column, in] and bias [out] of a convolution with folded batch norm."""
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    yield conv.weight.permute(0, 2, 3, 1)  # [out, row, column, in]
    yield conv.bias


def _involution(layer: nn.Module, bn: nn.Module) -> Iterator[Tensor]:
    assert isinstance(layer, Involution)
    yield from ohwi_weights(layer.get_submodule("conv1.conv"))
    yield from ohwi_weights(layer.get_submodule("conv2.conv"))
    yield from scale_and_shift(bn)
