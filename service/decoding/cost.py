"""Estimates the decode time and memory of an image from its header. Estimates are high, so that nearly all are safe."""

from PIL.JpegImagePlugin import JpegImageFile

from rednet.model.images.opening import Header
from rednet.model.images.tiff import Layout
from rednet.service.decoding.limits import WORST_BYTES_PER_PIXEL, Cost

# Seconds per pixel, measured on one core of an EPYC at 2.4 GHz with detailed photos, and peak bytes per pixel.
# PNG takes 8 to 70 ns, WebP 23 to 55, TIFF 6 to 33, GIF 20, BMP 11. Converting RGBA to RGB needs a second image.
S_PER_PIXEL = 4e-8
BYTES_PER_PIXEL = 16
JPEG_S_PER_PIXEL = 4e-9  # entropy decoding, of all pixels in the file
JPEG_S_PER_OUTPUT_PIXEL = 2e-8  # after scaling in the decoder
JPEG_BYTES_PER_OUTPUT_PIXEL = 12
# A JPEG with several scans keeps the coefficients of the whole image until the last scan.
SCANS_S_PER_PIXEL = 2e-8
COEFFICIENT_BYTES = 8  # per pixel
# AVIF and HEIC cost more the more bits they have: from 50 and 70 ns per pixel at 3 bits to 130 and 440 ns at 10 and 16
# bits. They take up to 17 bytes per pixel, with samples of 10 bits a few more.
MEDIA_S_PER_PIXEL = {"AVIF": 5e-8, "HEIF": 8e-8}
MEDIA_S_PER_BYTE = {"AVIF": 1e-7, "HEIF": 2e-7}
FILE_COPIES = 2  # that decoders make of the whole file
MAX_SEGMENTS = 1000  # read before the first scan of a JPEG


def estimate(image: Header, data: bytes | memoryview, min_side: int) -> Cost:
    """Estimate the cost of decoding an image that has been opened.

    Args:
        image: in one of the accepted formats.
        data: the encoded image.
        min_side: shorter side that the caller needs, in pixels. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if
            that is enough.
    """
    pixels = image.width * image.height
    if isinstance(image, JpegImageFile):
        scale = next((d for d in (8, 4, 2) if min(image.size) >= d * min_side), 1)
        output = pixels // scale**2
        output_bytes = JPEG_BYTES_PER_OUTPUT_PIXEL * output
        if _has_several_scans(data, image.layers):
            return Cost(SCANS_S_PER_PIXEL * pixels, COEFFICIENT_BYTES * pixels + output_bytes)
        return Cost(JPEG_S_PER_PIXEL * pixels + JPEG_S_PER_OUTPUT_PIXEL * output, output_bytes)
    memory_of_copies = FILE_COPIES * len(data)
    if image.format in MEDIA_S_PER_PIXEL:
        cpu_s = MEDIA_S_PER_PIXEL[image.format] * pixels + MEDIA_S_PER_BYTE[image.format] * len(data)
        return Cost(cpu_s, WORST_BYTES_PER_PIXEL * pixels + memory_of_copies)
    per_pixel = WORST_BYTES_PER_PIXEL if image.format == "WEBP" else BYTES_PER_PIXEL
    if isinstance(image, Layout):
        per_pixel = max(per_pixel, image.bytes_per_pixel)
    return Cost(S_PER_PIXEL * pixels, per_pixel * pixels + memory_of_copies)


def _has_several_scans(jpeg: bytes | memoryview, components: int) -> bool:
    """Whether a JPEG is progressive, or its first scan lacks some of the components; True if that cannot be decided."""
    position = 2
    for _ in range(MAX_SEGMENTS):
        marker, length = jpeg[position : position + 2], jpeg[position + 2 : position + 4]
        if len(length) < 2 or marker[0] != 0xFF or marker[1] in {0xC2, 0xC6, 0xCA, 0xCE}:  # progressive
            return True
        if marker[1] == 0xDA:  # start of scan
            return jpeg[position + 4] < components
        position += 2 + int.from_bytes(length)
    return True
