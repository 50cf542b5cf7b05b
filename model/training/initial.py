"""The state of a training run before its first step: a network for the classes, and its optimizer."""

import copy
from collections.abc import Sequence
from dataclasses import replace as replace_fields

import torch

from rednet.model.io.checkpoint import Checkpoint
from rednet.model.nn.rednet import RedNet, RedNetConfig
from rednet.model.training.recipe import Recipe
from rednet.model.training.resume import State
from rednet.model.training.steps import make_optimizer


def initial_state(recipe: Recipe, start: Checkpoint | None, classes: Sequence[str], device: torch.device) -> State:
    """Return the state before the first step."""
    torch.manual_seed(recipe.seed)
    net = adapt_to_classes(start, classes) if start else RedNet(config_for(recipe, len(classes)))
    # Convolutions and the native involution are fastest on channels-last; activations inherit it from the weights.
    net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return State(net, copy.deepcopy(net).eval(), make_optimizer(net, recipe))


def config_for(recipe: Recipe, num_classes: int) -> RedNetConfig:
    """Return the architecture that a recipe describes.

    Raises:
        ValueError: it does not describe a network.
    """
    return RedNetConfig(
        depth=recipe.depth,
        num_classes=num_classes,
        base_channels=recipe.base_channels,
        stem_channels=max(32, recipe.base_channels),  # the stem's involution has half as many, in groups of 16
    )


def adapt_to_classes(start: Checkpoint, classes: Sequence[str]) -> RedNet:
    """Return a copy of a trained network for these classes. Its last layer is new unless the classes are the same."""
    net = RedNet(replace_fields(start.net.config, num_classes=len(classes)))
    weights = start.net.state_dict()
    if [label.id for label in start.labels] != list(classes):
        weights = {key: tensor for key, tensor in weights.items() if not key.startswith("head.")}
    net.load_state_dict(weights, strict=False)
    return net
