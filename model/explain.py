"""Where in a photo a class was found, from what the pass that classifies makes anyway."""

import torch
from torch import Tensor


def class_activation(last_map: Tensor, weight: Tensor) -> Tensor:
    """What each position of the last stage's map adds to the logit of a class.

    The network averages the map over its positions and has a linear head, so that this is exact: the mean over the
    positions is the class's logit, less its bias. (Zhou et al., "Learning Deep Features for Discriminative
    Localization", CVPR 2016, equation 2; https://arxiv.org/abs/1512.04150.)

    Args:
        last_map: of an image, [C, h, w].
        weight: the head's for the class, [C].

    Returns:
        [h, w].
    """
    return torch.einsum("chw,c->hw", last_map, weight)
