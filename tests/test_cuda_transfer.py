"""Batches on their way to a GPU and back, on a made-up one: what was not waited for has not arrived."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rednet import load_checkpoint, prepare
from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.preparation import Prepared
from rednet.service.engine.runner import PreparedRunner
from rednet.service.engine.transfer import CudaTransfer
from rednet.service.types import ClassActivation, DeviceLost
from tests.fake_cuda import Event, fake_cuda
from tests.test_preparation import photos

pytest.importorskip("triton", reason="no Triton here")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU here: see test_runner.py"),
]

SQUARE = Preprocess(resize=72, crop=64)


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with fake_cuda():
        yield


@pytest.fixture
def prepared(tiny_path: Path) -> Prepared:
    return prepare(load_checkpoint(tiny_path).net, SQUARE, "cuda", "fp32")


def test_overlapping_batches_get_their_own_results(prepared: Prepared) -> None:
    """In whatever order they are awaited, and none is done at once."""
    runner = PreparedRunner(prepared, max_batch_size=4)
    batches = [photos(size, 64, 64) + size for size in (1, 4, 3)]
    launched = [runner.launch(list(batch.numpy()), {0: ClassActivation()}) for batch in batches]
    assert not launched[-1].done()
    for batch, running in reversed(list(zip(batches, launched, strict=True))):
        logits, features, grids = running.wait()
        assert running.done()
        expected = prepared(batch, stages=[3])
        np.testing.assert_allclose(logits, expected.logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(features, expected.features, rtol=1e-4, atol=1e-4)
        assert expected.stages is not None
        weight = prepared.head[expected.logits[0].argmax()]
        grid = torch.einsum("chw,c->hw", expected.stages[0][0], weight)
        np.testing.assert_allclose(grids[0], grid, rtol=1e-4, atol=1e-4)


def test_upload_is_held_until_its_batch_has_run(prepared: Prepared) -> None:
    """Its memory belongs to the stream of uploads, which would give it to the next upload."""
    uploads: list[weakref.ref[torch.Tensor]] = []

    class Watched(CudaTransfer):
        def upload(self, pixels: object) -> torch.Tensor:
            uploaded = super().upload(pixels)  # type: ignore[arg-type]
            uploads.append(weakref.ref(uploaded))
            return uploaded

    runner = PreparedRunner(prepared, max_batch_size=4)
    runner._transfer = Watched(prepared.device)
    running = runner.launch(list(photos(2, 64, 64).numpy()))
    gc.collect()
    assert uploads[0]() is not None
    running.wait()
    del running
    gc.collect()
    assert uploads[0]() is None


def test_waiting_for_a_batch_does_not_spin(prepared: Prepared) -> None:
    """Front ends and decoders need the core."""
    running = PreparedRunner(prepared, max_batch_size=4).launch(list(photos(2, 64, 64).numpy()))
    assert running.arrived.blocking  # type: ignore[attr-defined]


def test_lost_device_is_reported_where_a_batch_is_awaited(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine ends the process on it."""
    running = PreparedRunner(prepared, max_batch_size=4).launch(list(photos(2, 64, 64).numpy()))
    for name in ("query", "synchronize"):
        monkeypatch.setattr(Event, name, lambda _: (_ for _ in ()).throw(torch.AcceleratorError("lost")))
    with pytest.raises(DeviceLost):
        running.done()
    with pytest.raises(DeviceLost):
        running.wait()


def test_warm_up_runs_explained_batches_of_every_bucket(prepared: Prepared) -> None:
    """They run without a graph, so that cuDNN would plan convolutions during the first request of each size."""
    eager: list[int] = []
    backend = prepared.implementation
    run_eagerly = backend._run_eagerly  # type: ignore[attr-defined]

    def recorded(pixels: torch.Tensor, *more: object) -> object:
        eager.append(len(pixels))
        return run_eagerly(pixels, *more)

    backend._run_eagerly = recorded  # type: ignore[attr-defined]
    costs = PreparedRunner(prepared, max_batch_size=7).warm_up(lambda _: None)
    assert list(costs.seconds) == [1, 2, 4, 7]
    assert eager == [1, 2, 3, 4, 6, 7]
