"""The CUDA backend, which replays CUDA graphs; all tests need a GPU."""

from pathlib import Path

import pytest
import torch

from rednet import RedNet, load_checkpoint, prepare
from rednet.model.images.preprocess import Preprocess
from tests.test_preparation import assert_close, photos

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
SQUARE = Preprocess(resize=72, crop=64)


@pytest.fixture
def net(tiny_path: Path) -> RedNet:
    return load_checkpoint(tiny_path).net


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
    """For every batch size up to 20, with input on the CPU and on the GPU. The next batch does not overwrite
    results."""
    run = prepare(net, SQUARE, "cuda", "fp32")
    assert run.backend == "CUDA graphs, Triton involution"
    pixels = photos(20, 64, 64)
    with torch.inference_mode():
        logits = net(SQUARE.normalise(pixels))
    for batch in range(1, 21):
        first = run(pixels[:batch])
        run(pixels[:batch].flip(0).cuda())
        assert_close(first.logits, logits[:batch], 1e-5)


def test_no_graph_is_captured_after_the_largest_batch(net: RedNet, captures: list[int]) -> None:
    """A new batch size uses an existing graph; other image sizes run without a graph."""
    run = prepare(net, SQUARE, "cuda", "fp16")
    run(photos(48, 64, 64))
    captured = len(captures)
    for batch in range(1, 49):
        run(photos(batch, 64, 64))
    run(photos(3, 40, 56))
    run(photos(3, 64, 64), stages=True, kernel_sums=True)
    assert len(captures) == captured


def test_float32_convolutions_ignore_the_tf32_setting(net: RedNet) -> None:
    """Convolutions use IEEE float32 whatever the process has set, and the setting is unchanged."""
    torch.backends.cudnn.allow_tf32 = True
    run = prepare(net, SQUARE, "cuda", "fp32")
    assert run.max_relative_error < 1e-5
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_results_do_not_depend_on_earlier_memory_contents(net: RedNet, precision: str) -> None:
    """A convolution that multiplies its uninitialised output by zero would keep a NaN that is in that memory."""
    pixels = photos(5, 64, 64)
    expected = prepare(net, SQUARE, "cuda", precision)(pixels).logits
    torch.cuda.empty_cache()
    torch.full((1 << 28,), torch.nan, device="cuda")  # freed again immediately
    run = prepare(net, SQUARE, "cuda", precision)
    for stages in (False, True):
        torch.testing.assert_close(run(pixels, stages=stages).logits, expected)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_nan_appears_in_the_result_of_its_image_only(net: RedNet, precision: str) -> None:
    """No ReLU on the way turns it into zero."""
    x = SQUARE.normalise(photos(3, 64, 64))
    x[1, :, 20:30, 20:30] = torch.nan
    logits = prepare(net, SQUARE, "cuda", precision)(x).logits
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()
