"""Estimates whether a second network fits into memory, before it is loaded."""

from collections.abc import Sequence
from pathlib import Path

from rednet.model.io.weight_size import float32_bytes
from rednet.service.decoding.limits import PROCESS_BYTES
from rednet.service.engine.runner import device_memory
from rednet.service.system.memory import available_bytes, resident_bytes

# Copies of the weights that exist for a moment: as loaded, with folded batch norms, and in the backend's layout.
COPIES = 3


class MemoryCheck:
    """Compares what a second network needs with what there is.

    It is expected to take as much as the first one has: weights, activations, and what libraries keep. While it is
    prepared, there are copies of its weights.

    Args:
        checkpoint: its path; None: the embedded one.
        base_bytes: what this process had before the first network was loaded.
        decoders: processes that start with a network.
        devices: the CUDA devices that it runs on.
    """

    def __init__(self, checkpoint: Path | None, base_bytes: int, decoders: int, devices: Sequence[str]) -> None:
        self._checkpoint = checkpoint
        self._base_bytes = base_bytes
        self._decoders_bytes = decoders * PROCESS_BYTES
        self._devices = devices

    def check(self) -> None:
        """Check that there is memory for the checkpoint as it is now.

        Raises:
            ValueError: there is too little.
        """
        weight_bytes = float32_bytes(self._checkpoint)
        held_bytes = max(0, resident_bytes() - self._base_bytes)
        _require("memory", held_bytes + COPIES * weight_bytes + self._decoders_bytes, available_bytes())
        for device in self._devices:
            held_bytes, free_bytes = device_memory(device)
            _require(f"memory of {device}", held_bytes + weight_bytes, free_bytes)


def _require(what: str, needed: int, available: int | None) -> None:
    if available is not None and needed > available:
        raise ValueError(
            f"a second network beside the first needs about {needed / 1e6:.0f} MB of {what}, and {available / 1e6:.0f} "
            "are available; a restart would load it alone"
        )
