"""Mixup and CutMix."""

import numpy as np
import pytest
import torch

from rednet.model.training.mixing import mix

BATCH = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 16, 16).contiguous()  # photo i has the value i everywhere


def test_without_mixing_photos_stay_as_they_are() -> None:
    mixed, weight = mix(BATCH, 0.0, 0.0, np.random.default_rng(0))
    assert weight == 1
    assert torch.equal(mixed, BATCH)


def test_mixup_blends_by_the_weight_of_the_targets() -> None:
    """The photo itself always has the larger share."""
    for seed in range(20):
        mixed, weight = mix(BATCH, 0.4, 0.0, np.random.default_rng(seed))
        assert 0.5 <= weight <= 1
        torch.testing.assert_close(mixed, weight * BATCH + (1 - weight) * BATCH.flip(0))


def test_cutmix_pastes_a_rectangle_of_the_weight_of_the_targets() -> None:
    """Pixels are those of one of the two photos, and the other's are one rectangle. Its share is uniform, as
    Beta(1, 1) is, less what the borders cut off."""
    shares = []
    for seed in range(200):
        mixed, weight = mix(BATCH, 0.0, 1.0, np.random.default_rng(seed))
        pasted = mixed[0, 0] == 4
        assert torch.equal(mixed, torch.where(pasted, BATCH.flip(0), BATCH))
        assert pasted.float().mean().item() == pytest.approx(1 - weight)
        rows, columns = pasted.any(dim=1), pasted.any(dim=0)
        assert pasted.sum() == rows.sum() * columns.sum()
        shares.append(1 - weight)
    assert min(shares) < 0.05
    assert max(shares) > 0.7
    assert 0.2 < float(np.mean(shares)) < 0.45


def test_half_of_the_batches_get_cutmix_beside_mixup() -> None:
    batches = [mix(BATCH, 0.2, 1.0, np.random.default_rng(seed))[0] for seed in range(200)]
    pasted = sum(torch.equal(batch, batch.round()) for batch in batches)
    assert 70 < pasted < 130


def test_mixing_depends_on_the_generator_only() -> None:
    (first, a), (second, b) = (mix(BATCH, 0.2, 1.0, np.random.default_rng(3)) for _ in range(2))
    assert a == b
    assert torch.equal(first, second)


def test_mixing_leaves_its_input_unchanged() -> None:
    before = BATCH.clone()
    mix(BATCH, 0.0, 1.0, np.random.default_rng(1))
    assert torch.equal(BATCH, before)
