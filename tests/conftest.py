"""What many tests need: photos, a small checkpoint, and a server."""

import io
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rednet import Checkpoint, Preprocess, RedNet, create_rednet, save_checkpoint
from rednet.model.images.iso_media import enabled_formats, load_decoder
from rednet.model.images.opening import FORMATS
from rednet.model.io.labels import Label
from rednet.model.native import int8_unavailable

if TYPE_CHECKING:
    from tests.servers import ServerProcess  # needs the server's packages, which tests of the network do without

# What this installation reads and can write: everything, with pillow-heif.
EVERY_FORMAT = (*FORMATS, *map(load_decoder, enabled_formats()))
needs_int8 = pytest.mark.skipif(int8_unavailable() is not None, reason=str(int8_unavailable()))


def photo(seed: int = 0, width: int = 90, height: int = 70) -> Image.Image:
    """A smooth random picture: neighbouring pixels are related, as in photos."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """The image as a file of that format."""
    content = io.BytesIO()
    image.save(content, file_format, **options)
    return content.getvalue()


def lively(net: RedNet) -> RedNet:
    """Give it random weights, and the batch norms that fit them: as after training, answers differ from photo to photo,
    and layers neither die nor explode."""
    torch.manual_seed(0)
    norms = {name: module for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
        if name.endswith("conv2.conv.weight"):  # kernels that grow with what they multiply square it, layer by layer
            parameter.data.mul_(0.01)
    for name, norm in norms.items():
        nn.init.normal_(norm.weight, 0.2 if name.endswith("bn3") else 1, 0.1)
        norm.momentum = 1.0
    smooth = torch.stack([torch.from_numpy(np.array(photo(seed, 64, 64))).permute(2, 0, 1) for seed in range(4)])
    noise = torch.randint(0, 256, smooth.shape, dtype=torch.uint8)
    with torch.no_grad():
        net.train()(Preprocess().normalise(torch.cat([smooth, noise])))
    for norm in norms.values():
        norm.momentum = 0.1
    return net.eval()


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a narrow RedNet-26 with random weights and five classes, for 64x64 pixels."""
    net = lively(create_rednet("rednet26", num_classes=5, base_channels=16, stem_channels=32))
    labels = [Label(f"n{index}", f"thing {index}") for index in range(5)]
    path = tmp_path_factory.mktemp("checkpoints") / "tiny.safetensors"
    save_checkpoint(path, Checkpoint(net=net, labels=labels, preprocess=Preprocess(resize=72, crop=64), name="tiny"))
    return path


@pytest.fixture(scope="session")
def server(tiny_path: Path) -> Iterator["ServerProcess"]:
    """A real `rednet serve` with the tiny checkpoint, shared by all tests that leave it as it was."""
    from tests.servers import ServerProcess

    with ServerProcess("--checkpoint", tiny_path) as running:
        yield running


def pytest_addoption(parser: pytest.Parser) -> None:
    if not find_spec("pytest_timeout"):  # on a machine for GPU tests; strict configuration rejects unknown names
        parser.addini("timeout", "of pytest-timeout, which is not installed")


def pytest_configure(config: pytest.Config) -> None:
    if not find_spec("pytest_timeout"):
        config.addinivalue_line("markers", "timeout: of pytest-timeout, which is not installed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.markexpr == "not slow":
        terminalreporter.write_line("slow tests were left out; `make test-slow` runs them")
