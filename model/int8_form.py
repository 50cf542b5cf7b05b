"""The inference form in int8, on the CPU: one step for each stored map, one for each output of a convolution."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from model.folded import folded, scale_and_shift
from model.native import int8_builds, int8_unavailable
from model.native_form import NativeForm, stored_by_column
from model.preprocess import Preprocess
from model.rednet import Bottleneck, RedNet
from model.scales import check

UNSIGNED, SIGNED, LARGEST_WEIGHT = 255, 127, 127  # the largest codes
# The engine adds up products of codes in signed 32 bits. In the worst case each is 255 * 127 = 32,385, so that
# (2**31 - 1) // 32,385 = 66,311 of them cannot overflow. A convolution adds up K * K * in_channels: the 3x3 convolution
# of the stem takes up to 7,367 channels (`stem_channels` up to 14,720), a 1x1 convolution 66,311.
MAX_SUMMANDS = (2**31 - 1) // (UNSIGNED * LARGEST_WEIGHT)


class Int8Form(NativeForm):
    """A copy of a network inside an int8 build of the native engine.

    Activations are codes from 0 to 255, or signed ones, with one step per map, weights signed bytes with one step per
    output channel, sums exact: every build gives the same codes. The stem's first convolution and the classifier stay
    float32.

    Args:
        net: a RedNet for RGB.
        preprocess: how pixels are normalised.
        scales: of its activations, as `model.scales` makes them.
        threads: cores to use; None: as many as torch does.
        build: one of `int8_builds`; None: the best one here.

    Raises:
        ValueError: the machine cannot run it, the engine is not made for this network, its sums could overflow, or the
            scales are not its own.
    """

    def __init__(
        self,
        net: RedNet,
        preprocess: Preprocess,
        scales: Mapping[str, float],
        threads: int | None = None,
        build: str | None = None,
    ) -> None:
        if reason := int8_unavailable():
            raise ValueError(reason)
        check(net, scales)
        check_sums(net)
        self._scales = dict(scales)
        super().__init__(net, preprocess, threads, build or int8_builds()[0])

    def _arrays(self, net: RedNet, preprocess: Preprocess) -> Iterator[Tensor]:
        return (array.float() for array in _arrays(folded(net).cpu(), preprocess, steps_of(self._scales)))


def check_sums(net: RedNet) -> None:
    """Nothing, if no sum of this network can overflow in int8.

    Raises:
        ValueError: a convolution adds up too many products.
    """
    for name, conv in net.named_modules():
        if not isinstance(conv, nn.Conv2d) or name == "backbone.stem.0.conv":  # which stays float32
            continue
        summands = conv.weight[0].numel()
        if summands > MAX_SUMMANDS:
            raise ValueError(
                f"int8 sums could overflow: {name} adds up {summands} products, at most {MAX_SUMMANDS} fit into 32 bits"
            )


def steps_of(scales: Mapping[str, float]) -> dict[str, float]:
    """The real value of 1 in each activation."""
    signed = ("conv2.conv2", "stem.1.conv2", "downsample")
    return {name: scale / (SIGNED if name.endswith(signed) else UNSIGNED) for name, scale in scales.items()}


def _arrays(net: RedNet, preprocess: Preprocess, steps: Mapping[str, float]) -> Iterator[Tensor]:
    """A folded network as `network_create` in native/weights.h takes it in int8."""
    values = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    yield preprocess.normalise(values)
    stem = net.backbone.stem
    first = stored_by_column(stem.get_submodule("0.conv"))
    yield from (each / steps["backbone.stem.0"] for each in first)
    yield from _involution("backbone.stem.1", stem[1], stem[2], steps["backbone.stem.0"], steps)
    before = steps["backbone.stem.4"]
    yield from _convolution(stem.get_submodule("4.conv"), steps["backbone.stem.1"], before)
    for name, block in net.named_modules():
        if isinstance(block, Bottleneck):
            after = steps[name]
            yield from _convolution(block.conv1, before, steps[f"{name}.conv1"])
            yield from _involution(f"{name}.conv2", block.conv2, block.bn2, steps[f"{name}.conv1"], steps)
            yield from _convolution(block.conv3, steps[f"{name}.conv2"], after)
            added = before if block.downsample is None else steps[f"{name}.downsample"]
            yield torch.tensor([added / after])
            if block.downsample is not None:
                yield from _convolution(block.downsample[0], before, added)
            before = after
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        last = len(list(net.backbone.get_submodule(stage).children())) - 1
        yield torch.tensor([steps[f"backbone.{stage}.{last}"]])
    yield net.head.fc.weight
    yield net.head.fc.bias


def _convolution(conv: nn.Module, before: float, after: float) -> Iterator[Tensor]:
    """Whole numbers, bias and multipliers; before, after: the steps of input and output."""
    weight, bias = (each.double() for each in stored_by_column(conv))
    largest = weight.flatten(1).abs().amax(1)
    step = torch.where(largest > 0, largest / LARGEST_WEIGHT, torch.ones_like(largest))
    yield torch.round(weight / step.reshape(-1, 1, 1, 1)).clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
    yield bias / after
    yield step * before / after


def _involution(
    name: str, layer: nn.Module, bn: nn.Module, before: float, steps: Mapping[str, float]
) -> Iterator[Tensor]:
    reduced, kernels, after = steps[f"{name}.conv1"], steps[f"{name}.conv2"], steps[name]
    yield from _convolution(layer.get_submodule("conv1.conv"), before, reduced)
    yield from _convolution(layer.get_submodule("conv2.conv"), reduced, kernels)
    yield torch.tensor([kernels])
    scale, shift = (each.double() for each in scale_and_shift(bn))
    yield scale * before * kernels / after
    yield shift / after
