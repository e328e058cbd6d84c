"""Probabilities that were too sure, or of another climate, are made to agree with what then came."""

from dataclasses import replace

import pytest
import torch

from metnet.calibration import (
    Calibration,
    Exceedances,
    above,
    cost,
    exceedances,
    identity,
    undone,
)
from metnet.rain import BinnedForecast, RainBins

BINS = RainBins((0.1, 1.0, 5.0), 50.0)
LEADS = torch.tensor([5.0, 20.0, 60.0])


def a_world(seed=0, sureness=1.0, bias=0.0, side=64, batch=8):
    """A forecast whose logits of exceeding are `sureness` times the true ones plus a bias, and what then came."""
    random = torch.Generator().manual_seed(seed)
    wetness = torch.randn(batch, len(LEADS), 1, side, side, generator=random) * 2 - 1
    steps = torch.tensor([0.0, 1.5, 3.0])[:, None, None]
    truth = wetness - steps
    above_truth = truth.sigmoid()
    chance = torch.rand(batch, len(LEADS), 1, side, side, generator=random)
    fell = (chance < above_truth).sum(dim=2)
    target = torch.tensor([0.0, 0.5, 2.0, 10.0])[fell]
    reached = (sureness * truth + bias).sigmoid()
    padded = torch.cat([torch.ones_like(chance), reached, torch.zeros_like(chance)], dim=2)
    return BinnedForecast(-padded.diff(dim=2), BINS), target


def fitted(said):
    """As far as pixels that have nothing to do with each other tell."""
    return Calibration.fitted(said, alike=1.0)


def some(forecast, target, count=4000):
    return exceedances(forecast, LEADS, target, count, torch.Generator().manual_seed(0))


def off(said):
    """The largest distance between what was said and how often it came, over tenths of probability."""
    worst = 0.0
    happened = said.happened()
    for edge in range(said.above.shape[1]):
        place = (said.above[:, edge] * 10).long().clamp(max=9)
        for tenth in range(10):
            here = place == tenth
            if here.sum() > 400:
                difference = said.above[here, edge].mean() - happened[here, edge].mean()
                worst = max(worst, abs(float(difference)))
    return worst


def test_pixels_are_drawn_from_the_observed_ones_with_their_own_probabilities():
    forecast, target = a_world(batch=2, side=8)
    target[0] = torch.nan
    target[1, 1, 3:] = torch.nan
    said = some(forecast, target, count=30)

    assert said.lead_time.tolist() == [5.0] * 30 + [20.0] * 24 + [60.0] * 30
    whole = above(forecast.probability)
    places = {tuple(values.tolist()) for values in whole[1, 1, :, :3].flatten(1).T}
    assert {tuple(values.tolist()) for values in said.above[30:54]} == places
    assert said.happened().sum(dim=1).tolist() == said.fell.tolist()


@pytest.mark.parametrize(("sureness", "bias"), [(2.0, 0.0), (0.5, 0.0), (1.0, 1.0), (1.5, -1.0)])
def test_what_is_too_sure_or_too_wet_becomes_reliable_on_other_data(sureness, bias):
    calibration = fitted(some(*a_world(0, sureness, bias)))
    raw = some(*a_world(1, sureness, bias))

    assert off(raw) > 0.06
    assert off(calibration.of(raw)) < 0.03
    assert (cost(calibration.of(raw)) < cost(raw)).all()
    line = calibration.line(LEADS)
    torch.testing.assert_close(line[..., 1], torch.full((3, 3), 1 / sureness), atol=0.12, rtol=0)
    torch.testing.assert_close(line[..., 0], torch.full((3, 3), -bias / sureness), atol=0.12, rtol=0)


@pytest.mark.parametrize(("sureness", "bias"), [(2.0, 0.0), (1 / 1.2, 0.0), (1.0, 0.1)])
def test_of_a_million_pixels_it_believes_fifty(sureness, bias):
    raw = Exceedances.joined([some(*a_world(seed, sureness, bias)) for seed in range(10)])
    assert len(raw.fell) == 960_000
    as_it_is, believed, best = (cost(raw), cost(Calibration.fitted(raw).of(raw)), cost(fitted(raw).of(raw)))
    assert (believed < as_it_is).all()
    assert (as_it_is - believed).sum() > 0.3 * (as_it_is - best).sum()


def test_each_lead_time_has_its_own_line():
    sure, forecast_target = a_world(0, 1.0), a_world(0, 3.0)
    mixed = torch.cat([sure[0].probability[:, :2], forecast_target[0].probability[:, 2:]], dim=1)
    slopes = fitted(some(BinnedForecast(mixed, BINS), sure[1])).line(LEADS)[:, 0, 1]
    assert slopes[0] > slopes[1] > slopes[2]
    far = fitted(some(BinnedForecast(mixed, BINS), sure[1]))
    torch.testing.assert_close(far.line(torch.tensor([60.0])), far.line(torch.tensor([600.0])))


