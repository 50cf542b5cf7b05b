"""Activation ranges (amax) for int8: for each stored activation, the real value of the largest quantised value.

Activations without negative values are stored as uint8, where 255 represents the range. Signed activations (the kernels
that involution generates, and the shortcut of a block) are int8, where 127 does. Zero is always 0.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.fold_batchnorm import fold_batchnorm
from rednet.model.inference.tf32 import ieee_float32
from rednet.model.nn.rednet import Bottleneck, RedNet

BATCH_SIZE = 16
# Percentile calibration: a range covers the maximum of this share of the photos. A few photos go far beyond all others,
# and a range that covers them costs the others more precision than it gains. On 1,966 photos the embedded network's
# int8 class was that of float32 for 99.0%; with ranges of the overall maximum for 98.1%, with the ranges of least
# squared error for 98.9%.
PERCENTILE = 0.9
MIN_RANGE, MAX_RANGE = 1e-18, 1e18  # quotients and products of two ranges are still normal float32 numbers


class _Location(NamedTuple):
    """Where an activation can be observed."""

    module: nn.Module
    is_input: bool  # the module's input (after the ReLU before it), or its output


def required_activations(net: RedNet) -> list[str]:
    """Return the names of the activations that need a range: the names of the modules that produce them.

    `....conv1` and `....conv2` of a bottleneck, and the involution of the stem, mean their output after batch norm and
    ReLU; `....conv2.conv2` means the kernels of an involution.
    """
    return list(_locations(net))


def validate_ranges(net: RedNet, ranges: Mapping[str, float]) -> None:
    """Check that ranges belong to a network.

    Raises:
        ValueError: a range is missing, unknown, or not a number between `MIN_RANGE` and `MAX_RANGE`.
    """
    required = required_activations(net)
    problems = [f"{name} is missing" for name in required if name not in ranges]
    problems += [f"{name!r} is unknown" for name in ranges.keys() - set(required)]
    for name, amax in ranges.items():
        number = isinstance(amax, int | float) and not isinstance(amax, bool)
        if not number or not MIN_RANGE <= amax <= MAX_RANGE:  # true for NaN
            problems.append(f"{name} is {str(amax)[:20]}, not a number between {MIN_RANGE} and {MAX_RANGE}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"int8 ranges do not fit {net.config.name}: {'; '.join(sorted(problems)[:3])}{more}")


@torch.inference_mode()
def collect_activation_ranges(net: RedNet, preprocess: Preprocess, photos: Tensor) -> dict[str, float]:
    """Return activation ranges from photos like those that the network will see.

    Args:
        net: a trained RedNet; it is not changed.
        preprocess: the normalisation of pixels.
        photos: uint8 [N, 3, H, W], N >= 1.

    Returns:
        The `PERCENTILE` over all photos of each activation's largest absolute value, by name.

    Raises:
        ValueError: `photos` has another shape or dtype, or an activation overflows or is not finite.
    """
    if photos.dtype != torch.uint8 or photos.dim() != 4 or photos.shape[1] != 3 or 0 in photos.shape:
        raise ValueError(f"photos must be uint8 [N, 3, H, W] with N >= 1, got {photos.dtype} {list(photos.shape)}")
    net = fold_batchnorm(net).cpu()
    observed: dict[str, list[Tensor]] = {name: [] for name in required_activations(net)}
    with _observers(net, observed), ieee_float32():
        for batch in photos.cpu().split(BATCH_SIZE):
            net.stages(preprocess.normalise(batch))
    ranges = {name: float(torch.cat(values).quantile(PERCENTILE)) for name, values in observed.items()}
    for name, amax in ranges.items():
        if not amax <= MAX_RANGE:
            raise ValueError(f"these photos give {amax} in {name}, beyond any int8 range")
    return {name: amax if amax >= MIN_RANGE else 1.0 for name, amax in ranges.items()}  # zeros fit any range


@contextmanager
def _observers(net: RedNet, observed: dict[str, list[Tensor]]) -> Iterator[None]:
    """Append each photo's largest absolute value of every activation, in forward passes inside the block."""

    def observe(name: str, location: _Location) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            values = inputs[0] if location.is_input else output
            observed[name].append(values.abs().flatten(1).amax(dim=1))  # [B]

        return location.module.register_forward_hook(hook)

    handles = [observe(name, location) for name, location in _locations(net).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _locations(net: RedNet) -> dict[str, _Location]:
    stem = net.backbone.stem
    locations = {
        "backbone.stem.0": _Location(stem[0], False),
        "backbone.stem.1.conv1": _Location(stem.get_submodule("1.conv1"), False),
        "backbone.stem.1.conv2": _Location(stem.get_submodule("1.conv2"), False),
        "backbone.stem.1": _Location(stem[4], True),
        "backbone.stem.4": _Location(stem[4], False),
    }
    for name, block in net.named_modules():
        if isinstance(block, Bottleneck):
            locations |= {
                f"{name}.conv1": _Location(block.conv2, True),
                f"{name}.conv2.conv1": _Location(block.conv2.conv1, False),
                f"{name}.conv2.conv2": _Location(block.conv2.conv2, False),
                f"{name}.conv2": _Location(block.conv3, True),
                name: _Location(block, False),
            }
            if block.downsample is not None:
                locations[f"{name}.downsample"] = _Location(block.downsample, False)
    return locations
