"""What many tests need: photos, a small checkpoint, and a server."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import Checkpoint, Preprocess, create_rednet, save_checkpoint
from model.labels import Label
from tests.servers import ServerProcess


def photo(seed: int = 0, width: int = 90, height: int = 70) -> Image.Image:
    """A smooth random picture: neighbouring pixels are related, as in photos."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """The image as a file of that format."""
    content = io.BytesIO()
    image.save(content, file_format, **options)
    return content.getvalue()


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a narrow RedNet-26 with random weights and five classes, for 64x64 pixels."""
    torch.manual_seed(0)
    net = create_rednet("rednet26", num_classes=5, base_channels=16, stem_channels=32).eval()
    for parameter in net.parameters():  # fresh networks have blocks that do nothing and logits near zero
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
    labels = [Label(f"n{index}", f"thing {index}") for index in range(5)]
    path = tmp_path_factory.mktemp("checkpoints") / "tiny.safetensors"
    save_checkpoint(path, Checkpoint(net=net, labels=labels, preprocess=Preprocess(resize=72, crop=64), name="tiny"))
    return path


@pytest.fixture(scope="session")
def server(tiny_path: Path) -> Iterator[ServerProcess]:
    """A real `rednet serve` with the tiny checkpoint, shared by all tests that leave it as it was."""
    with ServerProcess("--checkpoint", tiny_path) as running:
        yield running
