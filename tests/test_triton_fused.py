"""The small Triton operators of the network, in Triton's interpreter if there is no GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

triton_fused = pytest.importorskip("rednet.model.ops.triton_fused", reason="no Triton here", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative. The interpreter truncates float32 to bfloat16, where a GPU rounds.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
SHAPES = [(1, 3, 1, 1), (2, 12, 5, 8), (3, 64, 9, 7)]


def assert_rounded_once(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.double().cpu(), exact, rtol=1.01 * ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_normalise_scales_and_shifts_uint8_pixels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """For any number of channels, also from pixels that are not contiguous."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    scale, shift = torch.rand(2, shape[1])
    exact = pixels.double() * scale.double()[:, None, None] + shift.double()[:, None, None]
    for given in (pixels, pixels.to(memory_format=torch.channels_last)):
        ours = triton_fused.normalise(given.to(DEVICE), scale.to(DEVICE), shift.to(DEVICE), dtype)
        assert_rounded_once(ours, exact, dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_bias_relu_adds_bias_and_residual(shape: tuple[int, ...], dtype: torch.dtype, with_residual: bool) -> None:
    """In the memory of x, if that is channels-last; NaN stays NaN."""
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape).to(DEVICE, dtype)
    bias = torch.randn(shape[1]).to(DEVICE, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    exact = (x.double() + bias.double()[:, None, None] + (residual.double() if with_residual else 0)).relu().cpu()
    ours = triton_fused.bias_relu(x, bias, residual if with_residual else None)
    assert_rounded_once(ours, exact, dtype)
    assert ours.data_ptr() == x.data_ptr()
    assert triton_fused.bias_relu(torch.full_like(x, torch.nan), bias).isnan().all()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_pool_bias_relu_matches_relu_before_the_pool(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Windows beyond the border count only pixels that exist, and NaN stays NaN in the windows that contain it."""
    torch.manual_seed(0)
    x, bias = torch.randn(shape).to(DEVICE, dtype), torch.randn(shape[1]).to(DEVICE, dtype)
    exact = F.max_pool2d((x.double() + bias.double()[:, None, None]).relu(), 3, 2, 1).cpu()
    assert_rounded_once(triton_fused.pool_bias_relu(x, bias), exact, dtype)
    x[0, 0, -1, -1] = torch.nan
    broken = triton_fused.pool_bias_relu(x, bias).isnan()
    assert broken[0, 0, -1, -1]
    assert broken.sum() == F.max_pool2d(x.double(), 3, 2, 1).isnan().sum()


def test_empty_batches_launch_nothing() -> None:
    """Results have the usual shapes."""
    nothing, bias = torch.zeros(0, 8, 5, 7, device=DEVICE), torch.zeros(8, device=DEVICE)
    assert triton_fused.bias_relu(nothing, bias).shape == (0, 8, 5, 7)
    assert triton_fused.pool_bias_relu(nothing, bias).shape == (0, 8, 3, 4)
    assert triton_fused.normalise(nothing.byte(), bias, bias, torch.float16).shape == (0, 8, 5, 7)
