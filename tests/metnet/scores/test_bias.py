"""The score in metnet/scores/bias.py, by hand and against other software."""

import torch

from metnet.rain import EnsembleForecast
from metnet.scores.bias import Bias
from tests.metnet.scores.check import check_score


def test_bias_is_a_score() -> None:
    check_score(Bias(), perfect=0.0)


def test_too_wet_is_above_zero() -> None:
    forecast = EnsembleForecast(torch.tensor([[2.0, 0.0, 9.0], [4.0, 1.0, 9.0]]).view(1, 2, 1, 1, 3))
    observed = torch.tensor([1.0, 0.5, torch.nan]).view(1, 1, 1, 3)

    assert Bias().value(Bias().sums(forecast, observed)).tolist() == [1.0]
