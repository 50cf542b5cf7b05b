"""Temperature scaling and expected calibration error, on logits with known results."""

import pytest
import torch

from rednet.model.training.temperature import expected_calibration_error, fit_temperature


def calibrated_logits(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and targets that are drawn with the probabilities of the logits."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 5, generator=generator)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.01, 0.4, 1.0, 30.0])
def test_fitted_temperature_is_the_factor_of_the_logits(factor: float) -> None:
    """Logits that are too large by a factor need that factor as their temperature."""
    logits, targets = calibrated_logits(20_000)
    assert fit_temperature(factor * logits, targets) == pytest.approx(factor, rel=0.04)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("count", [10, 100])
def test_few_correct_predictions_leave_some_doubt(count: int, scale: float) -> None:
    """Maximum likelihood alone would choose a temperature of zero. The loss of four photos spread over all classes is
    least where the probability of the right class is (count + 4/3) / (count + 4)."""
    logits = scale * torch.eye(3).repeat(count, 1)[:count]
    confidence = (logits / fit_temperature(logits, logits.argmax(dim=1))).softmax(dim=1).amax(dim=1)
    torch.testing.assert_close(confidence, torch.full_like(confidence, (count + 4 / 3) / (count + 4)))


def test_predictions_worse_than_chance_become_uniform() -> None:
    logits = torch.eye(3).repeat(10, 1)
    probabilities = (logits / fit_temperature(logits, logits.argmin(dim=1))).softmax(dim=1)
    torch.testing.assert_close(probabilities, torch.full_like(probabilities, 1 / 3), rtol=0, atol=1e-3)


def test_calibration_error_of_known_probabilities() -> None:
    """It is near zero for calibrated probabilities, and 0.4 for a confidence of 0.9 with half of the predictions
    correct."""
    logits, targets = calibrated_logits(50_000)
    assert expected_calibration_error(logits.softmax(dim=1), targets) < 0.01
    sure = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
    assert expected_calibration_error(sure, torch.tensor([0, 1] * 5)) == pytest.approx(0.4)
    assert expected_calibration_error(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == 0


def test_calibration_errors_cancel_within_a_bin_only() -> None:
    """Two predictions, one correct and one wrong, with different confidences and with the same one."""
    probabilities = torch.tensor([[0.7, 0.3], [0.95, 0.05]])
    assert expected_calibration_error(probabilities, torch.tensor([0, 1])) == pytest.approx((0.3 + 0.95) / 2)
    together = torch.tensor([[0.7, 0.3], [0.7, 0.3]])
    assert expected_calibration_error(together, torch.tensor([0, 1])) == pytest.approx(0.2)
