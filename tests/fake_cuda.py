"""A made-up CUDA device, so that the code for GPUs also runs where there is none: the CPU, under the name of cuda.

It is stricter than a GPU where that shows mistakes:

- What is copied without blocking arrives only when something waits for it. Until then the target holds `POISON`.
- A CUDA graph repeats the operations that were captured, in the memory of the capture: outputs are overwritten.
  Until the first replay, that memory holds NaN, because a capture computes nothing.

It cannot show what a GPU computes: Triton kernels run in the interpreter, or are replaced by their definition.

    python -m tests.fake_cuda serve --port 8000     # the command `rednet` on the made-up device
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

DEVICES = 2
POISON = 0xAA  # in bytes that have not arrived; NaN in numbers

_current = threading.local()  # .stream, .device


class Stream:
    """Work that is enqueued, and done when something waits for it."""

    def __init__(self, device: object = None, **_: object) -> None:
        self.pending: list[Callable[[], object]] = []

    def synchronize(self) -> None:
        while self.pending:
            self.pending.pop(0)()

    def wait_stream(self, stream: "Stream") -> None:
        stream.synchronize()


class Event:
    """Reports completion at the second query, or when waited for."""

    def __init__(self, blocking: bool = False, **_: object) -> None:
        self.blocking = blocking
        self._stream: Stream | None = None
        self._recorded_s = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._stream = stream or current_stream()
        self._recorded_s = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end._recorded_s - self._recorded_s)

    def query(self) -> bool:
        assert self._stream is not None, "the event was never recorded"
        done = not self._stream.pending
        self.synchronize()
        return done

    def synchronize(self) -> None:
        assert self._stream is not None, "the event was never recorded"
        self._stream.synchronize()


def current_stream(device: object = None) -> Stream:
    if not hasattr(_current, "stream"):
        _current.stream = Stream()
    stream: Stream = _current.stream
    return stream


@contextmanager
def stream(chosen: Stream) -> Iterator[None]:
    before, _current.stream = current_stream(), chosen
    try:
        yield
    finally:
        _current.stream = before


@contextmanager
def device(chosen: object) -> Iterator[None]:
    """The guard; `current_device` tells the innermost one."""
    before, _current.device = current_device(), torch.device(chosen).index or 0  # type: ignore[call-overload]
    try:
        yield
    finally:
        _current.device = before


def current_device() -> int:
    return getattr(_current, "device", 0)


class _Recorder(TorchDispatchMode):
    """Runs operations and records them."""

    def __init__(self, operations: list[Callable[[], object]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = operations
        self.allocated: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        results = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        self.allocated += [each for each in results if each.untyped_storage().data_ptr() not in given]

        def repeat() -> None:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.operations.append(repeat)
        return out


class CUDAGraph:
    def __init__(self) -> None:
        self.operations: list[Callable[[], object]] = []

    def replay(self) -> None:
        assert self.operations, "the graph is empty"
        current_stream().synchronize()  # in the order of the stream
        for operation in self.operations:
            operation()


@contextmanager
def graph(graph: CUDAGraph, pool: object = None, stream: Stream | None = None, capture_error_mode: str = "") -> Any:
    assert stream is not None
    assert not stream.pending
    recorder = _Recorder(graph.operations)
    _current.recorder = recorder
    try:
        with recorder:
            yield
    finally:
        del _current.recorder
    for tensor in recorder.allocated:
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)


def is_capturing() -> bool:
    """Whether this thread captures a graph."""
    return hasattr(_current, "recorder")


def _without_cuda(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """The arguments of a torch function without the device, and whether it was a CUDA device."""
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    found = [each for each in (*args, kwargs.get("device")) if _is_cuda(each)]
    if found:
        kwargs.pop("device", None)
        args = tuple(each for each in args if not _is_cuda(each))
    return args, kwargs, bool(found)


def _is_cuda(value: object) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


def _factory(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs, _ = _without_cuda(args, kwargs)
        return make(*args, **kwargs)

    return made


_to, _cpu, _module_to = Tensor.to, Tensor.cpu, nn.Module.to


def _tensor_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    wanted_cpu = any(str(each) == "cpu" for each in (*args, kwargs.get("device")) if not isinstance(each, Tensor))
    args, kwargs, to_cuda = _without_cuda(args, kwargs)
    if not (kwargs.pop("non_blocking", False) and (wanted_cpu or (to_cuda and hasattr(_current, "deferred")))):
        return _to(self, *args, **kwargs) if args or kwargs else self.clone()
    source = self
    target = torch.full_like(source, torch.nan if source.is_floating_point() else POISON)
    current_stream().pending.append(lambda: target.copy_(source))
    return target


@contextmanager
def _upload_stream(chosen: Stream) -> Iterator[None]:
    """Copies to the device are deferred on streams other than the one that computes."""
    with stream(chosen):
        outer = hasattr(_current, "deferred")
        _current.deferred = True
        try:
            yield
        finally:
            if not outer:
                del _current.deferred


def _tensor_cpu(self: Tensor) -> Tensor:
    current_stream().synchronize()
    return _cpu(self)


def _to_device(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    args, kwargs, _ = _without_cuda(args, kwargs)
    return _module_to(self, *args, **kwargs) if args or kwargs else self


def convolution_add_relu(
    x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, stride: Any, padding: Any, *_: Any
) -> Tensor:
    """What cuDNN computes in one pass."""
    return (nn.functional.conv2d(x, weight, bias, stride, padding) + alpha * z).relu()


def defined_fused(
    x: Tensor,
    kernel: Tensor,
    stride: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The definition of `triton_ops.fused`, rounded once, in the layout of the Triton kernel's output."""
    from rednet.model.ops import torch_ops

    kernel = kernel.float()
    if bias is not None:
        kernel = kernel + bias.float().reshape(1, kernel.shape[1], kernel.shape[2], 1, 1)
    out = torch_ops.forward(x.float(), kernel, stride)
    if scale is not None and shift is not None:
        out = (out * scale[:, None, None] + shift[:, None, None]).relu()
    return out.to(x.dtype).contiguous(memory_format=torch.channels_last)


