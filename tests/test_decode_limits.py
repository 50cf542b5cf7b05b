"""Limits of decoding, and the estimated cost of images."""

import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rednet.service.decoding.cost import estimate
from rednet.service.decoding.limits import WORST_BYTES_PER_PIXEL, DecodeLimits, max_scanned_pixels, memory_for_decoders
from tests.conftest import EVERY_FORMAT, encoded, photo
from tests.servers import PATIENCE_S, REDNET

GB = 1_000_000_000
SIDE = 2000
MEASURE = """
import sys, rednet.service.decoding.worker
from rednet.model.images.preprocess import Preprocess
from rednet.service.decoding.decode import decode_image
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
data = open(sys.argv[1], "rb").read()
Preprocess(), peak()
before = peak()
decode_image(data, Preprocess(), 50_000_000)
print(peak() - before)
"""


def test_decode_limits_are_proportional_to_max_pixels() -> None:
    """Ten times as many pixels may take ten times the time, scans and memory."""
    usual, large = (DecodeLimits.derive(pixels, 100 * GB, 2) for pixels in (50_000_000, 500_000_000))
    assert (usual.cpu_s, max_scanned_pixels(50_000_000)) == (10.0, GB)
    assert (large.cpu_s, max_scanned_pixels(500_000_000)) == (100.0, 10 * GB)
    assert large.address_space_bytes > 500_000_000 * WORST_BYTES_PER_PIXEL
    assert DecodeLimits.derive(1_000_000, GB, 2).cpu_s == 10.0
    assert DecodeLimits.from_json(json.loads(json.dumps(asdict(usual)))) == usual


@pytest.mark.parametrize(("memory_bytes", "count"), [(GB, 1), (2 * GB, 2), (16 * GB, 16), (2 * GB, 16)])
def test_decoder_limits_add_up_to_the_available_memory(memory_bytes: int, count: int) -> None:
    """The sum covers all processes, all small images at once, and all large ones."""
    limits = DecodeLimits.derive(50_000_000, memory_bytes, count)
    processes = 45_000_000 * (2 * count + 1)
    assert processes + count * limits.small.memory_bytes + limits.large_bytes <= max(memory_bytes, processes * 1.3)


def test_max_pixels_beyond_the_available_memory_is_rejected_at_start() -> None:
    """The message names the option and the largest possible value."""
    pixels = min(2_000_000_000, memory_for_decoders())  # 22 bytes for each pixel; two billion is the option's maximum
    if memory_for_decoders() > 22 * pixels:
        pytest.skip("this machine's memory holds the largest --max-pixels")
    command: list[str] = [str(REDNET), "serve", "--port", "0", "--max-pixels", str(pixels)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode != 0
    assert f"--max-pixels {pixels} is too large: there is memory" in ended.stderr


def _saved(mode: str, file_format: str, **options: object) -> bytes:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE // 8, SIDE // 8, 4), np.uint8), "RGBA")
    content = io.BytesIO()
    noise.resize((SIDE, SIDE)).convert(mode).save(content, file_format, **options)
    return content.getvalue()


def needs(file_format: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(file_format not in EVERY_FORMAT, reason=f"{file_format} is not enabled")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which is absent")
@pytest.mark.parametrize(
    ("mode", "file_format", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
        ("CMYK", "JPEG", {"progressive": True}),
        ("RGBA", "PNG", {}),
        ("1", "PNG", {}),
        ("P", "GIF", {}),
        ("RGB", "BMP", {}),
        ("RGBA", "TIFF", {"compression": "tiff_lzw"}),
        ("F", "TIFF", {}),
        ("RGBA", "WEBP", {"lossless": True, "method": 0}),
        pytest.param("RGBA", "AVIF", {"speed": 10, "subsampling": "4:4:4"}, marks=needs("AVIF")),
        pytest.param("RGB", "HEIF", {"quality": 30}, marks=needs("HEIF")),
    ],
)
def test_decoding_takes_no_more_memory_than_estimated(
    tmp_path: Path, mode: str, file_format: str, options: dict[str, object]
) -> None:
    """For four million pixels in every format, beyond what the process takes."""
    data = _saved(mode, file_format, **options)
    file = tmp_path / "photo"
    file.write_bytes(data)
    measured = int(subprocess.check_output([sys.executable, "-c", MEASURE, file]))
    with Image.open(io.BytesIO(data)) as image:
        assert measured <= estimate(image, data, 512).memory_bytes + 8_000_000


def test_everyday_photos_are_estimated_as_small() -> None:
    """A phone's JPEG with 24 million pixels is small, because it is decoded at an eighth of its size. A PNG with as
    many pixels is large."""
    small = DecodeLimits.derive(50_000_000, 4 * GB, 2).small
    for width, file_format, expected in ((600, "PNG", True), (6000, "JPEG", True), (7000, "PNG", False)):
        data = encoded(Image.new("RGB", (width, width * 2 // 3)), file_format)
        with Image.open(io.BytesIO(data)) as image:
            cost = estimate(image, data, 512)
        assert (cost.cpu_s <= small.cpu_s and cost.memory_bytes <= small.memory_bytes) is expected


def test_jpeg_with_separate_scans_is_estimated_as_progressive() -> None:
    """Its decoder keeps all coefficients, too. An unclear header is estimated as progressive."""
    data = encoded(photo(width=2000, height=1000), "JPEG")
    scan = data.rindex(b"\xff\xda")
    separate = data[: scan + 4] + b"\x01" + data[scan + 5 :]
    with Image.open(io.BytesIO(data)) as image:
        costs = [estimate(image, each, 512).memory_bytes for each in (data, separate, data[:100])]
    assert costs[0] < costs[1] == costs[2]
