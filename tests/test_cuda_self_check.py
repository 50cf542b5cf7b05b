"""The self-check of the CUDA backend: faults that are put in on purpose, on a made-up GPU if there is none."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from rednet import RedNet, SelfCheckError, load_checkpoint, prepare
from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.preparation import DTYPES, TOLERANCE, _noise
from rednet.model.inference.self_check import (
    DeviationError,
    ReferenceOutput,
    SelfCheck,
    reference_output,
    relative_error,
)
from tests.fake_cuda import CUDAGraph, fake_cuda, is_capturing
from tests.test_preparation import assert_close, photos

pytestmark = pytest.mark.slow

triton_ops = pytest.importorskip("rednet.model.ops.triton_ops", reason="no Triton here", exc_type=ImportError)

TINY, SMALL = Preprocess(resize=72, crop=64), Preprocess(resize=128, crop=96)
Fused = Callable[..., Tensor]


@pytest.fixture(scope="module")
def net() -> RedNet:
    return load_checkpoint().net


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with nullcontext() if torch.cuda.is_available() else fake_cuda():
        yield


def tap_left_out(fused: Fused, x: Tensor, kernel: Tensor, stride: int, bias: Tensor, *more: Tensor) -> Tensor:
    """The last of the K * K taps."""
    groups, taps = kernel.shape[1:3]
    kernel = kernel.clone()
    kernel[:, :, -1] = -bias.reshape(groups, taps)[:, -1].reshape(1, -1, 1, 1)
    return fused(x, kernel, stride, bias, *more)


def bias_left_out(fused: Fused, x: Tensor, kernel: Tensor, stride: int, bias: Tensor, *more: Tensor) -> Tensor:
    return fused(x, kernel, stride, torch.zeros_like(bias), *more)


def last_column_zero(fused: Fused, *operands: Any) -> Tensor:
    out = fused(*operands).clone()
    out[..., -1] = 0
    return out


def last_pixel_zero(fused: Fused, *operands: Any) -> Tensor:
    out = fused(*operands).clone()
    out[..., -1, -1] = 0
    return out


def top_row_reads_the_bottom_row(fused: Fused, x: Tensor, *more: Any) -> Tensor:
    out = fused(x, *more).clone()
    out[..., 0, :] = fused(x.roll(1, 2), *more)[..., 0, :]
    return out


def last_group_zero(fused: Fused, *operands: Any) -> Tensor:
    """One of 32, in the last stage only."""
    out = fused(*operands).clone()
    if out.shape[1] == 512:
        out[:, -16:] = 0
    return out


def rows_exchanged(fused: Fused, *operands: Any) -> Tensor:
    """Every image gets the result of its neighbour."""
    return fused(*operands).roll(1, 0)


FAULTS = [
    tap_left_out,
    bias_left_out,
    last_column_zero,
    last_pixel_zero,
    top_row_reads_the_bottom_row,
    last_group_zero,
    rows_exchanged,
]


@contextmanager
def fault(name: Callable[..., Tensor], only_for: int | None = None) -> Iterator[None]:
    """Put a fault into the involution of every layer, perhaps in batches of one size only."""
    healthy = triton_ops.fused

    def faulty(x: Tensor, *more: Any) -> Tensor:
        return name(healthy, x, *more) if only_for in (None, len(x)) else healthy(x, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_ops, "fused", faulty)
        yield


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("precision", DTYPES)
def test_fault_in_the_involution_is_noticed_in_every_precision(net: RedNet, precision: str, name: Fused) -> None:
    """All backends with Triton are rejected, and the one without it answers right."""
    with fault(name):
        run = prepare(net, TINY, "cuda", precision)
    assert run.backend == "torch, involution: torch"
    assert [reason.partition(": deviates")[0] for reason in run.rejected_backends] == [
        "CUDA graphs",
        "Triton without CUDA graphs",
        *(["kernel generation in the involution"] if precision != "fp32" else []),
    ]


@pytest.fixture(scope="module")
def full_size(net: RedNet) -> ReferenceOutput:
    return reference_output(net, Preprocess(), _noise(2, 224))


@pytest.mark.parametrize("name", FAULTS)
def test_fault_exceeds_the_float32_limit_tenfold_at_full_size(
    net: RedNet, full_size: ReferenceOutput, name: Fused
) -> None:
    """At 224x224, where a pixel or a row is a smaller part of a map."""
    from rednet.model.inference.cuda.network import TritonRedNet

    check = SelfCheck(full_size, 10 * TOLERANCE["cuda"]["fp32"])
    with fault(name), torch.inference_mode(), pytest.raises(DeviationError):
        check.run(TritonRedNet(net, Preprocess(), torch.device("cuda"), torch.float32), 2)


@pytest.mark.parametrize("precision", DTYPES)
def test_healthy_network_passes_on_a_hundred_photos(net: RedNet, precision: str) -> None:
    """No false alarm: the largest error of all photos is below half of the limit."""
    from rednet.model.inference.cuda.network import TritonRedNet

    with torch.inference_mode():
        network = TritonRedNet(net, TINY, torch.device("cuda"), DTYPES[precision])
        for pixels in _noise(100, TINY.crop).split(25):
            expected = reference_output(net, TINY, pixels)
            logits, features, *_ = network(pixels)
            limit = TOLERANCE["cuda"][precision] / 2
            assert relative_error(logits, expected.logits, expected.logit_scale) < limit
            assert relative_error(features, expected.features, torch.linalg.norm(expected.features, dim=1)) < limit


def test_program_that_is_wrong_at_one_size_is_not_used(net: RedNet, caplog: pytest.LogCaptureFixture) -> None:
    """Batches of 5 and 6 run in the program for 8, and results are right."""
    run = prepare(net, SMALL, "cuda", "fp32")
    assert run.backend == "CUDA graphs, Triton involution"
    pixels = photos(8, 96, 96)
    with torch.inference_mode():
        expected = net(SMALL.normalise(pixels))
    with fault(last_group_zero, only_for=6), caplog.at_level(logging.ERROR):
        run(pixels)
        assert_close(run(pixels[:5]).logits, expected[:5], 1e-5)
    assert "no CUDA graph for batches of 6: deviates by" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU replays graphs as it should")
def test_graph_that_replays_something_else_is_noticed(net: RedNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the same operations are right without a graph."""
    replay = CUDAGraph.replay

    def incomplete(graph: CUDAGraph) -> None:
        del graph.operations[200:210]  # some only make views
        replay(graph)

    monkeypatch.setattr(CUDAGraph, "replay", incomplete)
    run = prepare(net, TINY, "cuda", "fp32")
    assert run.backend == "Triton involution, without CUDA graphs"
    assert run.rejected_backends[0].startswith("CUDA graphs: deviates")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU computes the same without a graph")
