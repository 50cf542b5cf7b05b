"""Class activation maps, computed in the same forward pass as the logits."""

import torch
from torch import Tensor


def class_activation(last_map: Tensor, weight: Tensor) -> Tensor:
    """Return what each position of the last stage's map adds to the logit of one class.

    The network averages the map over its positions and has a linear head, so this is exact: the mean over all positions
    is the class's logit without its bias. Source: Zhou et al., "Learning Deep Features for Discriminative
    Localization", CVPR 2016, equation 2; https://arxiv.org/abs/1512.04150.

    Args:
        last_map: the last stage's map of one image, [C, h, w].
        weight: the row of the head's weight matrix for the class, [C].

    Returns:
        [h, w].

    Example:
        >>> class_activation(torch.ones(2, 1, 3), torch.tensor([1.0, 2.0]))
        tensor([[3., 3., 3.]])
    """
    return torch.einsum("chw,c->hw", last_map, weight)
