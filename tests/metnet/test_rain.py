"""What a distribution of rain says, against sums and integrals done another way."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scores.probability import crps_for_ensemble
from torch import Tensor

from metnet.rain import BinnedForecast, EnsembleForecast, RainBins, RainForecast, TabulatedForecast

SMALL = RainBins(edges=(0.1, 1.0, 5.0), top=20.0)
STORED_THRESHOLDS = (0.1, 1.0, 2.0, 5.0, 10.0)
STORED_LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
seeds = st.integers(0, 2**31)


def pixel(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value)


def binned(*probability: float, bins: RainBins = SMALL) -> BinnedForecast:
    return BinnedForecast(torch.tensor(probability).view(1, 1, -1, 1, 1), bins)


def some_binned(seed: int, bins: RainBins = SMALL, shape: tuple[int, int, int] = (2, 4, 5)) -> BinnedForecast:
    """Probabilities that fall with the rate, as rain's do, and differ from pixel to pixel."""
    lead, y, x = shape
    generator = torch.Generator().manual_seed(seed)
    slope = torch.rand(1, lead, 1, y, x, generator=generator) * torch.linspace(0, -6, len(bins)).view(
        1, 1, -1, 1, 1
    )
    return BinnedForecast(
        (slope + torch.randn(1, lead, len(bins), y, x, generator=generator)).softmax(dim=2), bins
    )


def tabulated(forecast: RainForecast) -> TabulatedForecast:
    """What a forecast store keeps of a forecast."""
    return TabulatedForecast(
        STORED_THRESHOLDS,
        torch.stack([forecast.probability_above(threshold) for threshold in STORED_THRESHOLDS], dim=2),
        STORED_LEVELS,
        torch.stack([forecast.quantile(level) for level in STORED_LEVELS], dim=2),
        forecast.mean(),
    )


def integrated_crps(forecast: RainForecast, observed: float, top: float, knots: tuple[float, ...]) -> float:
    """The definition, by numerical integration of the probabilities that the forecast itself states."""

    nodes, weights = np.polynomial.legendre.leggauss(12)
    places = [0.0, *sorted({*knots, observed}), top]
    total = 0.0
    for low, high in pairwise(places):
        rates = low + (high - low) * (nodes + 1) / 2
        below = np.array([1 - float(forecast.probability_above(float(rate))) for rate in rates])
        total += (high - low) / 2 * float(weights @ np.square(below - (observed <= rates)))
    return total


@pytest.mark.parametrize(
    "edges, top", [((0.0, 1.0), 5.0), ((1.0, 0.5), 5.0), ((0.1, 5.0), 5.0), ((-1.0,), 5.0)]
)
def test_edges_that_do_not_rise_from_above_zero_are_refused(edges: tuple[float, ...], top: float) -> None:
    with pytest.raises(ValueError, match="rise from above 0"):
        RainBins(edges=edges, top=top)


def test_a_rate_at_an_edge_belongs_to_the_class_above_it_in_float32_too() -> None:
    bins = RainBins.preferred()
    edges = torch.tensor(bins.edges)

    at, below = bins.classify(edges), bins.classify(torch.nextafter(edges, torch.tensor(0.0)))

    assert at.tolist() == list(range(1, len(bins)))
    assert below.tolist() == list(range(len(bins) - 1))


def test_missing_rain_has_no_class_and_rain_above_the_top_the_last() -> None:
    rates = torch.tensor([[np.nan, 0.0, 0.099, 0.1, 999.0]])

    assert SMALL.classify(rates).tolist() == [[-1, 0, 0, 1, 3]]


def test_classes_from_a_yaml_file_are_those_made_in_python() -> None:
    listed = RainBins([0.1, 1, 10], 100)

    assert listed == RainBins((0.1, 1.0, 10.0), 100.0)
    assert hash(listed) == hash(RainBins((0.1, 1.0, 10.0), 100.0))


@pytest.mark.parametrize(("edges", "top"), [((0.1, np.nan), 5.0), ((0.1, 1.0), np.inf), ((0.1, 1.0), np.nan)])
def test_classes_between_rates_that_are_no_numbers_are_refused(edges: tuple[float, ...], top: float) -> None:
    with pytest.raises(ValueError, match="expected rates in mm/h that rise from above 0"):
        RainBins(edges, top)


def test_metnets_classes_are_512_of_a_fifth_of_a_millimetre() -> None:
    bins = RainBins.linear()

    assert (len(bins), bins.edges[0], bins.edges[-1], bins.top) == (512, 0.2, 102.2, 102.4)
    assert bins.classify(torch.tensor([0.1, 0.2, 0.6, 1.0, 50.1])).tolist() == [0, 1, 3, 5, 250]


@given(seeds)
@settings(max_examples=20)
def test_the_probability_above_an_edge_is_the_sum_of_the_classes_above_it(seed: int) -> None:
    forecast = some_binned(seed)

    for index, edge in enumerate(SMALL.edges, start=1):
        above = forecast.probability[:, :, index:].sum(dim=2)
        torch.testing.assert_close(forecast.probability_above(edge), above, atol=1e-6, rtol=0)


