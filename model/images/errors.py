"""Errors of image files."""


class UnsupportedImage(ValueError):
    """Not an image, or an unsupported format or variant of a format. The message names it and the remedy."""


class DamagedImage(ValueError):
    """The format is known, but the file is damaged, truncated, or built to be expensive."""
