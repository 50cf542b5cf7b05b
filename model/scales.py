"""Scales of the int8 network: for each activation it stores, the real value that the largest code stands for.

An activation that is never negative is stored as uint8, where 255 stands for its scale; what has a sign (the kernels
that involution makes, and the way around a block) as int8, where 127 does. Zero is always code 0.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.exact import exact_float32
from model.folded import folded
from model.preprocess import Preprocess
from model.rednet import Bottleneck, RedNet

BATCH_SIZE = 16
# Of all photos, those whose largest value a scale holds. A single photo goes far beyond all others, and making room for
# it costs them more than it gains: on 1,966 photos the embedded network's int8 class was that of float32 for 99.0%, and
# for 98.1% with a scale as large as the largest value of all, for 98.9% with the scales of least square error.
SHARE = 0.9
SMALLEST, LARGEST = 1e-18, 1e18  # of scales: quotients and products of two are still ordinary float32 numbers


class _Place(NamedTuple):
    """Where an activation can be seen: what goes into a module (after the ReLU before it), or what comes out."""

    module: nn.Module
    entering: bool


def needed(net: RedNet) -> list[str]:
    """Names of the activations that want a scale, those of the modules that make them.

    `....conv1` and `....conv2` of a bottleneck, and the involution of the stem, mean what their batch norm and ReLU
    make of them; `....conv2.conv2` are the kernels of an involution.
    """
    return list(_places(net))


def check(net: RedNet, scales: Mapping[str, float]) -> None:
    """Nothing, if these scales fit the network.

    Raises:
        ValueError: a scale is missing, unknown, or no number between `SMALLEST` and `LARGEST`.
    """
    wanted = needed(net)
    problems = [f"{name} is missing" for name in wanted if name not in scales]
    problems += [f"{name!r} is unknown" for name in scales.keys() - set(wanted)]
    for name, scale in scales.items():
        number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not number or not SMALLEST <= scale <= LARGEST:  # not so for NaN
            problems.append(f"{name} is {str(scale)[:20]}, not a number between {SMALLEST} and {LARGEST}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"int8 scales do not fit {net.config.name}: {'; '.join(sorted(problems)[:3])}{more}")


@torch.inference_mode()
def observe(net: RedNet, preprocess: Preprocess, photos: Tensor) -> dict[str, float]:
    """Scales for a network, from photos like those it will see: what `SHARE` of them stay below in each activation.

    Args:
        net: a trained RedNet; it stays as it is.
        preprocess: how pixels are normalised.
        photos: uint8 [N, 3, H, W], N >= 1.

    Raises:
        ValueError: these are no such photos, or the network makes infinities, NaNs or the like of them.
    """
    if photos.dtype != torch.uint8 or photos.dim() != 4 or photos.shape[1] != 3 or 0 in photos.shape:
        raise ValueError(f"photos must be uint8 [N, 3, H, W] with N >= 1, got {photos.dtype} {list(photos.shape)}")
    net = folded(net).cpu()
    largest: dict[str, list[Tensor]] = {name: [] for name in needed(net)}
    with _watched(net, largest), exact_float32():
        for batch in photos.cpu().split(BATCH_SIZE):
            net.stages(preprocess.normalise(batch))
    scales = {name: float(torch.cat(values).quantile(SHARE)) for name, values in largest.items()}
    for name, value in scales.items():
        if not value <= LARGEST:
            raise ValueError(f"the network makes {value} of these photos in {name}, which no int8 scale can hold")
    return {name: value if value >= SMALLEST else 1.0 for name, value in scales.items()}  # zeros have any scale


@contextmanager
def _watched(net: RedNet, largest: dict[str, list[Tensor]]) -> Iterator[None]:
    """While it lasts, the largest absolute value of each activation is noted for every photo."""

    def watch(name: str, place: _Place) -> torch.utils.hooks.RemovableHandle:
        def see(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            values = inputs[0] if place.entering else output
            largest[name].append(values.abs().flatten(1).amax(dim=1))  # [B]

        return place.module.register_forward_hook(see)

    handles = [watch(name, place) for name, place in _places(net).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _places(net: RedNet) -> dict[str, _Place]:
    stem = net.backbone.stem
    places = {
        "backbone.stem.0": _Place(stem[0], False),
        "backbone.stem.1.conv1": _Place(stem.get_submodule("1.conv1"), False),
        "backbone.stem.1.conv2": _Place(stem.get_submodule("1.conv2"), False),
        "backbone.stem.1": _Place(stem[4], True),
        "backbone.stem.4": _Place(stem[4], False),
    }
    for name, block in net.named_modules():
        if isinstance(block, Bottleneck):
            places |= {
                f"{name}.conv1": _Place(block.conv2, True),
                f"{name}.conv2.conv1": _Place(block.conv2.conv1, False),
                f"{name}.conv2.conv2": _Place(block.conv2.conv2, False),
                f"{name}.conv2": _Place(block.conv3, True),
                name: _Place(block, False),
            }
            if block.downsample is not None:
                places[f"{name}.downsample"] = _Place(block.downsample, False)
    return places
