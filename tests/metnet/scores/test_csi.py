"""The score in metnet/scores/csi.py, by hand and against other software."""

import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scores.categorical import BinaryContingencyManager
from torch import Tensor

from metnet.decision import CUTS
from metnet.rain import BinnedForecast, EnsembleForecast, RainBins
from metnet.scores.csi import Csi
from tests.metnet.scores.check import check_score, forecast_of, storm, with_gaps


@pytest.mark.parametrize("threshold", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("cut", [None, 0.5])
def test_csi_is_a_score(threshold: float, cut: float | None) -> None:
    check_score(Csi(threshold, cut), perfect=1.0)


def decided(score: Csi, forecast: EnsembleForecast, observed: Tensor) -> list[list[float]]:
    """Hits, misses and false alarms by lead time."""
    return score.decided(score.sums(forecast, observed)).tolist()


def sure(probability: Tensor) -> BinnedForecast:
    """A forecast of 2 mm/h with this probability (batch, lead, y, x), else of none."""
    return BinnedForecast(torch.stack([1 - probability, probability], dim=2), RainBins((1.0,), 3.0))


def test_two_hits_a_miss_and_a_false_alarm_make_one_half() -> None:
    observed = torch.tensor([1.0, 3.0, 1.0, 0.0, 0.9, torch.nan]).view(1, 1, 1, 6)
    forecast = EnsembleForecast(torch.tensor([1.0, 1.0, 0.0, 2.0, 0.0, 9.0]).view(1, 1, 1, 1, 6))

    score = Csi(threshold=1.0)

    assert decided(score, forecast, observed) == [[2, 1, 1]]
    assert score.value(score.sums(forecast, observed)).tolist() == [0.5]


def test_the_cut_says_how_probable_rain_must_be() -> None:
    observed = torch.ones(1, 1, 1, 1)
    three_of_ten = EnsembleForecast(torch.tensor([1.0] * 3 + [0.0] * 7).view(1, 10, 1, 1, 1))

    assert decided(Csi(1.0, cut=0.3), three_of_ten, observed) == [[1, 0, 0]]
    assert decided(Csi(1.0, cut=0.4), three_of_ten, observed) == [[0, 1, 0]]


def test_a_probability_on_a_cut_says_yes() -> None:
    for cut in CUTS:
        said = torch.tensor([[[[cut] * 3 + [0.0]]]], dtype=torch.float64)
        assert decided(Csi(1.0), sure(said), torch.zeros_like(said)) == [[0, 0, 3]]


def test_without_a_cut_each_lead_time_takes_the_one_from_which_it_expects_most() -> None:
    chance = torch.tensor([[0.9, 0.4, 0.4, 0.1], [0.3, 0.3, 0.0, 0.0]])  # of ten members, at two lead times
    members = (torch.arange(10)[:, None, None] < (10 * chance).round()).float().view(1, 10, 2, 1, 4)
    forecast, observed = EnsembleForecast(members), torch.ones(1, 2, 1, 4)

    # expected at the first: 0.9 / 1.9, then 1.7 / 3.1 with the three likeliest, 1.8 / 4 with all
    assert decided(Csi(1.0), forecast, observed) == [[3, 1, 0], [2, 2, 0]]
    assert decided(Csi(1.0, cut=0.5), forecast, observed) == [[1, 3, 0], [0, 4, 0]]


def test_what_then_happens_does_not_move_the_cut() -> None:
    forecast = forecast_of(3)
    [_, _, dry] = torch.tensor(decided(Csi(2.0), forecast, torch.zeros(2, 3, 12, 10))).T
    for seed in range(3):
        [hits, _, alarms] = torch.tensor(decided(Csi(2.0), forecast, storm(seed, (2, 3, 12, 10)))).T
        assert torch.equal(hits + alarms, dry)


def test_dry_runs_do_not_ruin_the_cut_of_wet_ones() -> None:
    """Left to itself, a field of one tiny probability says yes everywhere."""
    random = torch.Generator().manual_seed(0)
    chance = (2 * torch.randn(4, 1, 60, 60, generator=random) - 2).sigmoid()
    fell = (torch.rand(chance.shape, generator=random) < chance).float() * 2
    dry = torch.full_like(chance, 2e-4)
    score = Csi(1.0)
    wet, none = score.sums(sure(chance), fell), score.sums(sure(dry), torch.zeros_like(fell))

    assert score.decided(none).tolist() == [[0, 0, dry.numel()]]
    assert torch.equal(score.decided(wet + none), score.decided(wet))
    assert float(score.value(wet)) > 0.3


@given(st.integers(0, 10_000))
@settings(max_examples=20, database=None)
def test_the_cut_of_summed_runs_is_that_of_all_their_pixels_by_trying_all_cuts(seed: int) -> None:
    runs = [forecast_of(seed + place, members=24) for place in range(3)]
    seen = [with_gaps(storm(seed + 7 + place, (2, 3, 12, 10)), seed + place) for place in range(3)]
    score = Csi(2.0)
    told = score.value(sum(score.sums(run, rain) for run, rain in zip(runs, seen, strict=True)))  # type: ignore[arg-type]

    said, rain = torch.cat([run.probability_above(2.0).double() for run in runs]), torch.cat(seen)
    for lead in range(3):
        known = ~rain[:, lead].isnan()
        chance, fell = said[:, lead][known], rain[:, lead][known] >= 2.0

        def expected(cut: float, chance: Tensor = chance) -> float:
            yes = chance >= cut
            return float(chance[yes].sum() / (yes.sum() + chance[~yes].sum()))

        yes = chance >= max(chance[chance > 0].unique().tolist(), key=expected)
        assert float(told[lead]) == pytest.approx(float((yes & fell).sum() / (yes | fell).sum()))


@pytest.mark.parametrize("probability", [0.0, 1e-5])
def test_where_next_to_nothing_is_expected_anywhere_no_is_said_everywhere(probability: float) -> None:
    said = torch.full((2, 3, 4, 5), probability)
    assert decided(Csi(1.0), sure(said), torch.full_like(said, 2.0)) == [[0, 40, 0]] * 3


def test_a_forecast_of_one_number_keeps_to_it() -> None:
    member, observed = forecast_of(5, members=1), storm(6, (2, 3, 12, 10))
    assert decided(Csi(1.0), member, observed) == decided(Csi(1.0, cut=0.5), member, observed)


def test_csi_is_that_of_the_scores_package() -> None:
    forecast, observed = forecast_of(7, members=1), storm(8, (2, 3, 12, 10))

    ours = Csi(1.0).value(Csi(1.0).sums(forecast, observed))

    for lead in range(3):
        said = xr.DataArray((forecast.members[:, 0, lead] >= 1.0).double().numpy(), dims=("batch", "y", "x"))
        seen = xr.DataArray((observed[:, lead] >= 1.0).double().numpy(), dims=("batch", "y", "x"))
        theirs = BinaryContingencyManager(said, seen).critical_success_index()
        assert float(ours[lead]) == pytest.approx(float(theirs))
