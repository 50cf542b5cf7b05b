"""Bytes to pixels: the only place that meets hostile images.

What a file claims of itself is checked from its header; pixels are decoded only for what passed.
"""

import asyncio
import io
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from model.preprocess import Preprocess
from service.errors import PayloadTooLarge, ServiceError, UnreadableImage, UnsupportedMediaType
from service.types import Pixels

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # nothing else is ever handed to a decoder
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Our own limit, checked on every image before its pixels are decoded, takes the place of Pillow's, which only warns.
Image.MAX_IMAGE_PIXELS = None


class Decoded(NamedTuple):
    pixels: Pixels
    decode_s: float


def decode_image(data: bytes, preprocess: Preprocess, max_pixels: int) -> Pixels:
    """An encoded photo as the network's uint8 pixels [3, crop, crop].

    Raises:
        UnsupportedMediaType: it is no image, or of a format that is not served.
        PayloadTooLarge: it claims more than max_pixels.
        UnreadableImage: the format is known, the data is broken.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise PayloadTooLarge(
                    f"the image has {image.width}x{image.height} pixels; at most {max_pixels} are allowed"
                )
            return preprocess.pixels(image)
    except ServiceError:
        raise
    except UnidentifiedImageError:
        if data.startswith(SIGNATURES):
            raise UnreadableImage("the image's header is damaged") from None
        raise UnsupportedMediaType(f"not an image; {', '.join(FORMATS)} are served") from None
    except MemoryError:
        raise PayloadTooLarge("the image needs more memory than there is") from None
    except Exception as error:  # Pillow's decoders raise nearly anything for damaged data
        raise UnreadableImage(f"the image is damaged: {str(error)[:100]}") from error


class Decoder:
    """Decodes in threads of its own: never on the event loop, never on the engine's thread.

    Args:
        preprocess: what the network expects.
        max_pixels: width times height, at most.
        threads: how many decode at once.
    """

    def __init__(self, preprocess: Preprocess, max_pixels: int, threads: int) -> None:
        self._preprocess = preprocess
        self._max_pixels = max_pixels
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    async def decode(self, data: bytes) -> Decoded:
        """Decode one image; raises what `decode_image` does. Cancelled before a thread took it up, it never runs."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._timed, data)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _timed(self, data: bytes) -> Decoded:
        started = time.monotonic()
        pixels = decode_image(data, self._preprocess, self._max_pixels)
        return Decoded(pixels, time.monotonic() - started)