def test_fault_in_eager_runs_is_noticed(net: RedNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Explained batches, and images of other sizes, run without the graph."""
    healthy = triton_ops.fused

    def faulty(*operands: Any) -> Tensor:
        return healthy(*operands) if is_capturing() else last_group_zero(healthy, *operands)

    monkeypatch.setattr(triton_ops, "fused", faulty)
    run = prepare(net, TINY, "cuda", "fp32")
    assert run.backend == "torch, involution: torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="captures do not fail on a real GPU")
def test_backend_runs_without_graphs_where_they_cannot_be_captured(net: RedNet) -> None:
    """And says so."""

    def refused(*_: object, **__: object) -> object:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "graph", refused)
        run = prepare(net, SMALL, "cuda", "fp16")
        assert run.backend == "Triton involution, without CUDA graphs"
        reason = "operation not permitted when stream is capturing"
        assert run.rejected_backends == (f"CUDA graphs: {reason}", f"kernel generation in the involution: {reason}")
        pixels = photos(3, 96, 96)
        with torch.inference_mode():
            assert_close(run(pixels).logits, net(SMALL.normalise(pixels)), TOLERANCE["cuda"]["fp16"])


def test_network_that_no_backend_computes_right_is_rejected(net: RedNet) -> None:
    """With each backend's reason."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "rednet.model.inference.preparation.TOLERANCE", TOLERANCE | {"cuda": dict.fromkeys(DTYPES, 1e-12)}
        )
        with pytest.raises(SelfCheckError, match=r"CUDA graphs: deviates .*; torch: deviates"):
            prepare(net, SMALL, "cuda", "fp32")


