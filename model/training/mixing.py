"""Mixes the photos of a batch in pairs: mixup blends two photos, CutMix pastes a rectangle of one into the other."""

import math

import numpy as np
from torch import Tensor


def mix(x: Tensor, mixup: float, cutmix: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Mix a batch with itself in reverse order, by mixup (Zhang et al., 2018, https://arxiv.org/abs/1710.09412) or by
    CutMix (Yun et al., 2019, https://arxiv.org/abs/1905.04899), each with probability 1/2 if neither alpha is 0.

    Args:
        x: square photos [B, C, side, side].
        mixup: alpha of mixup, the parameter of the Beta distribution of a blend's weight; 0: no mixup.
        cutmix: the same of CutMix.
        rng: the source of randomness.

    Returns:
        The mixed photos [B, C, side, side], and the weight of the photos' own targets. The rest is the weight of the
        targets in reverse order.

    Example:
        >>> import numpy as np, torch
        >>> photos = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
        >>> mixed, weight = mix(photos, 0.0, 1.0, np.random.default_rng(0))
        >>> bool(abs(mixed[1].mean() - weight) < 1e-6)
        True
    """
    if cutmix and (not mixup or rng.random() < 0.5):
        return _cutmix(x, 1 - rng.beta(cutmix, cutmix), rng)
    if mixup:
        weight = rng.beta(mixup, mixup)
        weight = max(weight, 1 - weight)  # both orders of a pair are in the batch, so that the smaller adds nothing
        return x.lerp(x.flip(0), 1 - weight), weight
    return x, 1.0


def _cutmix(x: Tensor, area: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Paste a square of the relative area `area` around a random pixel, cut off at the borders."""
    side = x.shape[-1]
    half = math.sqrt(area) * side / 2
    middle = rng.uniform(0, side, 2)
    top, left = (max(0, round(at - half)) for at in middle)
    bottom, right = (min(side, round(at + half)) for at in middle)
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[:, :, top:bottom, left:right].flip(0)
    return mixed, 1 - (bottom - top) * (right - left) / side**2
