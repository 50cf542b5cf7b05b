"""The involution operator and its implementations, compared with the definition and with each other."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad

from rednet import Involution, create_rednet, involution
from rednet.model.ops import IMPLEMENTATIONS, operator, use
from tests.shared import needs_native


def by_hand(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """The paper's equation 4, one multiplication at a time."""
    batch, channels, height, width = x.shape
    groups, taps, h, w = kernel.shape[1:]
    k = round(taps**0.5)
    out = torch.zeros(batch, channels, h, w, dtype=x.dtype)
    for b, c, y, xx, u, v in itertools.product(*map(range, (batch, channels, h, w, k, k))):
        row, column = y * stride + u - k // 2, xx * stride + v - k // 2
        if 0 <= row < height and 0 <= column < width:
            out[b, c, y, xx] += kernel[b, c // (channels // groups), u * k + v, y, xx] * x[b, c, row, column]
    return out


def moved(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors where that implementation runs: Triton's leaves tensors on the CPU to PyTorch's."""
    return tuple(tensor.to("cuda" if name == "triton" else "cpu") for tensor in tensors)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    batch, groups, width_of_group = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 16]))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    k, stride = draw(st.sampled_from([1, 3, 5, 7])), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(batch, groups * width_of_group, height, width, generator=generator, dtype=torch.float64)
    shape = (batch, groups, k * k, -(-height // stride), -(-width // stride))
    kernel = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):  # the same values with other strides
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
        kernel = kernel.movedim(1, -1).contiguous().movedim(-1, 1)
    return x, kernel, stride


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("k", "stride"), [(3, 1), (3, 2), (7, 1)])
def test_involution_matches_the_papers_equation(name: str, k: int, stride: int) -> None:
    """Every implementation gives the same values as sums of single products."""
    torch.manual_seed(0)
    x, kernel = torch.randn(2, 4, 5, 4).double(), torch.randn(2, 2, k * k, -(-5 // stride), -(-4 // stride)).double()
    given_x, given_kernel = moved(name, x, kernel)
    with use(name):
        torch.testing.assert_close(involution(given_x, given_kernel, stride).cpu(), by_hand(x, kernel, stride))


@settings(max_examples=80, deadline=None)
@given(inputs())
def test_involution_implementations_agree_on_values_and_gradients(case: tuple[Tensor, Tensor, int]) -> None:
    """All match the definition over random shapes, strides, group widths, memory layouts and empty batches."""
    x, kernel, stride = case
    results = {}
    for name in IMPLEMENTATIONS:
        with use(name):
            leaves = [leaf.detach().requires_grad_() for leaf in moved(name, x, kernel)]
            out = involution(leaves[0], leaves[1], stride)
            gradients = torch.autograd.grad((out * out.detach().cos()).sum(), leaves)
            results[name] = tuple(result.cpu() for result in (out.detach(), *gradients))
    for result in results.values():
        torch.testing.assert_close(result, results["reference"])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_involution_gradients_match_finite_differences(name: str) -> None:
    """Both gradients, at stride 1 and 2, on odd maps."""
    torch.manual_seed(0)
    for stride in (1, 2):
        x = torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
        shape = (2, 2, 9, -(-5 // stride), -(-3 // stride))
        kernel = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        with use(name):
            assert torch.autograd.gradcheck(lambda a, b, s=stride: involution(a, b, s), moved(name, x, kernel))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own checking code
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_involution_operator_passes_opcheck(name: str) -> None:
    """torch checks the schema, fake tensors, the autograd registration and tracing."""
    x = torch.randn(2, 32, 6, 6, requires_grad=True)
    kernel = torch.randn(2, 2, 9, 3, 3, requires_grad=True)
    with use(name):
        torch.library.opcheck(operator, (*moved(name, x, kernel), 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_involution_half_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    """The result is the exact sum, rounded once."""
    torch.manual_seed(0)
    x, kernel = torch.randn(1, 16, 8, 8).to(dtype), torch.randn(1, 1, 49, 8, 8).to(dtype)
    exact = by_hand(x.double(), kernel.double(), 1)
    result = involution(x, kernel)
    assert result.dtype == dtype
    torch.testing.assert_close(result, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@needs_native
@pytest.mark.parametrize(("groups", "width"), [(1, 16), (3, 16), (2, 8)])
@pytest.mark.parametrize(("k", "stride", "height"), [(3, 1, 8), (3, 2, 7), (5, 1, 6), (7, 1, 9), (7, 2, 10), (7, 2, 9)])
def test_native_involution_in_bfloat16_is_the_rounded_float32_result(
    groups: int, width: int, k: int, stride: int, height: int
) -> None:
    """Values and both gradients are bit-identical, whether the C code or its caller converts."""
    torch.manual_seed(0)
    out = -(-height // stride)
    x = torch.randn(2, groups * width, height, height + 1).bfloat16().to(memory_format=torch.channels_last)
    kernel = torch.randn(2, groups, k * k, out, -(-(height + 1) // stride)).bfloat16()
    kernel[0, 0, 0, 0, 0], x[0, 0, 0, 0] = torch.inf, torch.nan
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = x.to(dtype).requires_grad_(), kernel.to(dtype).requires_grad_()
        with use("native"):
            y = involution(*leaves, stride)
            grad = torch.linspace(-3, 3, y.numel()).reshape(y.shape).bfloat16().to(dtype)
            results.append([each.bfloat16() for each in (y.detach(), *torch.autograd.grad(y, leaves, grad))])
    for half, single in zip(*results, strict=True):
        torch.testing.assert_close(half, single, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("x", "kernel", "stride", "message"),
    [
        ((2, 16, 4), (2, 1, 9, 4, 4), 1, r"x \[B, C, H, W\]"),
        ((2, 16, 4, 4), (2, 1, 8, 4, 4), 1, r"K\*K taps with odd K"),
        ((2, 16, 4, 4), (2, 1, 9, 4, 4), 0, "stride >= 1"),
        ((2, 16, 4, 4), (1, 1, 9, 4, 4), 1, "batch sizes must agree"),
        ((2, 16, 4, 4), (2, 3, 9, 4, 4), 1, "groups must divide the channels"),
        ((2, 16, 5, 5), (2, 1, 9, 2, 2), 2, "must be 3x3"),
    ],
)
def test_involution_rejects_inconsistent_shapes(x: Any, kernel: Any, stride: int, message: str) -> None:
    """The message says which requirement is violated."""
    with pytest.raises(ValueError, match=message):
        involution(torch.zeros(x), torch.zeros(kernel), stride)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_involution_second_gradients_match_finite_differences(name: str) -> None:
    """Gradient penalties need them, with respect to x and to the kernel."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(1, 1, 9, 2, 2, dtype=torch.float64, requires_grad=True)
    with use(name):
        assert torch.autograd.gradgradcheck(lambda a, b: involution(a, b, 2), (x, kernel))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_under_autocast_takes_float32_input(dtype: torch.dtype) -> None:
    """As in a convolution, inputs are rounded to autocast's dtype, as is the result. Gradients have the dtype of the
    parameters. Outside of autocast nothing changes."""
    torch.manual_seed(0)
    layer, x = Involution(32, 7), torch.randn(2, 32, 9, 9)
    plain = layer(x)
    with torch.autocast("cpu", dtype):
        result = layer(x)
    assert plain.dtype == torch.float32
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), plain, rtol=0.1, atol=0.1 * float(plain.detach().abs().max()))
    result.float().square().sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters() if parameter.grad is not None} == {torch.float32}


