"""Batches replayed from CUDA graphs; all of it needs a card."""

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
    """The sizes that were captured, in order."""
    from rednet.model.inference.cuda.backend import CudaBackend

    sizes: list[int] = []
    capture = CudaBackend._capture

    def counted(form: CudaBackend, size: int) -> object:
        sizes.append(size)
        return capture(form, size)

    monkeypatch.setattr(CudaBackend, "_capture", counted)
    return sizes


def test_graphs_answer_like_the_plain_network(net: RedNet) -> None:
    """Every batch size up to 20, from memory of the host and of the device, and answers outlive the next batch."""
    run = prepare(net, SQUARE, "cuda", "fp32")
    assert run.backend == "CUDA graphs, Triton involution"
    pixels = photos(20, 64, 64)
    with torch.inference_mode():
        logits = net(SQUARE.normalise(pixels))
    for batch in range(1, 21):
        first = run(pixels[:batch])
        run(pixels[:batch].flip(0).cuda())
        assert_close(first.logits, logits[:batch], 1e-5)


def test_no_size_is_captured_after_the_largest(net: RedNet, captures: list[int]) -> None:
    """A batch size never seen before finds its graph ready; photos of other sizes run without one."""
    run = prepare(net, SQUARE, "cuda", "fp16")
    run(photos(48, 64, 64))
    captured = len(captures)
    for batch in range(1, 49):
        run(photos(batch, 64, 64))
    run(photos(3, 40, 56))
    run(photos(3, 64, 64), stages=True, kernel_sums=True)
    assert len(captures) == captured


def test_float32_is_not_cut(net: RedNet) -> None:
    """Convolutions are exact whatever the process has set, and leave the setting as it is."""
    torch.backends.cudnn.allow_tf32 = True
    run = prepare(net, SQUARE, "cuda", "fp32")
    assert run.max_relative_error < 1e-5
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_nothing_shows_that_memory_held_before(net: RedNet, precision: str) -> None:
    """A convolution that multiplies what lies in its output by zero would make NaNs of NaNs."""
    pixels = photos(5, 64, 64)
    expected = prepare(net, SQUARE, "cuda", precision)(pixels).logits
    torch.cuda.empty_cache()
    torch.full((1 << 28,), torch.nan, device="cuda")  # and free again
    run = prepare(net, SQUARE, "cuda", precision)
    for wish in (False, True):
        torch.testing.assert_close(run(pixels, stages=wish).logits, expected)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_what_is_not_a_number_shows(net: RedNet, precision: str) -> None:
    """In the answer of its image, and of no other: no ReLU on the way makes a zero of it."""
    x = SQUARE.normalise(photos(3, 64, 64))
    x[1, :, 20:30, 20:30] = torch.nan
    logits = prepare(net, SQUARE, "cuda", precision)(x).logits
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()
