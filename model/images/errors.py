"""Why an image file is not read."""


class UnsupportedImage(ValueError):
    """Not an image, or a format, or a variant of a format, that is not read. The message names it and the remedy."""


class DamagedImage(ValueError):
    """The format is known, but the file is damaged, truncated, or built to be expensive."""