def test_function_under_autocast_casts_both_operands() -> None:
    """Whether x, kernel or neither is already in half precision. As in convolutions, float64 is not cast, and mixing it
    with bfloat16 is an error."""
    torch.manual_seed(0)
    x, kernel = torch.randn(1, 16, 5, 5), torch.randn(1, 1, 9, 5, 5)
    half = torch.bfloat16
    with torch.autocast("cpu", half):
        expected = involution(x.to(half), kernel.to(half))
        assert expected.dtype == half
        for operands in ((x, kernel), (x, kernel.to(half)), (x.to(half), kernel), (x.half(), kernel)):
            torch.testing.assert_close(involution(*operands), expected, rtol=0.02, atol=0.02)
        assert involution(x.double(), kernel.double()).dtype == torch.float64
        with pytest.raises(ValueError, match="float64"):
            involution(x.double(), kernel)
    with torch.inference_mode(), torch.autocast("cpu", half):
        assert torch.equal(involution(x, kernel), expected)


class Residual(nn.Module):
    """A block of another network that uses the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.layer = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.SiLU()), Involution(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        out: Tensor = x + self.layer(x)
        return out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own tracing code
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "fx", "compile", "export", "trace", "data-parallel"])
def test_layer_in_another_network_survives(how: str, autocast: bool) -> None:
    """The usual transformations of training frameworks keep the output, also under autocast."""
    torch.manual_seed(0)
    net, x = Residual().eval().requires_grad_(False), torch.randn(2, 3, 12, 10)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = net(x)
        made: Any
        match how:
            case "deepcopy":
                made = copy.deepcopy(net)
            case "pickle":
                made = pickle.loads(pickle.dumps(net))
            case "fx":
                made = torch.fx.symbolic_trace(net)
            case "compile":
                made = torch.compile(net, backend="aot_eager", fullgraph=True)
            case "export":
                made = torch.export.export(net, (x,)).module()
            case "trace":
                made = torch.jit.trace(net, x)
            case _:
                made = nn.DataParallel(net)
        torch.testing.assert_close(made(x), expected)


def test_fx_traces_the_whole_network() -> None:
    """The involution is one node of the graph."""
    net = create_rednet("rednet26", num_classes=2, base_channels=16, stem_channels=32).eval()
    traced, x = torch.fx.symbolic_trace(net), torch.randn(1, 3, 40, 36)
    assert sum(node.target is involution for node in traced.graph.nodes) == 9
    with torch.no_grad():
        torch.testing.assert_close(traced(x), net(x))


def test_layer_on_meta_tensors_computes_shapes() -> None:
    """Frameworks determine strides and sizes without allocating memory."""
    layer = Involution(32, 7, stride=2).to("meta")
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert layer(torch.empty(2, 32, 9, 8, device="meta")).shape == (2, 32, 5, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own code for torch.func
def test_involution_rejects_forward_mode_differentiation() -> None:
    """The operator has no rule for it; without the error, its part of the derivative would be missing silently."""
    x, kernel = torch.randn(1, 16, 4, 4), torch.randn(1, 1, 9, 4, 4)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda a: involution(a, kernel), (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        involution(x, forward_ad.make_dual(kernel, kernel))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_involution_rejects_dtypes_without_floating_point(dtype: torch.dtype) -> None:
    """As convolutions do: sums would wrap around, and gradients would lack a conjugate."""
    with pytest.raises(ValueError, match="floating point"):
        involution(torch.ones(1, 16, 4, 4, dtype=dtype), torch.ones(1, 1, 9, 4, 4, dtype=dtype))


def test_involution_rejects_mixed_dtypes() -> None:
    """Mixed precision is an error, not a silent conversion."""
    with pytest.raises(ValueError, match="float64"):
        involution(torch.zeros(1, 16, 4, 4), torch.zeros(1, 1, 9, 4, 4).double())


def test_use_rejects_an_unknown_implementation() -> None:
    """The message lists the available implementations."""
    with pytest.raises(ValueError, match="reference, torch"), use("fast"):
        pass


def test_layer_at_stride_2_on_odd_maps() -> None:
    """At an odd border the kernel is generated from the average of the pixels that exist."""
    torch.manual_seed(0)
    layer = Involution(16, 7, stride=2).eval()
    x = torch.randn(1, 16, 5, 5)
    assert layer(x).shape == (1, 16, 3, 3)
    torch.testing.assert_close(layer.avgpool(x)[..., 2, 2], x[..., 4, 4])


def test_layer_rejects_invalid_arguments() -> None:
    """Channels must be a multiple of the group width, and all sizes must be positive."""
    with pytest.raises(ValueError, match="group_channels"):
        Involution(24, 7)
    for arguments in ({"kernel_size": -3}, {"stride": 0}, {"reduction_ratio": 0}, {"group_channels": -16}):
        with pytest.raises(ValueError, match="at least 1"):
            Involution(**({"channels": 32, "kernel_size": 7} | arguments))


@needs_native
def test_native_operator_called_directly_validates_its_inputs() -> None:
    """Without the checks of `involution`, mixed dtypes and kernel maps of the wrong shape still do not reach C."""
    x = torch.zeros(1, 16, 4, 4, dtype=torch.float64)
    with use("native"):
        assert torch.equal(operator(x, torch.zeros(1, 1, 9, 4, 4), 1), x)
        with pytest.raises(ValueError, match="a kernel map of 2x8 does not fit"):
            operator(x, torch.zeros(1, 1, 9, 2, 8, dtype=torch.float64), 1)


def test_kernels_larger_than_the_native_limit_run_in_torch() -> None:
    """65x65, where the C code supports up to 63x63."""
    torch.manual_seed(0)
    x, kernel = torch.randn(1, 2, 3, 3), torch.randn(1, 1, 65 * 65, 3, 3)
    torch.testing.assert_close(involution(x, kernel), by_hand(x, kernel, 1))
