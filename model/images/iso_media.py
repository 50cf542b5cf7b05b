"""AVIF and HEIC: containers of the ISO base media file format (ISO/IEC 14496-12) around frames of a video codec.

Not every installation can decode them: AVIF takes a build of Pillow that has it, and HEIC takes pillow-heif.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from PIL import AvifImagePlugin

# Brands, at byte 8 and from byte 16 on, and their formats.
BRANDS = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"heim": "HEIC",
    b"heis": "HEIC",
    b"hevc": "HEIC",
    b"hevx": "HEIC",
    b"mif1": "HEIF",
    b"msf1": "HEIF",
    b"jxl ": "JPEG XL",
    b"jp2 ": "JPEG 2000",
    b"jpx ": "JPEG 2000",
    b"crx ": "camera raw (CR3)",
    b"qt  ": "QuickTime video",
}
MAX_HEAD_BYTES = 64  # that hold all brands of photos


class _Decoder(NamedTuple):
    pillow_name: str  # of the format
    module: str
    remedy: str


DECODERS = {
    "AVIF": _Decoder("AVIF", "PIL._avif", "install a build of Pillow with AVIF"),
    "HEIC": _Decoder("HEIF", "pillow_heif", "install rednet-serve[heif]"),
}


def media_format(data: bytes) -> str | None:
    """Return the name of the format of a container; None: data is not one."""
    if data[4:8] != b"ftyp":
        return None
    end = min(len(data), MAX_HEAD_BYTES, int.from_bytes(data[:4], "big"))
    compatible = [data[at : at + 4] for at in range(16, end, 4)]
    known = [BRANDS[brand] for brand in (data[8:12], *compatible) if brand in BRANDS]
    # "mif1" means only HEIF; a later brand may name the codec.
    return next((name for name in known if name != "HEIF"), known[0] if known else "MP4 video")


@lru_cache
def enabled_formats() -> Sequence[str]:
    """Return the names of the formats that this installation can decode."""
    return [name for name, decoder in DECODERS.items() if find_spec(decoder.module)]


def decoders_of(name: str) -> Sequence[str]:
    """Return the decoders of a format, best first. HEIF alone leaves the codec open."""
    return tuple(DECODERS) if name == "HEIF" else [name] if name in DECODERS else []


def load_decoder(name: str) -> str:
    """Load the decoder of an enabled format; returns Pillow's name of the format.

    Decoders run in one thread: there is a process for each core.
    """
    if name == "AVIF":
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    else:
        # A thumbnail would be decoded in place of the photo, and other parts would take time.
        options = {"thumbnails": False, "depth_images": False, "aux_images": False, "decode_threads": 1}
        import_module("pillow_heif").register_heif_opener(**options)
    return DECODERS[name].pillow_name
