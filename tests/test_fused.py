"""The network on the Triton kernels, fused; in Triton's interpreter where there is no card."""

from pathlib import Path

import pytest
import torch

from model import load_checkpoint
from model.preprocess import Preprocess
from tests.test_prepare import assert_close, photos

fused = pytest.importorskip("model.fused", reason="no Triton here", exc_type=ImportError)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 0.1)])
def test_it_answers_like_the_plain_network(tiny_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    """Logits, features, stage maps and kernel sums, for odd sizes, from bytes and from normalised floats."""
    net, preprocess = load_checkpoint(tiny_path).net, Preprocess(mean=(0.5, 0.4, 0.3))
    network = fused.Fused(net, preprocess, DEVICE, dtype)
    pixels = photos(2, 35, 50)
    x = preprocess.normalise(pixels)
    kernels = []
    for stage in range(4):
        generator = net.backbone.get_submodule(f"layer{stage + 1}")[-1].conv2.conv2  # type: ignore[index]
        generator.register_forward_hook(lambda _, __, out: kernels.append(out))
    with torch.inference_mode():
        stages = net.stages(x)
        features = stages[-1].mean(dim=(2, 3))
        for given in (pixels, x):
            ours_logits, ours_features, ours_stages, ours_sums = network(given.to(DEVICE))
            assert_close(ours_logits, net.head(features), tolerance)
            assert_close(ours_features, features, tolerance)
            for ours, exact in zip(ours_stages, stages, strict=True):
                assert_close(ours.float(), exact, tolerance)
            for ours, kernel in zip(map(ours_sums, range(4)), kernels, strict=True):
                assert_close(ours.float(), kernel.unflatten(1, (-1, 49)).sum(dim=2), tolerance)
