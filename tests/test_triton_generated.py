"""The Triton kernel that generates involution kernels, in Triton's interpreter if there is no GPU."""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no Triton here")

from rednet.model.ops import reference, triton_generated
from tests.triton_interpreter import bfloat16_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the norm. Half precision rounds the generated kernels and the output, which the interpreter truncates to
# bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3 if DEVICE == "cuda" else 8e-3}


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with bfloat16_products():
        yield


class Case(NamedTuple):
    """The operands of the kernel."""

    x: Tensor
    reduced: Tensor
    span: Tensor
    stride: int
    bias: Tensor
    scale: Tensor
    shift: Tensor

    def result(self) -> Tensor:
        operands: Any = [each.to(DEVICE) if isinstance(each, Tensor) else each for each in self]
        return triton_generated.fused(*operands).cpu()

    def exact(self) -> Tensor:
        """The definition in float64."""
        x, reduced, span, bias, scale, shift = (each.double() for each in self if isinstance(each, Tensor))
        kernel = torch.einsum("gtc,bcyx->bgtyx", span, reduced) + bias.reshape(1, *span.shape[:2], 1, 1)
        out = reference.forward(x, kernel, self.stride)
        return (out * scale[:, None, None] + shift[:, None, None]).relu()


def case(
    dtype: torch.dtype,
    k: int,
    stride: int,
    height: int,
    width: int,
    groups: int,
    group_channels: int,
    reduced: int = 16,
) -> Case:
    channels, batch = groups * group_channels, 2
    maps = torch.randn(batch, reduced, -(-height // stride), -(-width // stride)).relu()
    return Case(
        torch.randn(batch, channels, height, width).to(dtype),
        maps.to(dtype),
        (torch.randn(groups, k * k, reduced) * reduced**-0.5).to(dtype),
        stride,
        torch.randn(groups * k * k).to(dtype),
        torch.randn(channels),
        torch.randn(channels),
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(12))
def test_generated_involution_matches_reference(seed: int, dtype: torch.dtype) -> None:
    """Over random odd and even maps, kernel sizes, strides, group widths and widths of the generator."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    k, stride = (3, 5, 7)[seed % 3], 1 + seed // 3 % 2
    height, width, groups = rng.randint(1, 11), rng.randint(1, 11), rng.randint(1, 3)
    given = case(dtype, k, stride, height, width, groups, rng.choice([4, 12, 16, 32]), rng.choice([16, 48]))
    result, exact = given.result(), given.exact()
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.linalg.norm(result.double() - exact) <= TOLERANCE[dtype] * torch.linalg.norm(exact)


def test_generated_involution_computes_several_groups_in_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program of a tile has fewer groups."""
    torch.manual_seed(0)
    given = case(torch.float32, 3, 1, 5, 4, groups=5, group_channels=16)
    programs: list[int] = []
    launch = triton_generated._launch

    def counted(tensors: Any, grid: tuple[int, int, int], *more: Any) -> None:
        programs.append(grid[0])
        launch(tensors, grid, *more)

    monkeypatch.setattr(triton_generated, "_launch", counted)
    for minimum in (1, 10, 2048):  # there are 4 tiles, and 20 pairs of a tile and a group
        monkeypatch.setattr(triton_generated, "MIN_PROGRAMS", minimum)
        torch.testing.assert_close(given.result().double(), given.exact(), rtol=1e-5, atol=1e-5)
    assert programs == [1, 3, 5]


def test_generated_involution_with_an_empty_batch() -> None:
    given = case(torch.float32, 3, 1, 5, 9, groups=1, group_channels=16)
    empty = given._replace(x=given.x[:0], reduced=given.reduced[:0])
    assert empty.result().shape == (0, 16, 5, 9)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_generated_involution_keeps_nan_in_its_image_and_near_its_tile(broken: float) -> None:
    """No output is finite that is not in the definition; no other image, channel or distant tile is affected."""
    torch.manual_seed(0)
    given = case(torch.float32, 3, 1, 12, 12, groups=2, group_channels=16)
    assert given.result().isfinite().all()
    given.x[1, 20, 5, 5] = broken
    finite, exact = given.result().isfinite(), given.exact()
    assert not exact.isfinite().all()
    assert not (finite & ~exact.isfinite()).any()
    assert finite[0].all()
    assert finite[1, torch.arange(32) != 20].all()
    assert finite[1, 20, 8:].all()
    assert finite[1, 20, :, 8:].all()


def test_generated_involution_keeps_nan_of_the_generator() -> None:
    """An output whose kernel is NaN is NaN in all channels, and no other output is."""
    torch.manual_seed(0)
    given = case(torch.float32, 7, 1, 6, 6, groups=2, group_channels=16)
    given.reduced[0, 3, 2, 1] = torch.nan
    broken = given.result().isnan()
    assert broken[0, :, 2, 1].all()
    assert broken.sum() == 32


@pytest.mark.parametrize(("k", "group_channels", "expected"), [(7, 16, True), (9, 16, False), (3, 64, False)])
def test_generated_involution_supports_what_fits_into_registers(k: int, group_channels: int, expected: bool) -> None:
    assert triton_generated.is_supported(k, group_channels) == expected
