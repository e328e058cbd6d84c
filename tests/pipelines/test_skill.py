"""What sums by run say of a forecast and how sure that is."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from torch import Tensor

from metnet.rain import EnsembleForecast
from metnet.scores.bias import Bias
from metnet.scores.brier import Brier
from metnet.scores.crps import Crps
from metnet.scores.csi import Csi
from metnet.scores.fss import Fss
from metnet.scores.reliability import Reliability
from pipelines.skill import Skill, check_names, over_events, perfect

START = datetime(2020, 6, 1, tzinfo=UTC)


def skill_of(errors: Tensor, minutes: float = 120, lead_times: tuple[float, ...] = (10.0, 30.0)) -> Skill:
    """A skill whose CRPS of each (forecaster, run, lead) is given; every run counts 100 pixels."""
    forecasters, runs, leads = errors.shape
    count = torch.full((runs, leads), 100.0, dtype=torch.float64)
    return Skill(
        scores=(Crps(),),
        forecasters=("forecast", "persistence", "extrapolation")[:forecasters],
        init_times=tuple(START + i * timedelta(minutes=minutes) for i in range(runs)),
        lead_times=lead_times[:leads],
        sums={Crps().name: torch.stack([100 * errors.double(), count.expand_as(errors)], dim=-1)},
        pixels=count,
        observed=count * 2,
        rain=count / 2,
    )


def noisy(runs: int, better: float, seed: int = 0, minutes: float = 120) -> Skill:
    """Two forecasters that err alike from run to run; the first a bit less."""
    generator = torch.Generator().manual_seed(seed)
    weather = 1 + torch.rand(1, runs, 2, generator=generator)
    own = 0.02 * torch.randn(2, runs, 2, generator=generator)
    return skill_of(weather + own - torch.tensor([better, 0.0]).view(2, 1, 1), minutes)


def test_a_score_over_all_runs_is_that_of_their_sums() -> None:
    skill = skill_of(torch.tensor([[[1.0], [3.0]], [[2.0], [2.0]]]))

    assert skill.values(Crps()).tolist() == [[2.0], [2.0]]


def test_the_interval_of_a_paired_difference_forgets_the_weather_that_both_share() -> None:
    difference = noisy(40, better=0.05).difference(Crps(), "persistence")

    assert ((difference.low < difference.value) & (difference.value < difference.high)).all()
    assert (difference.high < 0).all(), "a small but steady gain must be clear"
    assert (difference.high - difference.low < 0.02).all(), "unpaired, the weather alone would span 0.2"


def test_the_interval_is_that_of_the_classic_bootstrap_where_runs_do_not_overlap() -> None:
    skill = noisy(30, better=0.0)
    assert skill.block == 1
    sums = skill.sums[Crps().name][:, :, 0, 0].numpy() / 100
    means = (sums[0] - sums[1])[np.random.default_rng(1).integers(30, size=(20_000, 30))].mean(axis=1)

    difference = skill.difference(Crps(), "persistence", resamples=5000)

    np.testing.assert_allclose(
        [float(difference.low[0]), float(difference.high[0])], np.quantile(means, [0.05, 0.95]), atol=4e-4
    )


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = [
        bool(low <= -0.01 <= high)
        for seed in range(60)
        for low, high in [
            ends(noisy(25, better=0.01, seed=seed).difference(Crps(), "persistence", resamples=100))
        ]
    ]

    assert 0.75 < np.mean(held) < 0.98


def ends(difference) -> tuple[float, float]:
    return float(difference.low[0]), float(difference.high[0])


def test_overlapping_runs_are_drawn_together_and_say_less() -> None:
    apart, overlapping = noisy(40, 0.05, minutes=120), noisy(40, 0.05, minutes=10)

    assert (apart.block, overlapping.block) == (1, 3)

    copied = torch.randn(2, 10, 1, generator=torch.Generator().manual_seed(1)).repeat_interleave(4, dim=1) + 5
    wide = skill_of(copied, minutes=5, lead_times=(20.0,)).difference(Crps(), "persistence")
    narrow = skill_of(copied, minutes=120, lead_times=(20.0,)).difference(Crps(), "persistence")
    assert float(wide.high - wide.low) > 1.4 * float(narrow.high - narrow.low)


def test_a_handful_of_runs_has_no_interval_but_a_difference() -> None:
    difference = noisy(4, better=0.05).difference(Crps(), "persistence")

    assert difference.value.isfinite().all()
    assert difference.low.isnan().all() and difference.relative_high.isnan().all()


def test_the_same_runs_give_the_same_interval() -> None:
    first, second = (noisy(20, 0.05).difference(Crps(), "persistence") for _ in range(2))

    assert torch.equal(first.low, second.low) and torch.equal(first.relative_high, second.relative_high)


def test_a_pooled_number_is_that_of_all_runs_and_lead_times_with_the_interval_of_drawn_runs() -> None:
    skill = noisy(40, better=0.0)
    assert skill.block == 1
    told = skill.pooled(Crps(), Crps().value, resamples=2000)
    errors = skill.sums[Crps().name][0, :, :, 0].numpy() / 100
    means = errors.mean(axis=1)[np.random.default_rng(1).integers(40, size=(20_000, 40))].mean(axis=1)

    assert told.value == pytest.approx(errors.mean())
    np.testing.assert_allclose([told.low, told.high], np.quantile(means, [0.05, 0.95]), atol=0.005)
    assert np.isnan(noisy(4, better=0.0).pooled(Crps(), Crps().value).low), "four runs have no interval"


def test_relative_differences_are_shares_of_the_baseline() -> None:
    skill = skill_of(torch.tensor([1.5, 2.0]).view(2, 1, 1).expand(2, 6, 1))

    difference = skill.difference(Crps(), "persistence")

    assert float(difference.relative[0]) == pytest.approx(-0.25)
    assert float(difference.relative_low[0]) == pytest.approx(-0.25)


def test_a_share_of_nothing_is_not_known() -> None:
    skill = skill_of(torch.tensor([1.5, 0.0]).view(2, 1, 1).expand(2, 6, 1))

    difference, ratio = skill.difference(Crps(), "persistence"), skill.ratio(Crps(), "persistence")

    assert float(difference.value[0]) == float(difference.high[0]) == 1.5
    assert difference.relative.isnan().all() and difference.relative_high.isnan().all()
    assert np.isnan([ratio.value, ratio.low, ratio.high]).all()


def test_an_interval_with_shares_of_nothing_is_not_known_but_the_share_is() -> None:
    errors = torch.ones(2, 6, 1)
    errors[1, 1:] = 0  # of a baseline that errs in one run, which a third of the resamples lack

    ratio = skill_of(errors).ratio(Crps(), "persistence")

    assert ratio.value == pytest.approx(6) and np.isnan([ratio.low, ratio.high]).all()


def test_resampled_runs_choose_their_cut_anew_as_the_runs_themselves_would() -> None:
    score, generator = Csi(1.0), torch.Generator().manual_seed(0)
    rain = 4 * torch.rand(12, 1, 8, 8, generator=generator) * torch.linspace(0, 1, 12)[:, None, None, None]
    said = [
        EnsembleForecast(
            (rain[:, None] + width * torch.randn(12, 9, 1, 8, 8, generator=generator)).clamp(min=0)
        )
        for width in (1.0, 2.0)
    ]
    sums = torch.stack(
        [
            torch.stack([score.sums(EnsembleForecast(each.members[[run]]), rain[[run]]) for run in range(12)])
            for each in said
        ]
    )
    skill = replace(skill_of(torch.ones(2, 12, 1)), scores=(score,), sums={score.name: sums})
    assert skill.block == 1
    chosen = np.random.default_rng(0).integers(12, size=(50, 12))
    values = [
        [float(score.value(score.sums(EnsembleForecast(each.members[runs]), rain[runs]))) for runs in chosen]
        for each in said
    ]

    difference = skill.difference(score, "persistence", resamples=50)

    ends = np.quantile(np.subtract(*values), [0.05, 0.95])
    np.testing.assert_allclose([float(difference.low[0]), float(difference.high[0])], ends, atol=1e-6)


@pytest.mark.parametrize(
    "score, best",
    [(Crps(), 0), (Brier(5.0), 0), (Csi(10.0), 1), (Fss(5.0), 1), (Reliability(1.0), 0), (Bias(), 0)],
)
def test_a_perfect_forecast_shows_what_is_best(score, best: float) -> None:
    assert perfect(score) == pytest.approx(best, abs=1e-6)


def test_ratios_of_events_are_averaged_alike_whichever_way_they_are_turned() -> None:
    assert over_events([0.5, 2.0]).value == pytest.approx(1)
    ratios = [0.8, 0.9, 1.1, 0.95, 1.3]
    straight, turned = over_events(ratios), over_events([1 / ratio for ratio in ratios])
    assert straight.value == pytest.approx(np.exp(np.log(ratios).mean()))
    assert (turned.value, turned.high) == pytest.approx((1 / straight.value, 1 / straight.low))


def test_the_interval_over_events_is_that_of_the_classic_bootstrap() -> None:
    ratios = np.exp(np.random.default_rng(0).normal(-0.05, 0.04, 200)).tolist()
    told = over_events(ratios, resamples=20000)
    spread = 1.645 * np.log(ratios).std() / np.sqrt(200)
    ends = [told.value * np.exp(-spread), told.value * np.exp(spread)]
    assert [told.low, told.high] == pytest.approx(ends, abs=2e-4)


def test_a_handful_of_events_has_a_mean_without_an_interval() -> None:
    told = over_events([0.9, 0.9, 0.9, 0.9])
    assert told.value == pytest.approx(0.9)
    assert math.isnan(told.low)
    assert math.isnan(told.high)


@pytest.mark.parametrize("unknown", [math.nan, math.inf, 0.0])
def test_the_mean_over_events_of_which_one_is_not_known_is_not_known(unknown: float) -> None:
    assert str(over_events([0.9, 0.8, unknown, 0.9, 0.9])) == "-"


def test_no_event_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no event whose ratio"):
        over_events([])


def test_two_scores_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="Brier >= 1 mm/h"):
        check_names([Brier(1.0), Crps(), Brier(1.0)])
    with pytest.raises(ValueError, match="at least one"):
        check_names([])
