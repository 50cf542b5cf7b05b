"""Every implementation of involution, behind one operator: `torch.ops.rednet.involution`.

One operator with fake and autograd rules is what export, torch.compile and training need; which implementation runs is
decided inside it, by the one table below.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from model.kernels import portable, reference


class Implementation(Protocol):
    """What a module of this package offers; tensors as documented in `reference`."""

    def forward(self, x: Tensor, kernel: Tensor, stride: int) -> Tensor: ...

    def backward(self, grad: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]: ...


IMPLEMENTATIONS: Mapping[str, Implementation] = {"reference": reference, "portable": portable}
BY_DEVICE: Mapping[str, str] = {"cpu": "portable", "cuda": "portable"}  # any other device: portable, too

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


def implementation_name(device: torch.device) -> str:
    """The name of the implementation that runs on `device`."""
    return _forced or BY_DEVICE.get(device.type, "portable")


@torch.library.custom_op("rednet::involution", mutates_args=())
def operator(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    return IMPLEMENTATIONS[implementation_name(x.device)].forward(x, kernel, stride)


@torch.library.custom_op("rednet::involution_backward", mutates_args=())
def operator_backward(grad: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    return IMPLEMENTATIONS[implementation_name(x.device)].backward(grad, x, kernel, stride)


@operator.register_fake
def _(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], kernel.shape[3], kernel.shape[4])


@operator_backward.register_fake
def _(grad: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), kernel.new_empty(kernel.shape)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    x, kernel, ctx.stride = inputs
    ctx.save_for_backward(x, kernel)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, kernel = ctx.saved_tensors
    return *operator_backward(grad, x, kernel, ctx.stride), None


operator.register_autograd(_gradients, setup_context=_save_inputs)
