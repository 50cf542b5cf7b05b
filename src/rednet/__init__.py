"""RedNet and involution (Li et al., CVPR 2021): `rednet.model`, the network; `rednet.service`, the server.

In the repository the two are symbolic links to the folders at the top level; see docs/explanation/architecture.md.

Names are imported on first use, so that `import rednet` and the processes that decode images do not load PyTorch.

Example:
    >>> from rednet import create_rednet
    >>> create_rednet("rednet26", num_classes=10).config.depth
    26
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rednet import model, service
    from rednet.model import (
        Checkpoint,
        CheckpointError,
        Familiarity,
        Involution,
        Label,
        Output,
        Prepared,
        Preprocess,
        RedNet,
        RedNetConfig,
        SelfCheckError,
        create_rednet,
        involution,
        load_checkpoint,
        prepare,
        save_checkpoint,
    )

__version__ = "0.2.0"

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Familiarity",
    "Involution",
    "Label",
    "Output",
    "Prepared",
    "Preprocess",
    "RedNet",
    "RedNetConfig",
    "SelfCheckError",
    "create_rednet",
    "involution",
    "load_checkpoint",
    "model",
    "prepare",
    "save_checkpoint",
    "service",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("model", "service"):
        return import_module(f"rednet.{name}")
    if name in __all__:
        return getattr(import_module("rednet.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