@contextmanager
def timed_by_name(monkeypatch: pytest.MonkeyPatch, generated: float) -> Iterator[None]:
    """On a clock that says how long each backend takes, relative to the one that reads kernels from memory."""
    from rednet.model.inference import preparation
    from rednet.model.inference.cuda.backend import CudaBackend

    now_s = 0.0
    run = CudaBackend.__call__

    def timed(backend: CudaBackend, *operands: Any, **more: Any) -> object:
        nonlocal now_s
        now_s += generated if "generates" in backend.name else 1.0
        return run(backend, *operands, **more)

    with monkeypatch.context() as patch:
        patch.setattr(CudaBackend, "__call__", timed)
        patch.setattr(time, "perf_counter", lambda: now_s)
        patch.setitem(preparation.TIMED_IMAGES, "cuda", 2)  # fewer graphs to capture
        yield


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU has a speed of its own")
@pytest.mark.parametrize(("generated", "is_chosen"), [(0.85, True), (0.95, False), (1.5, False)])
def test_kernels_are_generated_in_the_involution_where_that_is_clearly_faster(
    net: RedNet, monkeypatch: pytest.MonkeyPatch, generated: float, is_chosen: bool
) -> None:
    """In half precision; results are right in either case."""
    with timed_by_name(monkeypatch, generated):
        run = prepare(net, TINY, "cuda", "fp16")
        expected = "Triton involution that generates its kernels" if is_chosen else "Triton involution"
        assert run.backend == f"CUDA graphs, {expected}"
        assert run.rejected_backends == ()
        pixels = photos(3, 64, 64)
        with torch.inference_mode():
            assert_close(run(pixels).logits, net(TINY.normalise(pixels)), TOLERANCE["cuda"]["fp16"])
        assert run(pixels, kernel_sums=[3]).kernel_sums is not None
        assert prepare(net, TINY, "cuda", "fp32").backend == "CUDA graphs, Triton involution"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU has a speed of its own")
@pytest.mark.parametrize("wrong_in", ["fp32", "fp16"])
def test_kernels_that_are_generated_wrong_are_not_used(
    net: RedNet, monkeypatch: pytest.MonkeyPatch, wrong_in: str
) -> None:
    """However fast, also if they are wrong only in float32, which is not served, or only in the served precision."""
    from rednet.model.ops import triton_generated

    healthy = triton_generated.fused

    def faulty(x: Tensor, *more: Any) -> Tensor:
        return last_pixel_zero(healthy, x, *more) if x.dtype == DTYPES[wrong_in] else healthy(x, *more)

    monkeypatch.setattr(triton_generated, "fused", faulty)
    with timed_by_name(monkeypatch, 0.1):
        run = prepare(net, TINY, "cuda", "fp16")
    assert run.backend == "CUDA graphs, Triton involution"
    (reason,) = run.rejected_backends
    assert reason.startswith("kernel generation in the involution: deviates")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU has a capability of its own")
def test_kernels_are_not_generated_in_the_involution_without_tensor_cores(
    net: RedNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those GPUs whose tensor cores Triton uses."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with timed_by_name(monkeypatch, 0.1):
        assert prepare(net, TINY, "cuda", "fp16").backend == "CUDA graphs, Triton involution"
