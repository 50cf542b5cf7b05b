"""The int8 inference backend, on the CPU: one scale per stored activation, one per output channel of the weights."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.activation_ranges import validate_ranges
from rednet.model.inference.fold_batchnorm import fold_batchnorm, scale_and_shift
from rednet.model.inference.native_backend import NativeBackend, ohwi_weights
from rednet.model.native import int8_builds, int8_unavailable
from rednet.model.nn.rednet import Bottleneck, RedNet

MAX_UNSIGNED, MAX_SIGNED, MAX_WEIGHT = 255, 127, 127  # largest quantised values
# The engine accumulates products in signed 32 bits. A product is at most 255 * 127 = 32,385, so sums of
# (2**31 - 1) // 32,385 = 66,311 products cannot overflow. A convolution sums K * K * in_channels products: the stem's
# 3x3 convolution is safe up to 7,367 channels (`stem_channels` up to 14,720), a 1x1 convolution up to 66,311.
MAX_SUMMANDS = (2**31 - 1) // (MAX_UNSIGNED * MAX_WEIGHT)


class Int8Backend(NativeBackend):
    """A copy of a network inside an int8 build of the native engine.

    Activations are uint8 (int8 where they have a sign) with one scale per tensor; weights are int8 with one scale per
    output channel. Sums are exact, so every build computes the same values. The stem's first convolution and the
    classifier stay float32.

    Args:
        net: a RedNet for RGB.
        preprocess: the normalisation of pixels.
        ranges: activation ranges, as `collect_activation_ranges` returns them.
        threads: cores to use; None: as many as torch uses.
        build: one of `int8_builds`; None: the best one for this machine.

    Raises:
        ValueError: the machine has no int8 build, the engine does not support this network, its sums could overflow, or
            the ranges belong to another network.
    """

    def __init__(
        self,
        net: RedNet,
        preprocess: Preprocess,
        ranges: Mapping[str, float],
        threads: int | None = None,
        build: str | None = None,
    ) -> None:
        if reason := int8_unavailable():
            raise ValueError(reason)
        validate_ranges(net, ranges)
        validate_sums(net)
        self._ranges = dict(ranges)
        super().__init__(net, preprocess, threads, build or int8_builds()[0])

    def _arrays(self, net: RedNet, preprocess: Preprocess) -> Iterator[Tensor]:
        return (array.float() for array in _arrays(fold_batchnorm(net).cpu(), preprocess, scales_of(self._ranges)))


def validate_sums(net: RedNet) -> None:
    """Check that no sum of a network can overflow in int8.

    Raises:
        ValueError: a convolution sums more than `MAX_SUMMANDS` products.
    """
    for name, conv in net.named_modules():
        if not isinstance(conv, nn.Conv2d) or name == "backbone.stem.0.conv":  # the first convolution stays float32
            continue
        summands = conv.weight[0].numel()
        if summands > MAX_SUMMANDS:
            raise ValueError(
                f"int8 sums could overflow: {name} sums {summands} products; at most {MAX_SUMMANDS} fit into 32 bits"
            )


def scales_of(ranges: Mapping[str, float]) -> dict[str, float]:
    """Return the scale of each activation: the real value of one quantisation step."""
    signed = ("conv2.conv2", "stem.1.conv2", "downsample")
    return {name: amax / (MAX_SIGNED if name.endswith(signed) else MAX_UNSIGNED) for name, amax in ranges.items()}


def _arrays(net: RedNet, preprocess: Preprocess, scales: Mapping[str, float]) -> Iterator[Tensor]:
    """Yield a network with folded batch norms, quantised, in the order of `network_create` in native/weights.h."""
    values = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    yield preprocess.normalise(values)
    stem = net.backbone.stem
    first = ohwi_weights(stem.get_submodule("0.conv"))
    yield from (each / scales["backbone.stem.0"] for each in first)
    yield from _involution("backbone.stem.1", stem[1], stem[2], scales["backbone.stem.0"], scales)
    input_scale = scales["backbone.stem.4"]
    yield from _convolution(stem.get_submodule("4.conv"), scales["backbone.stem.1"], input_scale)
    for name, block in net.named_modules():
        if isinstance(block, Bottleneck):
            output_scale = scales[name]
            yield from _convolution(block.conv1, input_scale, scales[f"{name}.conv1"])
            yield from _involution(f"{name}.conv2", block.conv2, block.bn2, scales[f"{name}.conv1"], scales)
            yield from _convolution(block.conv3, scales[f"{name}.conv2"], output_scale)
            residual_scale = input_scale if block.downsample is None else scales[f"{name}.downsample"]
            yield torch.tensor([residual_scale / output_scale])
            if block.downsample is not None:
                yield from _convolution(block.downsample[0], input_scale, residual_scale)
            input_scale = output_scale
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        last = len(list(net.backbone.get_submodule(stage).children())) - 1
        yield torch.tensor([scales[f"backbone.{stage}.{last}"]])
    yield net.head.fc.weight
    yield net.head.fc.bias


def _convolution(conv: nn.Module, input_scale: float, output_scale: float) -> Iterator[Tensor]:
    """Yield quantised weights, bias and multipliers, given the scales of the input and the output."""
    weight, bias = (each.double() for each in ohwi_weights(conv))
    amax = weight.flatten(1).abs().amax(1)
    weight_scale = torch.where(amax > 0, amax / MAX_WEIGHT, torch.ones_like(amax))
    yield torch.round(weight / weight_scale.reshape(-1, 1, 1, 1)).clamp(-MAX_WEIGHT, MAX_WEIGHT)
    yield bias / output_scale
    yield weight_scale * input_scale / output_scale


def _involution(
    name: str, layer: nn.Module, bn: nn.Module, input_scale: float, scales: Mapping[str, float]
) -> Iterator[Tensor]:
    reduced, kernels, output_scale = scales[f"{name}.conv1"], scales[f"{name}.conv2"], scales[name]
    yield from _convolution(layer.get_submodule("conv1.conv"), input_scale, reduced)
    yield from _convolution(layer.get_submodule("conv2.conv"), reduced, kernels)
    yield torch.tensor([kernels])
    scale, shift = (each.double() for each in scale_and_shift(bn))
    yield scale * input_scale * kernels / output_scale
    yield shift / output_scale
