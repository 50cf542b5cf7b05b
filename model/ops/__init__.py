"""The involution operator, `torch.ops.rednet.involution`, and the table of its implementations.

A custom operator with fake and autograd rules supports export, torch.compile and training. The implementation is an
argument of the operator, so that networks in one process can use different ones.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from rednet.model.native import unavailable
from rednet.model.ops import native_ops, reference, torch_ops


class Implementation(Protocol):
    """The interface of the implementations, which are modules of this package; shapes are those of `reference`."""

    def forward(self, x: Tensor, kernel: Tensor, stride: int) -> Tensor: ...

    def backward(self, grad: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]: ...


def _available() -> tuple[dict[str, Implementation], str | None]:
    """The implementations that can run on this machine, and the reason why Triton's is not among them, if so."""
    available: dict[str, Implementation] = {"reference": reference, "torch": torch_ops}
    if not unavailable():
        available["native"] = native_ops
    if not torch.cuda.is_available():
        return available, "there is no CUDA device"
    try:
        available["triton"] = import_module("rednet.model.ops.triton_ops")
    except Exception as error:  # noqa: BLE001  (a Triton that does not fit the machine raises anything)
        return available, f"Triton cannot be imported: {type(error).__name__}: {error}"
    return available, None


IMPLEMENTATIONS: Mapping[str, Implementation]
TRITON_UNAVAILABLE: str | None  # the reason
IMPLEMENTATIONS, TRITON_UNAVAILABLE = _available()
BY_DEVICE: Mapping[str, str] = {"cpu": "native", "cuda": "triton"}  # preferred; "torch" if it is not available

_override: ContextVar[str] = ContextVar("involution_implementation", default="")


@contextmanager
def use(name: str) -> Iterator[None]:
    """Select an implementation for every involution that this thread calls inside the block, whatever the device.

    The backward pass of such a call uses the same implementation, wherever and whenever it runs.

    Args:
        name: a key of `IMPLEMENTATIONS`.

    Raises:
        ValueError: there is no such implementation on this machine.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}; available here: {', '.join(IMPLEMENTATIONS)}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def implementation_name(device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that runs for tensors on `device` and of `dtype`, unless `use` selects another."""
    name = BY_DEVICE.get(device.type, "torch")
    if name not in IMPLEMENTATIONS:
        return "torch"
    return "torch" if name == "native" and dtype not in (*native_ops.DTYPES, *native_ops.HALF_DTYPES) else name


def forward(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Involution through the custom operator, or directly if there is no autograd and no tracing.

    The first use of a custom operator imports torch's compiler, which takes a second. Plain inference avoids this.

    Args:
        x: [B, C, H, W].
        kernel: [B, G, K*K, h, w].
        stride: distance between neighbouring outputs.

    Returns:
        [B, C, h, w].
    """
    compiling = torch.compiler.is_compiling()  # it cannot trace the context variable, which is then read at run time
    implementation = "" if compiling else _override.get()
    traced = compiling or not type(x) is type(kernel) is Tensor
    if traced or not torch.is_inference_mode_enabled():
        result: Tensor = operator(x, kernel, stride, implementation)
        return result
    return _forward(x, kernel, stride, implementation)


def _forward(x: Tensor, kernel: Tensor, stride: int, implementation: str = "") -> Tensor:
    # An empty name is resolved here, at run time: an exported program may run on another machine.
    name = implementation or _override.get() or implementation_name(x.device, x.dtype)
    out = IMPLEMENTATIONS[name].forward(x, kernel, stride)
    return out.contiguous(memory_format=_memory_format(x))


operator = torch.library.custom_op("rednet::involution", _forward, mutates_args=())


@torch.library.custom_op("rednet::involution_backward", mutates_args=())
def operator_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, stride: int, implementation: str
) -> tuple[Tensor, Tensor]:
    name = implementation or implementation_name(x.device, x.dtype)
    grad_x, grad_kernel = IMPLEMENTATIONS[name].backward(grad, x, kernel, stride)
    return _with_strides_of(x, grad_x), _with_strides_of(kernel, grad_kernel)


@operator.register_fake
def _(x: Tensor, kernel: Tensor, stride: int, implementation: str = "") -> Tensor:
    shape = (x.shape[0], x.shape[1], kernel.shape[3], kernel.shape[4])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


@operator_backward.register_fake
def _(grad: Tensor, x: Tensor, kernel: Tensor, stride: int, implementation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(kernel)


def _memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of x, which the output also gets, so that a channels-last network stays channels-last."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _with_strides_of(x: Tensor, grad: Tensor) -> Tensor:
    """Return `grad` with the strides of x, the tensor that it is the gradient of."""
    like = torch.empty_like(x)
    return grad if grad.stride() == like.stride() else like.copy_(grad)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, int, str], output: Tensor) -> None:
    x, kernel, ctx.stride, ctx.implementation = inputs
    ctx.save_for_backward(x, kernel)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    x, kernel = ctx.saved_tensors
    return *operator_backward(grad, x, kernel, ctx.stride, ctx.implementation), None, None


operator.register_autograd(_gradients, setup_context=_save_inputs)


def _save_backward_inputs(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, str], output: tuple[Tensor, Tensor]
) -> None:
    grad, x, kernel, ctx.stride, ctx.implementation = inputs
    ctx.save_for_backward(grad, x, kernel)


def _second_gradients(
    ctx: Any, grad_grad_x: Tensor, grad_grad_kernel: Tensor
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """Second-order gradients. Involution F is linear in x and in the kernel: <v, dL/dx> = <grad, F(v, kernel)> and
    <w, dL/dkernel> = <grad, F(x, w)>, so that the same two operators compute them.
    """
    grad, x, kernel = ctx.saved_tensors
    options = ctx.stride, ctx.implementation
    grad_of_grad = operator(grad_grad_x, kernel, *options) + operator(x, grad_grad_kernel, *options)
    grad_of_x, _ = operator_backward(grad, x, grad_grad_kernel, *options)
    _, grad_of_kernel = operator_backward(grad, grad_grad_x, kernel, *options)
    return grad_of_grad, grad_of_x, grad_of_kernel, None, None


operator_backward.register_autograd(_second_gradients, setup_context=_save_backward_inputs)
