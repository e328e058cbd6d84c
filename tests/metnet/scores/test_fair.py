"""Fair scores: a small ensemble scores, on average, as a large one of the same kind."""

import pytest
import torch

from metnet.rain import BinnedForecast, EnsembleForecast, RainBins
from metnet.scores.brier import Brier
from metnet.scores.crps import Crps


def drawn(members: int, pixels: int = 40_000, seed: int = 0) -> tuple[EnsembleForecast, torch.Tensor]:
    """Members and an observation from one distribution of rain, half of it dry."""
    generator = torch.Generator().manual_seed(seed)
    rain = torch.randn(members + 1, pixels, generator=generator).exp()
    rain[torch.rand(rain.shape, generator=generator) < 0.5] = 0
    return EnsembleForecast(rain[:-1].view(1, members, 1, 1, pixels)), rain[-1].view(1, 1, 1, pixels)


@pytest.mark.parametrize(
    ("fair", "usual"), [(Crps(fair=True), Crps()), (Brier(1.0, fair=True), Brier(1.0))], ids=["crps", "brier"]
)
def test_few_members_score_as_many_do_when_it_is_fair_and_worse_when_it_is_not(fair, usual):
    few, many = (float(fair.value(fair.sums(*drawn(count)))) for count in (3, 100))
    assert few == pytest.approx(many, rel=0.02)
    unfair = float(usual.value(usual.sums(*drawn(3))))
    assert unfair > 1.2 * many


def test_of_two_members_the_difference_is_whole():
    members = EnsembleForecast(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1, 1))
    seen = torch.full((1, 1, 1, 1), 2.0)
    score = Crps(fair=True)
    assert float(score.value(score.sums(members, seen))) == pytest.approx(1 - 2 / 2)  # E|X-y| - |x1-x2|/2
    brier = Brier(2.0, fair=True)
    assert float(brier.value(brier.sums(members, seen))) == pytest.approx(0.25 - 0.25 / 1)


def test_one_number_and_a_whole_distribution_keep_their_scores():
    single, seen = drawn(1, pixels=50)
    bins = RainBins.preferred()
    whole = BinnedForecast(torch.rand(1, 1, len(bins), 1, 50).softmax(dim=2), bins)
    for forecast in (single, whole):
        for fair, usual in ((Crps(fair=True), Crps()), (Brier(1.0, fair=True), Brier(1.0))):
            torch.testing.assert_close(fair.sums(forecast, seen), usual.sums(forecast, seen))


def test_what_was_not_observed_or_not_forecast_does_not_count():
    forecast, seen = drawn(4, pixels=10)
    seen[..., :3] = torch.nan
    forecast.members[..., 3:5] = torch.nan
    for score in (Crps(fair=True), Brier(1.0, fair=True)):
        assert float(score.sums(forecast, seen)[0, 1]) == 5
