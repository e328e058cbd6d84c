"""The score in metnet/scores/brier.py, by hand and against other software."""

import pytest
import torch
import xarray as xr
from scores.probability import brier_score

from metnet.rain import EnsembleForecast
from metnet.scores.brier import Brier
from tests.metnet.scores.check import check_score, forecast_of, storm, with_gaps


@pytest.mark.parametrize("threshold", [0.1, 1.0, 5.0])
def test_brier_is_a_score(threshold: float) -> None:
    check_score(Brier(threshold), perfect=0.0)


def test_three_of_four_members_right_score_a_sixteenth() -> None:
    members = EnsembleForecast(torch.tensor([2.0, 1.0, 1.5, 0.0]).view(1, 4, 1, 1, 1))

    assert Brier(1.0).value(Brier(1.0).sums(members, torch.ones(1, 1, 1, 1))).tolist() == [0.0625]
    assert Brier(1.0).value(Brier(1.0).sums(members, torch.zeros(1, 1, 1, 1))).tolist() == [0.5625]


def test_brier_is_that_of_the_scores_package() -> None:
    forecast, observed = forecast_of(7), with_gaps(storm(8, (2, 3, 12, 10)), 8)
    dims = ("batch", "lead", "y", "x")
    event = (observed >= 1.0).double().masked_fill(observed.isnan(), torch.nan)

    ours = Brier(1.0).value(Brier(1.0).sums(forecast, observed))

    theirs = brier_score(
        xr.DataArray(forecast.probability_above(1.0).double().numpy(), dims=dims),
        xr.DataArray(event.numpy(), dims=dims),
        preserve_dims="lead",
    )
    torch.testing.assert_close(ours, torch.tensor(theirs.values), atol=1e-7, rtol=0)
