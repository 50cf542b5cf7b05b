"""What an image will take to decode, from its header. Estimates are high: on the safe side for nearly every file."""

from PIL.JpegImagePlugin import JpegImageFile

from rednet.model.images.opening import Header
from rednet.model.images.tiff import Layout
from rednet.service.decoding.limits import WORST_BYTES_PER_PIXEL, Cost

# Seconds for a pixel, measured on one core of an EPYC at 2.4 GHz with photos full of detail, and bytes for a pixel at
# the peak. PNG takes 8 to 70 ns, WebP 23 to 55, TIFF 6 to 33, GIF 20, BMP 11. RGBA becomes RGB over a second picture.
S_PER_PIXEL = 4e-8
BYTES_PER_PIXEL = 16
JPEG_S_PER_PIXEL = 4e-9  # all are read, few are made
JPEG_S_PER_PIXEL_MADE = 2e-8
JPEG_BYTES_PER_PIXEL = 12  # of those that are made
# A JPEG in several scans keeps the coefficients of the whole image until the last one.
SCANS_S_PER_PIXEL = 2e-8
COEFFICIENT_BYTES = 8


FILE_COPIES = 2  # of the whole file, that decoders make
MOST_SEGMENTS = 1000  # that are looked at in front of a JPEG's first scan


def estimate(image: Header, data: bytes | memoryview, shortest: int) -> Cost:
    """What the image takes that was opened and not yet decoded.

    Args:
        image: of one of the served formats.
        data: the file that it was opened from.
        shortest: the short side that is needed, in pixels; a JPEG is decoded at 1/2, 1/4 or 1/8 where that suffices.
    """
    pixels = image.width * image.height
    if isinstance(image, JpegImageFile):
        scale = next((d for d in (8, 4, 2) if min(image.size) >= d * shortest), 1)
        made = pixels // scale**2
        if _has_several_scans(data, image.layers):
            return Cost(SCANS_S_PER_PIXEL * pixels, COEFFICIENT_BYTES * pixels + JPEG_BYTES_PER_PIXEL * made)
        return Cost(JPEG_S_PER_PIXEL * pixels + JPEG_S_PER_PIXEL_MADE * made, JPEG_BYTES_PER_PIXEL * made)
    per_pixel = WORST_BYTES_PER_PIXEL if image.format == "WEBP" else BYTES_PER_PIXEL
    if isinstance(image, Layout):
        per_pixel = max(per_pixel, image.bytes_per_pixel)
    return Cost(S_PER_PIXEL * pixels, per_pixel * pixels + FILE_COPIES * len(data))


def _has_several_scans(jpeg: bytes | memoryview, components: int) -> bool:
    """Whether a JPEG is progressive, or its first scan holds only some of its components; True if that is not clear."""
    position = 2
    for _ in range(MOST_SEGMENTS):
        marker, length = jpeg[position : position + 2], jpeg[position + 2 : position + 4]
        if len(length) < 2 or marker[0] != 0xFF or marker[1] in {0xC2, 0xC6, 0xCA, 0xCE}:  # progressive
            return True
        if marker[1] == 0xDA:  # start of scan
            return jpeg[position + 4] < components
        position += 2 + int.from_bytes(length)
    return True
