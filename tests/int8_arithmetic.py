"""The int8 arithmetic of a RedNet in plain torch: what the engine in C must give, code for code."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import RedNet
from model.folded import folded, scale_and_shift
from model.int8_form import steps_of
from model.involution import involution
from model.preprocess import Preprocess


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Exact in float64, then one rounding to float32, as the instruction does it."""
    return (a.double() * b.double() + c.double()).float()


def _channels(values: Tensor) -> Tensor:
    return values.float()[:, None, None]


class Reference:
    """Stage maps, kernel sums, features and logits in int8 arithmetic."""

    def __init__(self, net: RedNet, scales: dict[str, float]) -> None:
        self.net: Any = folded(net)
        self.steps = steps_of(scales)

    def codes(self, value: Tensor, signed: bool) -> Tensor:
        return torch.round(value).clamp(-128 if signed else 0, 127 if signed else 255)

    def conv(
        self,
        conv: Any,
        x: Tensor,
        before: float,
        after: float,
        signed: bool,
        residual: tuple[Tensor, float] | None = None,
    ) -> Tensor:
        weight, bias = conv.weight.double(), conv.bias.double()
        largest = weight.flatten(1).abs().amax(1)
        step = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        whole = torch.round(weight / step[:, None, None, None])
        acc = F.conv2d(x.double(), whole, None, conv.stride, conv.padding).float()
        value = _fma(acc, _channels(step * before / after), _channels(bias / after))
        if residual is not None:
            value = _fma(residual[0], torch.tensor(residual[1] / after, dtype=torch.float32), value)
        return self.codes(value, signed)

    def layer(self, name: str, module: Any, bn: Any, x: Tensor, before: float) -> tuple[Tensor, Tensor]:
        reduced, kernels, after = (self.steps[name + suffix] for suffix in (".conv1", ".conv2", ""))
        pooled = x
        if module.stride > 1:
            ones = F.avg_pool2d(torch.ones_like(x), module.stride, module.stride, ceil_mode=True, divisor_override=1)
            sums = F.avg_pool2d(x.double(), module.stride, module.stride, ceil_mode=True, divisor_override=1)
            pooled = torch.div(sums + torch.div(ones, 2, rounding_mode="floor"), ones, rounding_mode="floor")
        kernel = self.conv(
            module.conv2.conv, self.conv(module.conv1.conv, pooled, before, reduced, False), reduced, kernels, True
        )
        kernel = kernel.unflatten(1, (module.groups, -1))
        acc = involution(x.double(), kernel.double(), module.stride).float()
        scale, shift = (each.double() for each in scale_and_shift(bn))
        value = _fma(acc, _channels(scale * before * kernels / after), _channels(shift / after))
        return self.codes(value, False), kernel.sum(2) * kernels

    def __call__(self, pixels: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """Codes of the stage maps, kernel sums, features, logits."""
        net, steps, stem = self.net, self.steps, self.net.backbone.stem
        with torch.inference_mode():
            x = stem[0].conv(Preprocess().normalise(pixels)) / steps["backbone.stem.0"]
            x, _ = self.layer("backbone.stem.1", stem[1], stem[2], self.codes(x, False), steps["backbone.stem.0"])
            x = self.conv(stem[4].conv, x, steps["backbone.stem.1"], steps["backbone.stem.4"], False)
            x, before = F.max_pool2d(x, 3, 2, 1), steps["backbone.stem.4"]
            maps, sums = [], []
            for stage in ("layer1", "layer2", "layer3", "layer4"):
                for number, block in enumerate(net.backbone.get_submodule(stage)):
                    name = f"backbone.{stage}.{number}"
                    middle, after = steps[f"{name}.conv1"], steps[name]
                    shortcut, added = x, before
                    if block.downsample is not None:
                        added = steps[f"{name}.downsample"]
                        shortcut = self.conv(block.downsample[0], x, before, added, True)
                    y = self.conv(block.conv1, x, before, middle, False)
                    y, total = self.layer(f"{name}.conv2", block.conv2, block.bn2, y, middle)
                    x = self.conv(block.conv3, y, steps[f"{name}.conv2"], after, False, (shortcut, added))
                    before = after
                maps.append(x)
                sums.append(total)
            features = x.float().mean(dim=(2, 3)) * before
            return maps, sums, features, net.head(features)
