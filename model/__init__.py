"""RedNet and involution (Li et al., CVPR 2021) for PyTorch: the network, its checkpoints, its fast inference form."""

from model.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from model.inference.backend import Output
from model.inference.preparation import Prepared, SelfCheckError, prepare
from model.involution import Involution, involution
from model.labels import Label
from model.preprocess import Preprocess
from model.rednet import RedNet, RedNetConfig, create_rednet

__all__ = [
    "Checkpoint",
    "CheckpointError",
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