def test_within_a_class_every_rate_is_equally_likely_and_dry_is_exactly_zero() -> None:
    forecast = binned(0.5, 0.2, 0.2, 0.1)

    assert float(forecast.probability_above(3.0)) == pytest.approx(0.1 + 0.2 / 2)
    assert float(forecast.probability_above(0.05)) == pytest.approx(0.5)  # nothing between 0 and 0.1 mm/h
    assert float(forecast.probability_above(20.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(forecast.mean()) == pytest.approx(0.2 * 0.55 + 0.2 * 3.0 + 0.1 * 12.5)
    assert float(forecast.quantile(0.4)) == 0.0
    assert float(forecast.quantile(0.6)) == pytest.approx(0.55)
    assert float(forecast.quantile(0.95)) == pytest.approx(12.5)


@given(seeds, st.floats(0.001, 0.999))
@settings(max_examples=50)
def test_a_quantile_is_the_rate_that_is_exceeded_with_the_rest_of_the_probability(
    seed: int, level: float
) -> None:
    forecast = some_binned(seed, shape=(1, 1, 1))
    dry = float(forecast.probability[0, 0, 0])

    rate = float(forecast.quantile(level))

    if level <= dry:
        assert rate == 0.0
    else:
        assert float(forecast.probability_above(rate)) == pytest.approx(1 - level, abs=2e-5)


@given(seeds, st.floats(0, 30))
@settings(max_examples=25)
def test_the_binned_crps_is_the_integral_of_its_definition(seed: int, observed: float) -> None:
    forecast = some_binned(seed, shape=(1, 1, 1))

    exact = float(forecast.crps(pixel(observed)))

    assert exact == pytest.approx(
        integrated_crps(forecast, observed, 40.0, (*SMALL.edges, SMALL.top)), abs=1e-4
    )


def test_the_binned_crps_of_many_draws_is_near_the_crps_of_those_draws() -> None:
    forecast = binned(0.6, 0.2, 0.15, 0.05)
    levels = (np.arange(4000) + 0.5) / 4000
    members = torch.cat([forecast.quantile(float(level)) for level in levels], dim=0).view(1, -1, 1, 1, 1)

    for observed in (0.0, 0.3, 4.0, 30.0):
        drawn = EnsembleForecast(members).crps(pixel(observed))
        torch.testing.assert_close(forecast.crps(pixel(observed)), drawn, atol=2e-3, rtol=1e-3)


def test_certain_rain_scores_nothing_where_it_falls_and_its_distance_elsewhere() -> None:
    forecast = binned(1.0, 0.0, 0.0, 0.0)  # surely dry

    assert float(forecast.crps(pixel(0.0))) == 0.0
    assert float(forecast.crps(pixel(7.0))) == pytest.approx(7.0)
    assert float(forecast.crps(pixel(50.0))) == pytest.approx(50.0)  # above the top too


@given(seeds, st.integers(1, 7))
@settings(max_examples=20)
def test_the_ensemble_crps_is_that_of_the_scores_package(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    members = generator.gamma(0.5, 3.0, (2, count, 3, 4, 5)) * (generator.random((2, count, 3, 4, 5)) < 0.6)
    observed = generator.gamma(0.5, 3.0, (2, 3, 4, 5))

    ours = EnsembleForecast(torch.tensor(members)).crps(torch.tensor(observed))

    theirs = crps_for_ensemble(
        xr_array(members, "batch member lead y x"),
        xr_array(observed, "batch lead y x"),
        "member",
        preserve_dims="all",
        method="ecdf",
    )
    np.testing.assert_allclose(ours.numpy(), theirs.transpose(*["batch", "lead", "y", "x"]).values, atol=1e-9)


def test_an_ensemble_counts_its_members_at_a_threshold_in_float32() -> None:
    members = torch.tensor([0.0, 0.1, 0.1, 2.0]).view(1, 4, 1, 1, 1)
    forecast = EnsembleForecast(members)

    assert float(forecast.probability_above(0.1)) == 0.75
    assert float(forecast.mean()) == pytest.approx(0.55)


@given(seeds, st.integers(1, 9), st.floats(0.01, 0.99))
@settings(max_examples=30)
def test_the_ensemble_quantile_is_numpys(seed: int, count: int, level: float) -> None:
    members = np.random.default_rng(seed).gamma(0.5, 3.0, (1, count, 2, 2, 3))

    ours = EnsembleForecast(torch.tensor(members)).quantile(level)

    np.testing.assert_allclose(ours.numpy(), np.quantile(members, level, axis=1), rtol=1e-6, atol=1e-9)


def test_a_single_member_scores_its_absolute_error() -> None:
    members = torch.rand(1, 1, 2, 3, 4) * 5
    observed = torch.rand(1, 2, 3, 4) * 5

    torch.testing.assert_close(EnsembleForecast(members).crps(observed), (members[:, 0] - observed).abs())


QUESTIONS: dict[str, Callable[[RainForecast], Tensor]] = {
    "probability_above": lambda forecast: forecast.probability_above(1.0),
    "probability_above_between": lambda forecast: forecast.probability_above(0.7),
    "quantile": lambda forecast: forecast.quantile(0.5),
    "low_quantile": lambda forecast: forecast.quantile(0.03),
    "mean": lambda forecast: forecast.mean(),
    "crps": lambda forecast: forecast.crps(torch.ones(1, 2, 4, 5)),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("kind", ["binned", "ensemble", "tabulated"])
def test_no_forecast_at_a_pixel_is_nan_there_and_only_there(kind: str, question: str) -> None:
    probability = some_binned(3).probability.clone()
    probability[0, 1, :, 2, 3] = torch.nan
    members = torch.rand(1, 6, 2, 4, 5)
    members[0, 4, 1, 2, 3] = torch.nan  # one member is enough
    forecasts: dict[str, RainForecast] = {
        "binned": BinnedForecast(probability, SMALL),
        "ensemble": EnsembleForecast(members),
        "tabulated": tabulated(BinnedForecast(probability, SMALL)),
    }

    answer = QUESTIONS[question](forecasts[kind])

    assert answer.isnan().nonzero().tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("kind", ["binned", "ensemble", "tabulated"])
def test_an_unobserved_pixel_has_no_crps(kind: str) -> None:
    observed = torch.ones(1, 2, 4, 5)
    observed[0, 0, 1, 1] = torch.nan
    forecasts: dict[str, RainForecast] = {
        "binned": some_binned(3),
        "ensemble": EnsembleForecast(torch.rand(1, 6, 2, 4, 5)),
        "tabulated": tabulated(some_binned(3)),
    }

    assert forecasts[kind].crps(observed).isnan().nonzero().tolist() == [[0, 0, 1, 1]]


def test_a_stored_forecast_says_what_was_stored() -> None:
    forecast = some_binned(5, RainBins.preferred())
    stored = tabulated(forecast)

    assert torch.equal(stored.probability_above(2.0), forecast.probability_above(2.0))
    assert torch.equal(stored.quantile(0.9), forecast.quantile(0.9))
    assert torch.equal(stored.mean(), forecast.mean())


def test_a_stored_forecast_joins_the_known_points_by_lines() -> None:
    stored = TabulatedForecast(
        thresholds=(1.0, 3.0),
        exceedance=torch.tensor([0.5, 0.1]).view(1, 1, 2, 1, 1),
        levels=(0.25, 0.75),
        quantiles=torch.tensor([0.0, 2.0]).view(1, 1, 2, 1, 1),
        average=pixel(1.2),
    )

    assert float(stored.probability_above(1.5)) == pytest.approx(0.375)  # halfway from (1, 0.5) to (2, 0.25)
    assert float(stored.quantile(0.5)) == pytest.approx(1.0)
    assert float(stored.quantile(0.1)) == 0.0
    unseen = replace(stored, quantiles=torch.full_like(stored.quantiles, torch.nan))
    assert all(unseen.probability_above(rate).isnan().all() for rate in (0.05, 1.5, 9.0))
    # 0.75^2..0.5^2 over [0, 1], 0.5..0.25 over [1, 2], 0.25..0.1 over [2, 3], all on one side
    assert float(stored.crps(pixel(0.0))) == pytest.approx(
        sum((a * a + a * b + b * b) / 3 for a, b in [(0.75, 0.5), (0.5, 0.25), (0.25, 0.1)]), abs=1e-6
    )


@given(seeds)
@settings(max_examples=8)
def test_what_the_store_keeps_of_a_forecast_scores_nearly_like_the_forecast(seed: int) -> None:
    forecast = some_binned(seed, RainBins.preferred(), shape=(1, 20, 20))
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(400, generator=generator).clamp(0.001, 0.999).tolist()
    rain = torch.stack([forecast.quantile(u).flatten()[i] for i, u in enumerate(level)]).view(1, 1, 20, 20)

    exact, stored = forecast.crps(rain).mean(), tabulated(forecast).crps(rain).mean()

    assert float(stored) == pytest.approx(float(exact), rel=0.05)


def test_a_stored_forecast_is_scored_alike_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tabulated(some_binned(7, RainBins.preferred(), shape=(2, 9, 5)))
    observed = torch.rand(1, 2, 9, 5) * 10
    whole = stored.crps(observed)

    monkeypatch.setattr("metnet.rain._PIXELS_AT_ONCE", 25)

    assert torch.equal(stored.crps(observed), whole)


def test_a_stored_single_member_scores_nearly_its_absolute_error() -> None:
    """Between two known points the distribution function is a line, so some error must remain."""
    member = torch.tensor([0.0, 0.0, 0.3, 3.0, 8.0]).view(1, 1, 1, 1, 5)
    observed = torch.tensor([0.0, 4.0, 0.0, 5.5, 0.2]).view(1, 1, 1, 5)

    stored = tabulated(EnsembleForecast(member)).crps(observed)

    torch.testing.assert_close(stored, (member[:, 0] - observed).abs(), atol=0.5, rtol=0.2)


def xr_array(values: np.ndarray, dims: str) -> xr.DataArray:
    return xr.DataArray(values, dims=dims.split())
