"""The Triton kernels, in Triton's interpreter if there is no GPU, and compiled for one in either case."""

import os
import random
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rednet.model.ops import reference

triton_ops = pytest.importorskip("rednet.model.ops.triton_ops", reason="no Triton here", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates float32 to bfloat16, where a GPU rounds.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}


def results(x: Tensor, kernel: Tensor, stride: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Pairs of the Triton kernels' results (output, both gradients) and the reference results in float64."""
    x, kernel = x.to(DEVICE, dtype), kernel.to(DEVICE, dtype)
    out = triton_ops.forward(x, kernel, stride)
    grad = torch.randn_like(out)
    ours = (out, *triton_ops.backward(grad, x, kernel, stride))
    x, kernel, grad = x.double(), kernel.double(), grad.double()
    exact = (reference.forward(x, kernel, stride), *reference.backward(grad, x, kernel, stride))
    return list(zip(ours, exact, strict=True))


def inputs(seed: int) -> tuple[Tensor, Tensor, int]:
    """Random ones, without hypothesis, which a machine with a GPU may not have."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, groups, width_of_group = rng.randint(0, 3), rng.randint(1, 3), rng.choice([1, 2, 16])
    height, width, k, stride = rng.randint(1, 9), rng.randint(1, 9), rng.choice([1, 3, 5, 7]), rng.randint(1, 3)
    x = torch.randn(batch, groups * width_of_group, height, width).double()
    kernel = torch.randn(batch, groups, k * k, -(-height // stride), -(-width // stride)).double()
    if rng.random() < 0.5:  # the same values with other strides
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
        kernel = kernel.movedim(1, -1).contiguous().movedim(-1, 1)
    return x, kernel, stride


@pytest.mark.parametrize("seed", range(12))
def test_triton_values_and_gradients_match_reference(seed: int) -> None:
    """Over random shapes, strides, group widths, memory layouts and empty batches."""
    x, kernel, stride = inputs(seed)
    if 0 in x.shape:
        assert triton_ops.forward(x.to(DEVICE), kernel.to(DEVICE), stride).shape[0] == 0
        return
    for dtype in (torch.float64, torch.float32):
        for ours, exact in results(x, kernel, stride, dtype):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_triton_half_precision_accumulates_in_float32(dtype: torch.dtype, stride: int) -> None:
    """The result is the exact sum, rounded once."""
    torch.manual_seed(0)
    x, kernel = torch.randn(2, 32, 9, 7), torch.randn(2, 2, 49, -(-9 // stride), -(-7 // stride))
    for ours, exact in results(x, kernel, stride, dtype):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=1.01 * ROUNDING[dtype], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_fused_kernel_applies_bias_batch_norm_and_relu(dtype: torch.dtype) -> None:
    """Kernel bias, batch-norm scale and shift, and ReLU, with groups whose width is not a power of two."""
    torch.manual_seed(0)
    groups, width = 2, 12
    x, kernel = torch.randn(2, groups * width, 6, 7), torch.randn(2, groups, 9, 3, 4)
    bias, scale, shift = torch.randn(groups * 9), torch.randn(groups * width), torch.randn(groups * width)
    halves = [tensor.to(DEVICE, dtype) for tensor in (x, kernel, bias)]
    ours = triton_ops.fused(halves[0], halves[1], 2, halves[2], scale.to(DEVICE), shift.to(DEVICE))
    x, kernel, bias = (tensor.double().cpu() for tensor in halves)
    exact = reference.forward(x, kernel + bias.reshape(1, groups, 9, 1, 1), 2)
    exact = (exact * scale.double()[:, None, None] + shift.double()[:, None, None]).relu()
    torch.testing.assert_close(ours.double().cpu(), exact, rtol=1.01 * ROUNDING.get(dtype, 1e-5), atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 3, 4, 1, 2), (1, 2, 0, 3, 4)])
def test_triton_reads_kernels_of_any_layout_without_a_copy(order: tuple[int, ...]) -> None:
    """Channels first and channels last, as convolutions produce them, and the layout that a matrix product produces."""
    back = [order.index(axis) for axis in range(5)]
    kernel = torch.randn(2, 3, 9, 4, 5).permute(order).contiguous().permute(back)
    flat = triton_ops._flat(kernel)
    assert flat.data_ptr() == kernel.data_ptr()
    assert torch.equal(flat, kernel.reshape(2, 27, 20))


def test_triton_fused_relu_keeps_nan() -> None:
    """A broken input must remain visible."""
    nothing = torch.zeros(16, device=DEVICE)
    x = torch.full((1, 16, 1, 1), torch.nan, device=DEVICE)
    out = triton_ops.fused(x, torch.ones(1, 1, 1, 1, 1, device=DEVICE), 1, nothing[:1], nothing + 1, nothing)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("file", "name"),
    [
        *(("triton_ops", name) for name in ("_forward", "_kernel_gradient", "_input_gradient")),
        *(("triton_fused", name) for name in ("_bias_relu", "_pool_bias_relu")),
        ("triton_generated", "_forward"),
    ],
)
def test_triton_kernels_are_launched_on_the_device_of_their_tensors(
    file: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current device, which may be another one."""
    from rednet.model.ops import triton_fused, triton_generated

    guarded: list[Tensor] = []
    launched: list[Tensor] = []

    class Guard:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def __enter__(self) -> None:
            guarded.append(self.tensor)

        def __exit__(self, *_: object) -> None:
            guarded.clear()

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *_, **__: launched.extend(guarded)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    (module,) = (each for each in (triton_ops, triton_fused, triton_generated) if each.__name__.endswith(file))
    monkeypatch.setattr(module, name, Kernel())
    x, kernel = torch.randn(2, 16, 4, 4, device=DEVICE), torch.randn(2, 1, 9, 4, 4, device=DEVICE)
    triton_ops.forward(x, kernel, 1)
    triton_ops.backward(x, x, kernel, 1)
    triton_fused.pool_bias_relu(x, x[0, :, 0, 0])
    triton_fused.bias_relu(x, x[0, :, 0, 0])
    triton_generated.fused(x, x, torch.randn(1, 9, 16, device=DEVICE), 1, kernel[0, 0, :, 0, 0], *x[:, :, 0, 0])
    assert launched
    assert all(tensor.device == x.device for tensor in launched)


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rednet.model.ops import triton_ops

common = dict(K=7, STRIDE=1, GROUP_CHANNELS=16, BLOCK_C=16, ACC_DTYPE=tl.float32)
strips, pixels = dict(BLOCK=triton_ops.BLOCK_STRIPS, STRIP=triton_ops.STRIP), dict(BLOCK=triton_ops.BLOCK_PIXELS)
bare = dict.fromkeys(("bias", "scale", "shift"))
gradients = [(triton_ops._kernel_gradient, pixels), (triton_ops._input_gradient, pixels)]
for kernel, more in [(triton_ops._forward, strips), (triton_ops._forward, strips | bare), *gradients]:
    constants = common | more
    for dtype, warps in (("fp32", 4), ("fp16", 2), ("bf16", 2)):
        signature = {name: f"*{dtype}" for name in kernel.arg_names[:3]}
        signature |= dict.fromkeys(triton_ops.UNSPECIALIZED, "i32")
        if kernel is triton_ops._forward:
            signature |= {"bias": f"*{dtype}", "scale": "*fp32", "shift": "*fp32"}
        source = ASTSource(
            fn=kernel,
            signature=signature | dict.fromkeys(constants, "constexpr"),
            constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
            attrs={(index,): [["tt.divisibility", 16]] for index in range(3)},  # tensors are aligned
        )
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
        assert "ld.global.v4.b32" in code, (kernel, dtype)
        if kernel is triton_ops._forward:  # no data is exchanged between lanes
            assert "bar.sync" not in code and "ld.shared" not in code, dtype
            # shared pixels are read once: ten pixels for four outputs of seven taps
            assert code.count("ld.global.v4.b32") == triton_ops.STRIP - 1 + 7, dtype
"""


def test_triton_kernels_compile_for_hopper_without_a_gpu() -> None:
    """The compiled kernels load sixteen bytes at a time."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)  # eleven compilations
@pytest.mark.parametrize("target", [75, 80, 86, 89, 90, 100, 120])
def test_triton_kernels_compile_for_every_gpu_without_spills(target: int) -> None:
    """Every kernel of a network, in bfloat16; `--dtypes` compiles for others."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu_compile", "--targets", str(target), "--dtypes", "bf16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == (7 if target == 75 else 11)  # generation needs tensor cores


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device here")
@pytest.mark.gpu
def test_triton_kernels_are_not_specialised_for_shapes() -> None:
    """Batch sizes, heights and widths that Triton would specialise for (1, multiples of 16) reuse compiled kernels."""

    def forward(batch: int, side: int) -> None:
        x = torch.randn(batch, 64, side, side, device=DEVICE)
        triton_ops.forward(x, torch.randn(batch, 4, 9, side, side, device=DEVICE), 1)

    forward(3, 5)
    compiled = sum(len(cache[0]) for cache in triton_ops._forward.device_caches.values())
    for batch, side in ((1, 5), (16, 5), (3, 1), (3, 16), (32, 64), (7, 33)):
        forward(batch, side)
    assert sum(len(cache[0]) for cache in triton_ops._forward.device_caches.values()) == compiled


SPECIALISE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from rednet.model.ops import triton_generated, triton_ops

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

class CompiledOnly:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid): return lambda *values, **meta: self.kernel.warmup(*values, grid=grid, **meta)
    def __len__(self): return sum(len(cache[0]) for cache in self.kernel.device_caches.values())

triton.runtime.driver.set_active(Driver())
for module in (triton_ops, triton_generated):
    module._forward = CompiledOnly(module._forward)
for batch, groups, side, reduced in ((3, 3, 11, 48), (1, 1, 1, 16), (16, 16, 16, 16), (64, 32, 7, 128)):
    x, norm = torch.empty(batch, 16 * groups, side, side, dtype=torch.float16), torch.empty(2, 16 * groups)
    kernel, bias = x.new_empty(batch, groups, 9, side, side), x.new_empty(groups * 9)
    triton_ops.fused(x, kernel, 1, bias, *norm)
    triton_generated.fused(x, x.new_empty(batch, reduced, side, side), x.new_empty(groups, 9, reduced), 1, bias, *norm)
    assert len(triton_ops._forward) == len(triton_generated._forward) == 1, (batch, groups, side, reduced)
"""


@pytest.mark.slow
def test_triton_kernels_are_compiled_once_for_all_shapes_without_a_gpu() -> None:
    """Sizes that Triton would specialise for (1, multiples of 16) reuse compiled kernels, on a made-up driver."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SPECIALISE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