def test_few_pixels_change_next_to_nothing_and_no_event_changes_nothing_much():
    forecast, target = a_world(0, 2.0, batch=1, side=4)
    few = Calibration.fitted(some(forecast, target))
    assert abs(few.line(LEADS)[..., 1] - 1).max() < 0.05
    never = replace(some(*a_world(0)), fell=torch.zeros(len(some(*a_world(0)).fell), dtype=torch.int64))
    rare = fitted(replace(never, above=never.above * 1e-5))
    assert rare.line(LEADS).isfinite().all()
    with pytest.raises(ValueError, match="no observed pixel to calibrate on"):
        Calibration.fitted(some(forecast, torch.full_like(target, torch.nan)))


def test_the_calibrated_forecast_is_a_distribution_and_agrees_with_the_pixels():
    forecast, target = a_world(0, 2.0, 0.5)
    steep = Calibration(
        (0.0, -1.0, 0.5),
        ((0.3, 0.1), (1.0, -0.5), (-1.0, 0.4)),
        ((0.1, 0.1), (0.0, -0.2), (0.0, 0.0)),
        (5.0, 60.0),
    )
    said = steep(forecast, LEADS)

    again = replace(forecast, probability=forecast.probability.clone())
    assert steep.in_place(again, LEADS).probability.data_ptr() == again.probability.data_ptr()
    assert torch.equal(again.probability, said.probability)
    assert (said.probability >= 0).all()
    torch.testing.assert_close(said.probability.sum(dim=2), torch.ones_like(said.probability[:, :, 0]))
    torch.testing.assert_close(some(said, target).above, steep.of(some(forecast, target)).above)
    assert (said.probability_above(1.0) <= said.probability_above(0.1)).all(), "lines that cross"


def test_nothing_learned_leaves_the_forecast_as_it_is():
    forecast, _ = a_world()
    assert torch.equal(identity(BINS)(forecast, LEADS).probability, forecast.probability)


def test_a_calibration_can_be_undone():
    forecast, target = a_world(0, 2.0, 0.5)
    calibration = fitted(some(forecast, target))
    said = calibration(forecast, LEADS)
    lines = calibration.line(LEADS)[None, ..., None, None]
    back = undone(above(said.probability), lines[:, :, :, 0], lines[:, :, :, 1])
    torch.testing.assert_close(back, above(forecast.probability), atol=1e-4, rtol=0)
    assert undone(torch.tensor([torch.nan]), torch.zeros(1), torch.ones(1)).isnan().all()


def test_edges_that_are_not_kept_stay_as_they_are():
    forecast, target = a_world(0, 2.0, 0.5)
    calibration = fitted(some(forecast, target))
    line, some_edges = calibration.line(LEADS), calibration.only([True, False, True]).line(LEADS)
    assert torch.equal(some_edges[:, [0, 2]], line[:, [0, 2]])
    torch.testing.assert_close(some_edges[:, 1], torch.tensor([0.0, 1.0]).expand(3, 2))

    highest = calibration.only([False, False, True])
    said = highest(forecast, LEADS)
    assert torch.equal(said.probability[:, :, :2], forecast.probability[:, :, :2])
    assert not torch.allclose(said.probability[:, :, 3], forecast.probability[:, :, 3], atol=1e-3)
    torch.testing.assert_close(some(said, target).above, highest.of(some(forecast, target)).above)


def test_the_card_gives_it_back():
    calibration = fitted(some(*a_world(0, 2.0)))
    assert Calibration.from_card(calibration.card(), edges=3) == calibration


@pytest.mark.parametrize(
    "damage",
    [
        {"level": [[0.0, 0.0]] * 2},
        {"drift": [[0.0, float("nan")]] * 3},
        {"lead_times": [60.0, 5.0]},
        {"lead_times": [0.0, 5.0]},
        {"level": "much"},
        {"centre": [0.0]},
        {"drift": None},
    ],
)
def test_a_damaged_card_is_refused(damage):
    with pytest.raises(ValueError, match="calibration: expected"):
        Calibration.from_card({**identity(BINS).card(), **damage}, edges=3)


def test_parts_join():
    said = some(*a_world(batch=1, side=8))
    twice = Exceedances.joined([said, said])
    assert len(twice.fell) == 2 * len(said.fell) and torch.allclose(cost(twice), cost(said))
