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
    check_score(Csi(threshold, cut=0.5), perfect=1.0)
    check_score(Csi(threshold), perfect=1.0, splits=("batch", "lead"))  # a field has one cut


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


def test_without_a_cut_each_field_takes_the_one_from_which_it_expects_most() -> None:
    chance = torch.tensor([[0.9, 0.4, 0.4, 0.1], [0.3, 0.3, 0.0, 0.0]])  # of ten members, at two lead times
    members = (torch.arange(10)[:, None, None] < (10 * chance).round()).float().view(1, 10, 2, 1, 4)
    forecast, observed = EnsembleForecast(members), torch.ones(1, 2, 1, 4)

    # expected at the first: 0.9 / 1.9, then 1.7 / 3.1 with the three likeliest, 1.8 / 4 with all
    assert Csi(1.0).sums(forecast, observed).tolist() == [[3, 1, 0], [2, 2, 0]]
    assert Csi(1.0, cut=0.5).sums(forecast, observed).tolist() == [[1, 3, 0], [0, 4, 0]]


def test_what_then_happens_does_not_move_the_cut() -> None:
    forecast = forecast_of(3)
    for seed in range(3):
        sums = Csi(2.0).sums(forecast, storm(seed, (2, 3, 12, 10)))
        said = sums[:, 0] + sums[:, 2]
        assert torch.equal(said, Csi(2.0).sums(forecast, torch.zeros(2, 3, 12, 10))[:, 2])


def test_csi_is_that_of_the_scores_package() -> None:
    forecast, observed = forecast_of(7, members=1), storm(8, (2, 3, 12, 10))

    ours = Csi(1.0).value(Csi(1.0).sums(forecast, observed))

    for lead in range(3):
        said = xr.DataArray((forecast.members[:, 0, lead] >= 1.0).double().numpy(), dims=("batch", "y", "x"))
        seen = xr.DataArray((observed[:, lead] >= 1.0).double().numpy(), dims=("batch", "y", "x"))
        theirs = BinaryContingencyManager(said, seen).critical_success_index()
        assert float(ours[lead]) == pytest.approx(float(theirs))
