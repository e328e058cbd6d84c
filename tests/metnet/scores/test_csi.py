"""The score in metnet/scores/csi.py, by hand and against other software."""

import pytest
import torch
import xarray as xr
from scores.categorical import BinaryContingencyManager

from metnet.rain import EnsembleForecast
from metnet.scores.csi import Csi
from tests.metnet.scores.check import check_score, forecast_of, storm


@pytest.mark.parametrize("threshold", [0.1, 1.0, 5.0])
def test_csi_is_a_score(threshold: float) -> None:
    check_score(Csi(threshold), perfect=1.0)


def test_two_hits_a_miss_and_a_false_alarm_make_one_half() -> None:
    observed = torch.tensor([1.0, 3.0, 1.0, 0.0, 0.9, torch.nan]).view(1, 1, 1, 6)
    forecast = torch.tensor([1.0, 1.0, 0.0, 2.0, 0.0, 9.0]).view(1, 1, 1, 1, 6)

    score = Csi(threshold=1.0)
    sums = score.sums(EnsembleForecast(forecast), observed)

    assert sums.tolist() == [[2, 1, 1]]
    assert score.value(sums).tolist() == [0.5]


def test_the_cut_says_how_probable_rain_must_be() -> None:
    observed = torch.ones(1, 1, 1, 1)
    three_of_ten = EnsembleForecast(torch.tensor([1.0] * 3 + [0.0] * 7).view(1, 10, 1, 1, 1))

    assert Csi(1.0, cut=0.3).sums(three_of_ten, observed).tolist() == [[1, 0, 0]]
    assert Csi(1.0, cut=0.4).sums(three_of_ten, observed).tolist() == [[0, 1, 0]]


def test_csi_is_that_of_the_scores_package() -> None:
    forecast, observed = forecast_of(7, members=1), storm(8, (2, 3, 12, 10))

    ours = Csi(1.0).value(Csi(1.0).sums(forecast, observed))

    for lead in range(3):
        said = xr.DataArray((forecast.members[:, 0, lead] >= 1.0).double().numpy(), dims=("batch", "y", "x"))
        seen = xr.DataArray((observed[:, lead] >= 1.0).double().numpy(), dims=("batch", "y", "x"))
        theirs = BinaryContingencyManager(said, seen).critical_success_index()
        assert float(ours[lead]) == pytest.approx(float(theirs))
