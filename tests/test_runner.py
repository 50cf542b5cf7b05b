"""The runner, which hides the device behind NumPy arrays."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rednet import Preprocess, load_checkpoint, prepare
from rednet.model.inference.backend import Output, Stages
from rednet.model.inference.preparation import Prepared
from rednet.service.engine.runner import PreparedRunner
from tests.test_preparation import CUDA, photos

SQUARE = Preprocess(resize=72, crop=64)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_overlapping_batches_get_their_own_results(tiny_path: Path, device: str) -> None:
    """In whatever order they are awaited, although buffers are reused."""
    prepared = prepare(load_checkpoint(tiny_path).net, SQUARE, device, "fp32")
    runner = PreparedRunner(prepared, max_batch_size=8)
    assert max(runner.warm_up(lambda _: None).seconds) == 8
    batches = [photos(size, 64, 64) + size for size in (1, 5, 8, 3, 8, 2)]
    launched = [runner.launch(list(batch.numpy())) for batch in batches]
    for batch, running in reversed(list(zip(batches, launched, strict=True))):
        logits, features, _ = running.wait()
        assert running.done()
        expected = prepared(batch)
        np.testing.assert_allclose(logits, expected.logits.cpu().numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(features, expected.features.cpu().numpy(), rtol=1e-4, atol=1e-4)


def test_out_of_memory_is_raised_as_memory_error() -> None:
    """Torch's error is converted to Python's, which the engine handles."""

    class Full:
        name = "full"

        def __call__(self, pixels: torch.Tensor, stages: Stages = (), kernel_sums: Stages = ()) -> Output:
            raise torch.OutOfMemoryError

    runner = PreparedRunner(
        Prepared(Full(), SQUARE, torch.empty(0), torch.device("cpu"), "fp32", 0.0), max_batch_size=8
    )
    with pytest.raises(MemoryError, match="more memory"):
        runner.launch([np.zeros((3, 64, 64), np.uint8)] * 3)
