"""Fused batch norm, residual add and ReLU in C, compared with torch in float32."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rednet.model.ops.batch_norm import batch_norm
from tests.shared import needs_native

pytestmark = needs_native


def bfloat16_map(*shape: int, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape) * 2 + mean).bfloat16().to(memory_format=torch.channels_last)


def trained(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, -0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def runs_in_c(y: Tensor) -> bool:
    return y.grad_fn is not None and y.grad_fn.name() == "_BatchNormBackward"


def relative_error(result: Tensor | None, expected: Tensor | None) -> float:
    assert result is not None
    assert expected is not None
    result, expected = result.detach().float(), expected.detach().float()
    return float((result - expected).norm() / expected.norm())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", [(8, 64, 7, 5), (3, 16, 1, 1), (2, 48, 1, 9), (20, 32, 24, 24)])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_fused_batch_norm_matches_torch_values_gradients_and_statistics(
    shape: tuple[int, int, int, int], mean: float, added: bool, relu: bool
) -> None:
    """Within the rounding of bfloat16 where the result is bfloat16, and of float32 where it is float32."""
    torch.manual_seed(0)
    x, shortcut = bfloat16_map(*shape, mean=mean), bfloat16_map(*shape) if added else None
    grad, ours = bfloat16_map(*shape), trained(shape[1])
    theirs = copy.deepcopy(ours)
    leaves = [each.clone().requires_grad_() for each in (x, shortcut) if each is not None]
    y = batch_norm(ours, *leaves, relu=relu)
    y.backward(grad)
    assert runs_in_c(y)
    wide = [each.float().requires_grad_() for each in (x, shortcut) if each is not None]
    expected = theirs(wide[0]) + (wide[1] if added else 0)
    # Where rounding decides the sign, the two ReLUs are different functions, so the comparison uses the same mask.
    expected = torch.where(y > 0, expected, 0 * expected) if relu else expected
    expected.backward(grad.float())
    for result, reference in zip(
        [y, *(leaf.grad for leaf in leaves)], [expected, *(leaf.grad for leaf in wide)], strict=True
    ):
        assert relative_error(result, reference) < 0.004
    for name in ("weight", "bias"):
        assert relative_error(ours.get_parameter(name).grad, theirs.get_parameter(name).grad) < 1e-4
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(ours.get_buffer(name), theirs.get_buffer(name), rtol=1e-5, atol=1e-5)


def test_fused_batch_norm_is_bit_identical_for_any_threads() -> None:
    """Partial sums belong to blocks of rows, not to threads."""
    torch.manual_seed(0)
    x, norm = bfloat16_map(6, 32, 40, 40).requires_grad_(), trained(32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = batch_norm(norm, x)
            results.append([y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), y.detach().sin())])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_fused_batch_norm_keeps_nan() -> None:
    """A network that overflowed must not look healthy: some ReLUs turn NaN into zero."""
    x = bfloat16_map(2, 16, 3, 3)
    x[0, 5, 1, 1] = torch.nan
    y = batch_norm(trained(16), x.requires_grad_())
    assert runs_in_c(y)
    assert y[:, 5].isnan().all()
    assert not y[:, :5].isnan().any()


def test_fused_batch_norm_second_gradients_match_torch() -> None:
    """As a gradient penalty computes them."""
    torch.manual_seed(0)
    x, shortcut, norm, penalties = bfloat16_map(4, 16, 5, 5), bfloat16_map(4, 16, 5, 5), trained(16), []
    for fused in (True, False):
        leaf, each = x.clone().requires_grad_(), copy.deepcopy(norm)
        y = batch_norm(each, leaf, shortcut) if fused else F.relu(each(leaf) + shortcut)
        (first,) = torch.autograd.grad(y.float().square().sum(), leaf, create_graph=True)
        torch.autograd.backward(first.float().square().sum())
        penalties.append([first, each.weight.grad, leaf.grad])
    for result, expected in zip(*penalties, strict=True):
        assert relative_error(result, expected) < 0.03


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.eval(),
        lambda norm: setattr(norm, "momentum", None),
        lambda norm: norm.register_forward_hook(lambda *_: None),
    ],
)
def test_fused_batch_norm_leaves_other_modules_to_torch(change: Callable[[nn.BatchNorm2d], object]) -> None:
    """The C code does not support evaluation, cumulative averages and hooks."""
    torch.manual_seed(0)
    norm, x = trained(16), bfloat16_map(2, 16, 4, 4).requires_grad_()
    change(norm)
    expected = F.relu(copy.deepcopy(norm)(x))
    y = batch_norm(norm, x)
    assert not runs_in_c(y)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 16, 4, 4),
        torch.randn(2, 16, 4, 4).bfloat16(),
        bfloat16_map(2, 24, 4, 4),
        bfloat16_map(0, 16, 4, 4),
    ],
    ids=["float32", "channels-first", "24 channels", "empty"],
)
def test_fused_batch_norm_leaves_other_maps_to_torch(x: Tensor) -> None:
    """The C code supports bfloat16, channels-last, with a multiple of 16 channels."""
    y = batch_norm(trained(x.shape[1]), x.requires_grad_())
    assert not runs_in_c(y)
    assert y.shape == x.shape


def test_fused_batch_norm_leaves_a_broadcast_shortcut_to_torch() -> None:
    """Its number of elements differs from that of the map."""
    x, shortcut = bfloat16_map(2, 16, 4, 4).requires_grad_(), bfloat16_map(2, 16, 1, 1)
    norm = trained(16)
    expected = copy.deepcopy(norm)(x) + shortcut
    assert torch.equal(batch_norm(norm, x, shortcut, relu=False), expected)


def test_fused_batch_norm_of_a_single_value_raises() -> None:
    """Its variance is undefined; the error is torch's."""
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(trained(16), bfloat16_map(1, 16, 1, 1))
