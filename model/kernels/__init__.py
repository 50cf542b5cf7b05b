"""Every implementation of involution, behind one operator: `torch.ops.rednet.involution`.

One operator with fake and autograd rules is what export, torch.compile and training need; which implementation runs is
decided inside it, by the one table below.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from model.kernels import native, portable, reference
from model.native import unavailable


class Implementation(Protocol):
    """What a module of this package offers; tensors as documented in `reference`."""

    def forward(self, x: Tensor, kernel: Tensor, stride: int) -> Tensor: ...

    def backward(self, grad: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]: ...


def _found() -> dict[str, Implementation]:
    """Those that can run here."""
    found: dict[str, Implementation] = {"reference": reference, "portable": portable}
    if not unavailable():
        found["native"] = native
    if torch.cuda.is_available() and find_spec("triton"):
        found["cuda"] = import_module("model.kernels.cuda")
    return found


IMPLEMENTATIONS: Mapping[str, Implementation] = _found()
BY_DEVICE: Mapping[str, str] = {"cpu": "native", "cuda": "cuda"}  # where it was found; else, and elsewhere: portable

_forced: str | None = None


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run every involution of the process through the implementation `name`, whatever the device: for comparisons."""
    global _forced  # noqa: PLW0603  (one process, one choice: a backward pass may run in a thread of its own)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}; there are {', '.join(IMPLEMENTATIONS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def implementation_name(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the implementation that runs for tensors on `device` and of `dtype`."""
    if _forced:
        return _forced
    name = BY_DEVICE.get(device.type, "portable")
    if name not in IMPLEMENTATIONS:
        return "portable"
    return "portable" if name == "native" and dtype not in (*native.DTYPES, *native.HALVES) else name


def forward(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Involution by the operator, or straight by its implementation where nothing is recorded or traced: the first use
    of an operator of one's own loads torch's compiler, which takes a second.
    """
    traced = torch.compiler.is_compiling() or not type(x) is type(kernel) is Tensor
    if traced or not torch.is_inference_mode_enabled():
        result: Tensor = operator(x, kernel, stride)
        return result
    return _forward(x, kernel, stride)


def _forward(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    out = IMPLEMENTATIONS[implementation_name(x.device, x.dtype)].forward(x, kernel, stride)
    return out.contiguous(memory_format=_memory_format(x))


operator = torch.library.custom_op("rednet::involution", _forward, mutates_args=())


@torch.library.custom_op("rednet::involution_backward", mutates_args=())
def operator_backward(grad: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    grad_x, grad_kernel = IMPLEMENTATIONS[implementation_name(x.device, x.dtype)].backward(grad, x, kernel, stride)
    return _laid_out_like(x, grad_x), _laid_out_like(kernel, grad_kernel)


@operator.register_fake
def _(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    shape = (x.shape[0], x.shape[1], kernel.shape[3], kernel.shape[4])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


@operator_backward.register_fake
def _(grad: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(kernel)


def _memory_format(x: Tensor) -> torch.memory_format:
    """Outputs lie in memory as x does, so that a network in channels-last stays so."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _laid_out_like(x: Tensor, grad: Tensor) -> Tensor:
    """A gradient lies in memory as what it is the gradient of."""
    like = torch.empty_like(x)
    return grad if grad.stride() == like.stride() else like.copy_(grad)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    x, kernel, ctx.stride = inputs
    ctx.save_for_backward(x, kernel)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, kernel = ctx.saved_tensors
    return *operator_backward(grad, x, kernel, ctx.stride), None


operator.register_autograd(_gradients, setup_context=_save_inputs)


def _save_backward_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    grad, x, kernel, ctx.stride = inputs
    ctx.save_for_backward(grad, x, kernel)


def _second_gradients(ctx: Any, grad_grad_x: Tensor, grad_grad_kernel: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients of a gradient. Involution F is linear in x and in the kernel, so that <v, dL/dx> = <grad, F(v, kernel)>
    and <w, dL/dkernel> = <grad, F(x, w)>: the same two operators again.
    """
    grad, x, kernel = ctx.saved_tensors
    grad_of_grad = operator(grad_grad_x, kernel, ctx.stride) + operator(x, grad_grad_kernel, ctx.stride)
    grad_of_x, _ = operator_backward(grad, x, grad_grad_kernel, ctx.stride)
    _, grad_of_kernel = operator_backward(grad, grad_grad_x, kernel, ctx.stride)
    return grad_of_grad, grad_of_x, grad_of_kernel, None


operator_backward.register_autograd(_second_gradients, setup_context=_save_backward_inputs)
