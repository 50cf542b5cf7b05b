"""RedNet and involution for PyTorch: the network, its operator, checkpoints, inference backends and training.

Names are imported on first use, so that the processes that decode images do not load PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rednet.model.images.preprocess import Preprocess
    from rednet.model.inference.backend import Output
    from rednet.model.inference.familiarity import Familiarity
    from rednet.model.inference.preparation import Prepared, SelfCheckError, prepare
    from rednet.model.io.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
    from rednet.model.io.labels import Label
    from rednet.model.nn.involution import Involution, involution
    from rednet.model.nn.rednet import RedNet, RedNetConfig, create_rednet

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
    "prepare",
    "save_checkpoint",
]

_MODULE_OF = {
    "Checkpoint": "io.checkpoint",
    "CheckpointError": "io.checkpoint",
    "Familiarity": "inference.familiarity",
    "Involution": "nn.involution",
    "Label": "io.labels",
    "Output": "inference.backend",
    "Prepared": "inference.preparation",
    "Preprocess": "images.preprocess",
    "RedNet": "nn.rednet",
    "RedNetConfig": "nn.rednet",
    "SelfCheckError": "inference.preparation",
    "create_rednet": "nn.rednet",
    "involution": "nn.involution",
    "load_checkpoint": "io.checkpoint",
    "prepare": "inference.preparation",
    "save_checkpoint": "io.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"rednet.model.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
