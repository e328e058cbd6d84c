"""The score in metnet/scores/crps.py, by hand and against other software."""

import torch
import xarray as xr
from scores.probability import crps_for_ensemble

from metnet.rain import EnsembleForecast
from metnet.scores.crps import Crps
from tests.metnet.scores.check import check_score, forecast_of, storm, with_gaps


def test_crps_is_a_score() -> None:
    check_score(Crps(), perfect=0.0)


def test_one_number_scores_its_mean_absolute_error() -> None:
    forecast = EnsembleForecast(torch.tensor([1.0, 4.0, 0.0]).view(1, 1, 1, 1, 3))
    observed = torch.tensor([3.0, 4.0, torch.nan]).view(1, 1, 1, 3)

    assert Crps().value(Crps().sums(forecast, observed)).tolist() == [1.0]


def test_crps_is_that_of_the_scores_package() -> None:
    forecast, observed = forecast_of(7), with_gaps(storm(8, (2, 3, 12, 10)), 8)

    ours = Crps().value(Crps().sums(forecast, observed))

    theirs = crps_for_ensemble(
        xr.DataArray(forecast.members.double().numpy(), dims=("batch", "member", "lead", "y", "x")),
        xr.DataArray(observed.double().numpy(), dims=("batch", "lead", "y", "x")),
        "member",
        preserve_dims="lead",
    )
    torch.testing.assert_close(ours, torch.tensor(theirs.values), atol=1e-6, rtol=0)
