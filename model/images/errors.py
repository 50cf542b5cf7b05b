"""Errors of image files."""

# Shown in place of what decoders say, such as "broken data stream when reading image file", "decoder error -2" or the
# TypeError of a bug. Most decoders cannot tell a truncated file from a damaged one, so these messages do not either.
UNOPENED = "the image is damaged or incomplete: it cannot be opened"
UNDECODED = "the image is damaged or incomplete: its data cannot be decoded"


class UnsupportedImage(ValueError):
    """Not an image, or an unsupported format or variant of a format. The message names it and the remedy."""


class DamagedImage(ValueError):
    """The format is known, but the file is damaged, truncated, or built to be expensive."""
