"""The CUDA backend, which replays CUDA graphs, on a made-up GPU if there is none."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rednet import RedNet, load_checkpoint, prepare
from rednet.model.images.preprocess import Preprocess
from rednet.model.inference import preparation
from rednet.model.inference.cuda.conv_fallback import ConvFallback
from tests.fake_cuda import fake_cuda
from tests.test_preparation import assert_close, photos

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="no Triton here")

SQUARE = Preprocess(resize=72, crop=64)
IS_REAL = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with nullcontext() if IS_REAL else fake_cuda():
        yield


@pytest.fixture
def net(tiny_path: Path) -> RedNet:
    return load_checkpoint(tiny_path).net


@pytest.fixture(scope="module")
def trained() -> RedNet:
    """For half precision: random weights amplify rounding beyond the limits of the self-check."""
    return load_checkpoint().net


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The captured batch sizes, in order."""
    from rednet.model.inference.cuda.backend import CudaBackend

    sizes: list[int] = []
    capture = CudaBackend._capture

    def counted(backend: CudaBackend, size: int) -> object:
        sizes.append(size)
        return capture(backend, size)

    monkeypatch.setattr(CudaBackend, "_capture", counted)
    return sizes


def test_cuda_graphs_match_the_network(net: RedNet) -> None:
    """For every batch size up to 7, with input on the CPU and on the GPU. The next batch does not overwrite
    results."""
    run = prepare(net, SQUARE, "cuda", "fp32")
    assert run.backend == "CUDA graphs, Triton involution"
    pixels = photos(7, 64, 64)
    with torch.inference_mode():
        logits = net(SQUARE.normalise(pixels))
    for batch in range(1, 8):
        first = run(pixels[:batch])
        run(pixels[:batch].flip(0).to("cuda"))
        assert_close(first.logits, logits[:batch], 1e-5)


def test_no_graph_is_captured_after_the_largest_batch(net: RedNet, captures: list[int]) -> None:
    """A new batch size uses an existing graph; other image sizes run without a graph."""
    run = prepare(net, SQUARE, "cuda", "fp32")
    run(photos(12, 64, 64))
    captured = len(captures)
    assert sorted(captures) == [1, 2, 3, 4, 6, 8, 12]
    for batch in range(1, 13):
        run(photos(batch, 64, 64))
    run(photos(3, 40, 56))
    run(photos(3, 64, 64), stages=True, kernel_sums=True)
    run(SQUARE.normalise(photos(3, 64, 64)))
    assert len(captures) == captured


def test_batches_run_in_parts_when_memory_is_exhausted(net: RedNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether torch reports it, or the driver during a capture. Results are right."""
    from rednet.model.inference.cuda.network import TritonRedNet

    run = prepare(net, SQUARE, "cuda", "fp32")
    forward = TritonRedNet.__call__

    def limited(network: TritonRedNet, pixels: Tensor) -> object:
        if len(pixels) > 8:
            raise torch.OutOfMemoryError
        if len(pixels) > 4:
            raise RuntimeError("CUDNN_STATUS_ALLOC_FAILED")
        return forward(network, pixels)

    monkeypatch.setattr(TritonRedNet, "__call__", limited)
    pixels = photos(11, 64, 64)
    with torch.inference_mode():
        assert_close(run(pixels).logits, net(SQUARE.normalise(pixels)), 1e-5)


def test_float32_convolutions_ignore_the_tf32_setting(net: RedNet) -> None:
    """Convolutions use IEEE float32 whatever the process has set, and the setting is unchanged."""
    torch.backends.cudnn.allow_tf32 = True
    run = prepare(net, SQUARE, "cuda", "fp32")
    assert run.max_relative_error < 1e-5
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.gpu
@pytest.mark.skipif(not IS_REAL, reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_results_do_not_depend_on_earlier_memory_contents(trained: RedNet, precision: str) -> None:
    """A convolution that multiplies its uninitialised output by zero would keep a NaN that is in that memory."""
    pixels = photos(5, 64, 64)
    expected = prepare(trained, SQUARE, "cuda", precision)(pixels).logits
    torch.cuda.empty_cache()
    torch.full((1 << 28,), torch.nan, device="cuda")  # freed again immediately
    run = prepare(trained, SQUARE, "cuda", precision)
    for stages in (False, True):
        torch.testing.assert_close(run(pixels, stages=stages).logits, expected)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_nan_appears_in_the_result_of_its_image_only(
    trained: RedNet, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No ReLU on the way turns it into zero."""
    monkeypatch.setitem(preparation.TIMED_IMAGES, "cuda", 2)  # fewer graphs to capture
    x = SQUARE.normalise(photos(3, 64, 64))
    x[1, :, 20:30, 20:30] = torch.nan
    logits = prepare(trained, SQUARE, "cuda", precision)(x).logits
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()


def test_nan_appears_where_the_fused_relu_would_drop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS describes its ReLU as max(x, 0). If that is 0 for NaN, the ReLU is computed apart."""
    from rednet.model.inference.cuda.network import _fused_relu_keeps_nan, _Maker

    fused = torch._addmm_activation
    monkeypatch.setattr(torch, "_addmm_activation", lambda *operands: fused(*operands).nan_to_num(0.0))
    keeps_nan = _fused_relu_keeps_nan(torch.device("cuda"), torch.float32)
    convolution = torch.nn.Conv2d(16, 32, 1).requires_grad_(False).to("cuda")
    pointwise = _Maker(torch.float32, ConvFallback(), keeps_nan, fuse_generation=False).pointwise(convolution)
    x = torch.randn(2, 16, 3, 5, device="cuda") if IS_REAL else torch.randn(2, 16, 3, 5)
    x[1] = torch.nan
    out = pointwise(x)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[0], convolution(x)[0].relu())
