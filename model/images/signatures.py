"""Recognises file formats by their first bytes, so that errors can name an unsupported format."""

from rednet.model.images.iso_media import enabled_formats, media_format

REMEDY = "convert it to JPEG or PNG"

# First bytes of supported formats. Others need more than a prefix: see `has_supported_signature`.
SUPPORTED = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

PREFIXES = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS", "Photoshop (PSD)"),
    (b"%PDF-", "PDF"),
    (b"%!PS", "PostScript or EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"\0\0\1\0", "Windows icon (ICO)"),
    (b"\0\0\2\0", "Windows cursor (CUR)"),
    (b"qoif", "QOI"),
    (b"DDS ", "DirectDraw surface (DDS)"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"FUJIFILMCCD-RAW", "camera raw (RAF)"),
    (b"IIRO", "camera raw (ORF)"),
    (b"IIRS", "camera raw (ORF)"),
    (b"IIU\0", "camera raw (RW2)"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"\x8aMNG", "MNG animation"),
    (b"\x1a\x45\xdf\xa3", "Matroska or WebM video"),
    (b"gimp xcf", "GIMP (XCF)"),
    (b"P1\n", "Netpbm"),
    (b"P2\n", "Netpbm"),
    (b"P3\n", "Netpbm"),
    (b"P4\n", "Netpbm"),
    (b"P5\n", "Netpbm"),
    (b"P6\n", "Netpbm"),
    (b"SIMPLE  =", "FITS"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"\x1f\x8b", "gzip"),
)
TEXT = (
    (b"<svg", "SVG"),
    (b"<?xml", "XML or SVG"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"data:", "a data URL"),
    (b"{", "JSON"),
    (b"[", "JSON"),
)


def has_supported_signature(data: bytes) -> bool:
    """Return whether data begins like one of the supported formats."""
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    is_bmp = data[:2] == b"BM" and data[6:10] == bytes(4)  # reserved, zero
    return data.startswith(SUPPORTED) or is_webp or is_bmp or media_format(data) in enabled_formats()


def foreign_format(data: bytes) -> str | None:
    """Return the name of the format of data if it is a known one that is not supported."""
    for recognise in (_by_prefix, media_format, _by_text):
        if name := recognise(data):
            return name
    return None


def _by_prefix(data: bytes) -> str | None:
    return next((name for prefix, name in PREFIXES if data.startswith(prefix)), None)


def _by_text(data: bytes) -> str | None:
    start = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((name for prefix, name in TEXT if start.startswith(prefix)), None)
