"""Image files to pixels: which formats are read, how they are opened, and how any of them becomes 8-bit RGB.

Serving and training both read files through `open_photo` and `upright_rgb`. Nothing here imports torch: the processes
that decode photos do without it.
"""
