"""The network with fused Triton operators, in Triton's interpreter if there is no GPU."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no Triton here")

from rednet import create_rednet, load_checkpoint
from rednet.model.images.preprocess import Preprocess
from rednet.model.inference.cuda.network import TritonRedNet
from tests.conftest import lively
from tests.test_preparation import assert_close, photos
from tests.triton_interpreter import bfloat16_products

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("fuse_generation", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 0.1)])
def test_triton_network_matches_the_network(dtype: torch.dtype, tolerance: float, fuse_generation: bool) -> None:
    """Logits, features, stage maps and kernel sums, for odd sizes, from uint8 and from normalised pixels."""
    net = lively(create_rednet("rednet26", num_classes=5, base_channels=16, stem_channels=32, kernel_size=3))
    preprocess = Preprocess(mean=(0.5, 0.4, 0.3))
    network = TritonRedNet(net, preprocess, DEVICE, dtype, fuse_generation)
    pixels = photos(2, 35, 50)
    x = preprocess.normalise(pixels)
    kernels = []
    for stage in range(4):
        generator = net.backbone.get_submodule(f"layer{stage + 1}")[-1].conv2.conv2  # type: ignore[index]
        generator.register_forward_hook(lambda _, __, out: kernels.append(out))
    with torch.inference_mode(), bfloat16_products():
        stages = net.stages(x)
        features = stages[-1].mean(dim=(2, 3))
        both = dtype == torch.float32 and not fuse_generation  # the interpreter is slow
        for given in (pixels, x) if both else (pixels,):
            ours_logits, ours_features, ours_stages, ours_sums = network(given.to(DEVICE))
            assert_close(ours_logits, net.head(features), tolerance)
            assert_close(ours_features, features, tolerance)
            for ours, exact in zip(ours_stages, stages, strict=True):
                assert_close(ours.float(), exact, tolerance)
            for ours, kernel in zip(map(ours_sums, range(4)), kernels, strict=True):
                assert_close(ours.float(), kernel.unflatten(1, (-1, 9)).sum(dim=2), tolerance)


def test_cuda_backend_pads_batches_of_other_image_sizes() -> None:
    """Batches are padded to sizes for which cuDNN has plans, and the padding is removed from the results."""
    from rednet.model.inference.cuda.backend import CudaBackend

    sizes: list[int] = []

    def network(pixels: Tensor) -> object:
        sizes.append(len(pixels))
        each = pixels.float()
        return each, each, (each,), lambda stage: each + stage

    backend = CudaBackend.__new__(CudaBackend)  # skips the constructor, which needs a GPU
    backend._device, backend._precision, backend._network = torch.device("cpu"), nullcontext, network  # type: ignore[assignment]
    pixels = photos(11, 4, 4)
    for batch in range(12):
        logits, features, maps, sums = backend._run_eagerly(pixels[:batch], [0], [2])
        assert maps is not None
        assert sums is not None
        for output in (logits, features, maps[0], sums[0] - 2):
            assert torch.equal(output, pixels[:batch].float())
    assert sizes == [0, 1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12]


def test_triton_network_with_an_empty_batch(tiny_path: Path) -> None:
    """Results have the usual shapes."""
    network = TritonRedNet(load_checkpoint(tiny_path).net, Preprocess(), DEVICE, torch.float32)
    with torch.inference_mode():
        logits, features, maps, kernel_sums = network(photos(0, 64, 64).to(DEVICE))
    assert (len(logits), len(features), maps[3].shape[0], kernel_sums(3).shape[0]) == (0, 0, 0, 0)
    assert logits.shape[1] == 5
