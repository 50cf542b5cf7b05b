"""`docs/reference/image-formats.md`, checked against the code that reads images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from rednet.model.images.iso_media import BRANDS, DECODERS
from rednet.model.images.opening import FORMATS, open_photo
from rednet.model.images.rgb import upright_rgb
from rednet.model.images.signatures import PREFIXES, TEXT
from rednet.model.images.tiff import COMPRESSION_NAMES
from tests.conftest import EVERY_FORMAT, encoded, photo

DOCS = (Path(__file__).parent.parent / "docs/reference/image-formats.md").read_text()
NAMES = {name for _, name in (*PREFIXES, *TEXT)} | set(BRANDS.values()) - {*DECODERS, "HEIF"} | {"MP4 video"}


def pixels(data: bytes) -> Image.Image:
    with open_photo(data) as image:
        return upright_rgb(image)


def test_docs_have_a_row_for_every_format_that_is_read() -> None:
    """There are no other rows."""
    section = DOCS.split("## What is read\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")]
    assert [row.upper() for row in rows[1:]] == [*FORMATS, *DECODERS]


def test_docs_list_every_format_that_is_recognised() -> None:
    """By the name that the error message uses, and no others."""
    paragraph = " ".join(DOCS.split("to convert the image to JPEG or PNG:\n\n")[1].split("\n\n")[0].split())
    assert set(paragraph.rstrip(".").split(", ")) == NAMES


def test_docs_list_every_tiff_compression_that_is_rejected() -> None:
    """They are in the TIFF table's row on compression."""
    (row,) = (line for line in DOCS.splitlines() if line.startswith("| compression |"))
    assert not {name for name in COMPRESSION_NAMES.values() if name not in row.split("|")[3]}


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits", "lzma", "zstd"])
def test_tiff_compression_of_the_docs_is_read(compression: str) -> None:
    """The pixels are those of the photo, except for losses of JPEG."""
    difference = np.abs(np.asarray(pixels(encoded(photo(), "TIFF", compression=compression))).astype(int) - photo())
    assert difference.mean() <= (4 if compression == "jpeg" else 0)


@pytest.mark.parametrize("file_format", [each for each in EVERY_FORMAT if each not in ("GIF", "BMP")])
def test_colour_profile_is_ignored(file_format: str) -> None:
    """A profile that would change every colour has no effect."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    with_profile = pixels(encoded(photo(), file_format, icc_profile=profile))
    assert with_profile.info["icc_profile"] == profile
    assert with_profile.tobytes() == pixels(encoded(photo(), file_format)).tobytes()
