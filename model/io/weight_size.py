"""The size of the weights in a checkpoint, without reading them."""

import json
import math
from pathlib import Path

from rednet.model.io.checkpoint import checkpoint_file
from rednet.model.io.untrusted_files import check_safetensors


def float32_bytes(path: str | Path | None = None) -> int:
    """Return about how many bytes the weights of a checkpoint take as float32, which is what they are loaded as.

    Args:
        path: as for `load_checkpoint`.

    Returns:
        0 for a file that cannot be read. `load_checkpoint` says why.

    Example:
        >>> from rednet import load_checkpoint
        >>> float32_bytes() >= 4 * sum(weight.numel() for weight in load_checkpoint().net.parameters())
        True
    """
    try:
        with checkpoint_file(path) as found, found.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), found.stat().st_size
            if file.read(1) != b"{":  # other formats store float32
                return size
            check_safetensors(found)
            file.seek(8)
            header = json.loads(file.read(length))
        return sum(4 * math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, TypeError, KeyError):
        return 0
