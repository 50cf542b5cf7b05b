"""Confidence that means what it says: one temperature for all logits (Guo et al., "On Calibration of Modern Neural
Networks", ICML 2017, section 4.2, https://arxiv.org/abs/1706.04599)."""

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15  # as in the paper


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature T for which softmax(logits / T) gives the targets the highest likelihood, to 0.6%.

    It is sought between 0.1 and 10: easy photos would ask for boundless confidence.

    Args:
        logits: [N, classes], of photos that were not trained on.
        targets: [N], their classes.
    """
    temperatures = torch.logspace(-1, 1, 801).tolist()
    logits = logits.double()
    losses = [float(F.cross_entropy(logits / each, targets)) for each in temperatures]
    return float(temperatures[losses.index(min(losses))])


def expected_calibration_error(probabilities: Tensor, targets: Tensor) -> float:
    """How far confidence is from accuracy, on average over photos that are binned by confidence (section 2 there).

    Args:
        probabilities: [N, classes].
        targets: [N].
    """
    confidence, predicted = probabilities.max(dim=1)
    right = (predicted == targets).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.double).index_add_(0, bins, right - confidence.double())
    return float(gaps.abs().sum() / len(targets))
