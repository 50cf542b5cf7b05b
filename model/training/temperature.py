"""Temperature scaling: calibrates a network's confidence with one temperature for all logits.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2, https://arxiv.org/abs/1706.04599.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rednet.model.nn.rednet import RedNet

BINS = 15  # as in the paper


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature T that maximises the likelihood of the targets under softmax(logits / T), to 0.6%.

    The search is limited to 0.1 to 10, because on photos that are all classified correctly the optimum is 0.

    Args:
        logits: [N, classes], of photos that the network was not trained on.
        targets: [N], their classes.
    """
    temperatures = torch.logspace(-1, 1, 801).tolist()
    logits = logits.double()
    losses = [float(F.cross_entropy(logits / each, targets)) for each in temperatures]
    return float(temperatures[losses.index(min(losses))])


def expected_calibration_error(probabilities: Tensor, targets: Tensor) -> float:
    """Return the mean gap between confidence and accuracy over photos binned by confidence (section 2 of the paper).

    Args:
        probabilities: [N, classes].
        targets: [N].
    """
    confidence, predicted = probabilities.max(dim=1)
    correct = (predicted == targets).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.double).index_add_(0, bins, correct - confidence.double())
    return float(gaps.abs().sum() / len(targets))


@torch.no_grad()
def scale_logits(net: RedNet, temperature: float) -> None:
    """Divide the logits by a temperature, in the weights, so that every backend returns calibrated probabilities."""
    net.head.fc.weight.div_(temperature)
    net.head.fc.bias.div_(temperature)
