"""1x1 convolutions as matrix products, compared with torch's convolution."""

import copy
from collections.abc import Mapping

import pytest
import torch

from rednet.model.nn.pointwise import PointwiseConv2d


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 7), (1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_pointwise_convolution_in_training_matches_conv2d(stride: int, height: int, width: int, bias: bool) -> None:
    """In float64, where only the order of sums may differ: values, gradients and second gradients."""
    torch.manual_seed(0)
    ours = PointwiseConv2d(6, 5, stride, bias=bias).double()
    theirs = copy.deepcopy(ours).eval()
    results = []
    for layer in (ours, theirs):
        x = torch.randn(3, 6, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        y = layer(x.requires_grad_())
        (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        grad.square().sum().backward()
        results.append((y, grad, x.grad, *(parameter.grad for parameter in layer.parameters())))
    torch.testing.assert_close(results[0], results[1])


def test_pointwise_convolution_in_training_returns_channels_last() -> None:
    """Neighbouring layers need it, whatever the memory layout of the input."""
    x = torch.randn(2, 4, 6, 6)
    for stride in (1, 2):
        assert PointwiseConv2d(4, 8, stride)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own code for torch.func
def test_pointwise_convolution_in_training_supports_torch_func() -> None:
    """Per-photo gradients, as differential privacy needs them."""
    torch.manual_seed(0)
    layer, x = PointwiseConv2d(4, 8, 2), torch.randn(3, 4, 5, 5)
    weights = dict(layer.named_parameters())

    def loss(parameters: Mapping[str, torch.Tensor], photo: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = torch.func.functional_call(layer, dict(parameters), photo[None]).square().sum()
        return value

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)["weight"]
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(each.sum(0), layer.weight.grad)