def defined_generated(
    x: Tensor, reduced: Tensor, span: Tensor, stride: int, bias: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """The definition of `triton_generated.fused`, with the faults that a test puts into `triton_ops.fused`."""
    from rednet.model.ops import triton_ops

    kernel = torch.einsum("gtc,bcyx->bgtyx", span.float(), reduced.float()).to(x.dtype)
    return triton_ops.fused(x, kernel, stride, bias, scale, shift)


def defined_normalise(pixels: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    out = pixels.float() * scale[:, None, None] + shift[:, None, None]
    return out.to(dtype).contiguous(memory_format=torch.channels_last)


def defined_bias_relu(x: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    out = x.float() + bias.float()[:, None, None]
    if residual is not None:
        out = out + residual.float()
    return x.copy_(out.relu())


def defined_pool_bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    out = (nn.functional.max_pool2d(x, 3, 2, 1).float() + bias.float()[:, None, None]).relu()
    return out.to(x.dtype).contiguous(memory_format=torch.channels_last)


@contextmanager
def fake_cuda(interpret: bool = False) -> Iterator[None]:
    """Make up the device for all code inside the block.

    Args:
        interpret: run Triton kernels, in the interpreter; False: compute their definition, which is faster.
    """
    namespace: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: DEVICES,
        "current_device": current_device,
        "get_device_name": lambda *_: "made-up device",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(uuid="made-up", name="made-up device"),
        "synchronize": lambda *_: current_stream().synchronize(),
        "graph_pool_handle": object,
        "current_stream": current_stream,
        "stream": _upload_stream,
        "device": device,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
    }
    with ExitStack() as stack:
        for name, value in namespace.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        for name in ("zeros", "empty", "full", "ones", "tensor", "randint", "arange"):
            stack.enter_context(patch.object(torch, name, _factory(getattr(torch, name))))
        stack.enter_context(patch.object(torch, "cudnn_convolution_add_relu", convolution_add_relu, create=True))
        stack.enter_context(patch.object(Tensor, "to", _tensor_to))
        stack.enter_context(patch.object(Tensor, "cpu", _tensor_cpu))
        stack.enter_context(patch.object(Tensor, "is_cuda", property(lambda _: True), create=True))
        stack.enter_context(patch.object(nn.Module, "to", _to_device))
        stack.enter_context(_triton(interpret))
        yield


@contextmanager
def _triton(interpret: bool) -> Iterator[None]:
    """Where Triton can be imported, let the candidates use it."""
    from rednet.model import ops
    from rednet.model.inference.cuda import candidates

    if ops.TRITON_UNAVAILABLE not in (None, "there is no CUDA device"):
        yield
        return
    from rednet.model.ops import triton_fused, triton_generated, triton_ops

    def recorded(launch: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():  # the interpreter's own operations belong to no graph
            launch(*args, **kwargs)
        if is_capturing():
            _current.recorder.operations.append(partial(launch, *args, **kwargs))

    with ExitStack() as stack:
        stack.enter_context(patch.object(candidates, "TRITON_UNAVAILABLE", None))
        for module in (triton_ops, triton_fused, triton_generated):
            stack.enter_context(patch.object(module, "_launch", partial(recorded, module._launch)))
        if not interpret:
            stack.enter_context(patch.object(triton_ops, "fused", defined_fused))
            stack.enter_context(patch.object(triton_generated, "fused", defined_generated))
            stack.enter_context(patch.object(triton_fused, "normalise", defined_normalise))
            stack.enter_context(patch.object(triton_fused, "bias_relu", defined_bias_relu))
            stack.enter_context(patch.object(triton_fused, "pool_bias_relu", defined_pool_bias_relu))
        yield


def main() -> None:
    """The command `rednet` on the made-up device.

    FAKE_CUDA=interpret runs Triton's kernels in the interpreter, define their definition. With real, Triton is used as
    on a GPU, and fails where it needs one. With torch-fails, torch cannot use the GPU either.
    """
    how = os.environ.get("FAKE_CUDA", "define")
    if how == "real":
        del os.environ["TRITON_INTERPRET"]  # that `tests/__init__.py` has set
    with ExitStack() as stack:
        stack.enter_context(fake_cuda(interpret=how != "define"))
        if how == "torch-fails":
            error = RuntimeError("no kernel image is available for execution on the device")
            stack.enter_context(patch.object(nn.Module, "to", side_effect=error))
        from rednet.service.cli.parser import main as rednet

        sys.exit(rednet())


if __name__ == "__main__":
    main()
