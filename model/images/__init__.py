"""Decodes image files: which formats are supported, how they are opened, and how they are converted to 8-bit RGB.

Serving and training both read files through `open_photo` and `upright_rgb`. Nothing here imports torch, so the decoding
processes start quickly and stay small.
"""
