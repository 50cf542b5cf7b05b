"""Temperature and calibration error, on answers whose right values are known."""

import pytest
import torch

from rednet.model.training.temperature import expected_calibration_error, fit_temperature


def honest(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and targets drawn with just the probabilities that they state."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 5, generator=generator)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_a_wrong_scale(factor: float) -> None:
    """Logits that are too large by a factor need that factor as their temperature."""
    logits, targets = honest(20_000)
    assert fit_temperature(factor * logits, targets) == pytest.approx(factor, rel=0.04)


def test_photos_that_are_all_right_do_not_ask_for_certainty() -> None:
    """The temperature stays within bounds, where likelihood alone would go to zero."""
    logits = torch.eye(3).repeat(10, 1)
    assert fit_temperature(logits, logits.argmax(dim=1)) == pytest.approx(0.1)


def test_calibration_error_is_the_mean_gap() -> None:
    """Of honest answers it is near zero; of ones that say 0.9 and are right half of the time, 0.4."""
    logits, targets = honest(50_000)
    assert expected_calibration_error(logits.softmax(dim=1), targets) < 0.01
    sure = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
    assert expected_calibration_error(sure, torch.tensor([0, 1] * 5)) == pytest.approx(0.4)
    assert expected_calibration_error(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == 0


def test_gaps_of_a_bin_cancel_but_those_of_two_do_not() -> None:
    """Two photos, one right and one wrong, with different confidence and with the same."""
    probabilities = torch.tensor([[0.7, 0.3], [0.95, 0.05]])
    assert expected_calibration_error(probabilities, torch.tensor([0, 1])) == pytest.approx((0.3 + 0.95) / 2)
    together = torch.tensor([[0.7, 0.3], [0.7, 0.3]])
    assert expected_calibration_error(together, torch.tensor([0, 1])) == pytest.approx(0.2)
