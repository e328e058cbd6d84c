"""The cascade: levels that add up, and rain of each size that goes on as its own frames did."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from metnet.cascade import DRY, LEVELS, Lags, Levels, continued, decibel

AGE = torch.tensor([[0.0, 5.0, 10.0]])


def noise(side, seed, size=192):
    """Smooth noise with lumps of about `side` cells and the variance 1."""
    field = gaussian_filter(np.random.default_rng(seed).normal(size=(size, size)), side, mode="wrap")
    return torch.from_numpy((field / field.std()).astype(np.float32))


def rain(decibels):
    """mm/h."""
    return 10 ** (decibels / 10)


def process(first, second, side, frames, seed=0):
    """Frames in dB of an autoregression with these correlations over one step and two, the newest first."""
    one, two = first * (1 - second) / (1 - first**2), (second - first**2) / (1 - first**2)
    left = math.sqrt(1 - one * first - two * second)
    told = [noise(side, seed), noise(side, seed + 1)]
    told[1] = first * told[0] + math.sqrt(1 - first**2) * told[1]
    for step in range(60 + frames):
        told.append(one * told[-1] + two * told[-2] + left * noise(side, seed + 2 + step))
    return torch.stack(told[: -frames - 1 : -1])


def summed(levels):
    """All levels and the mean, at full resolution, on a field of one block's value."""
    return sum(level.mean() for level in levels.each()) + levels.mean.mean()


def test_rain_is_told_in_decibel_and_neither_dry_nor_unseen_is_lost():
    told = decibel(torch.tensor([0.0, 0.05, 0.1, 1.0, 10.0, torch.nan]))
    assert told.tolist() == pytest.approx([DRY, DRY, -10.0, 0.0, 10.0, 0.0], abs=1e-5)


def test_an_even_field_is_its_mean_alone_and_levels_add_up_to_a_field():
    even = Levels.of(torch.full((1, 64, 64), 10.0))
    assert all(level.abs().max() < 1e-4 for level in even.each())
    torch.testing.assert_close(even.mean, torch.full_like(even.mean, 10.0))
    field = rain(5 * noise(3, 0)[None])
    assert summed(Levels.of(field)).item() == pytest.approx(decibel(field).mean().item(), abs=0.3)


@pytest.mark.parametrize("rate", [0.0, 0.3, 10.0])
def test_what_is_not_observed_is_as_what_is_around(rate):
    field = torch.full((1, 128, 128), rate)
    field[:, 40:90, 30:] = torch.nan
    levels = Levels.of(field)
    around = decibel(torch.tensor(rate))
    assert all(level.abs().max() < 1e-3 for level in levels.each())
    torch.testing.assert_close(levels.mean, around.expand_as(levels.mean))
    three = field[:, None].repeat(1, 3, 1, 1)
    told, *_ = continued(field, field, Lags.of(three, AGE).after(torch.tensor([[60.0]]))[:, 0])
    torch.testing.assert_close(told, around.expand_as(told), atol=1e-3, rtol=0)


def test_far_from_all_that_was_observed_it_is_dry():
    levels = Levels.of(torch.full((1, 64, 64), torch.nan))
    assert (levels.mean - DRY).abs().max() < 1e-3 and all(level.abs().max() < 1e-3 for level in levels.each())


def test_the_correlations_are_those_of_the_frames():
    frames = process(0.9, 0.75, 20, 3)
    lags = Lags.of(rain(5 * frames)[None], AGE)
    assert lags.near.shape == lags.far.shape == lags.spread.shape == (1, LEVELS, 12, 12)
    expected = [np.corrcoef(frames[0].flatten(), frames[step].flatten())[0, 1] for step in (1, 2)]
    found = [
        ((part * lags.spread**2).sum() / (lags.spread**2).sum()).item() for part in (lags.near, lags.far)
    ]
    assert found == pytest.approx(expected, abs=0.04)


def turning(steps):
    """A pattern that turns into another one evenly, frame by frame, in dB: the newest frame is step 0."""
    one, other = 6 * noise(14, 1), 6 * noise(14, 2)
    return torch.stack([math.cos(0.25 * step) * one + math.sin(0.25 * step) * other for step in steps])


def test_what_changed_evenly_goes_on_changing_and_what_stands_stays():
    frames, truth = rain(turning((0, -1, -2)))[None], decibel(rain(turning((2,))))
    told, *_ = continued(frames[:, 0], frames[:, 1], Lags.of(frames, AGE).after(torch.tensor([[10.0]]))[:, 0])
    apart = [
        (field - truth)[:, 40:-40, 40:-40].square().mean().sqrt() for field in (told, decibel(frames[:, 0]))
    ]
    assert apart[0] < 0.6 * apart[1]
    still = frames[:, :1].repeat(1, 3, 1, 1)
    told, spread, _ = continued(
        still[:, 0], still[:, 1], Lags.of(still, AGE).after(torch.tensor([[10.0]]))[:, 0]
    )
    torch.testing.assert_close(told, decibel(still[:, 0]), atol=0.6, rtol=0)
    assert spread.max() < 1


def test_with_its_oldest_frame_lost_it_is_of_first_order_and_not_surer_of_itself():
    frames = rain(6 * process(0.9, 0.75, 14, 3))[None]
    whole = Lags.of(frames, AGE)
    frames[:, 2] = torch.nan
    lost = Lags.of(frames, AGE)
    torch.testing.assert_close(lost.near, whole.near, atol=1e-4, rtol=0)
    torch.testing.assert_close(lost.far, (lost.near**2).clamp(max=lost.far.max()), atol=2e-3, rtol=0)
    weights = lost.after(torch.tensor([[30.0]]))
    assert weights[:, :, LEVELS : 2 * LEVELS].abs().max() < 0.05, "the frame before tells no trend"
    assert weights[:, :, -2].min() > 0.5 * whole.after(torch.tensor([[30.0]]))[:, :, -2].min() > 0


def test_it_forecasts_such_a_process_better_than_the_frame_alone_and_knows_how_well():
    frames = 6 * process(0.97, 0.90, 14, 5, seed=3)
    known, truth = rain(frames[2:])[None], frames[0]
    told, spread, _ = continued(
        known[:, 0], known[:, 1], Lags.of(known, AGE).after(torch.tensor([[10.0]]))[:, 0]
    )
    inside = (slice(40, -40),) * 2
    shown = truth.clamp(min=-10)[inside]
    error = (told[0][inside] - shown).square().mean().sqrt()
    assert error < 0.95 * (decibel(known[0, 0])[inside] - shown).square().mean().sqrt()
    assert 0.4 < spread.mean() / error < 2.5


@pytest.mark.parametrize("seen", [1, 200], ids=["a cell", "some cells"])
def test_a_nearly_empty_oldest_frame_is_as_good_as_lost(seen):
    frames = rain(6 * process(0.9, 0.75, 14, 3))[None]
    left = frames[:, 2].clone()
    frames[:, 2] = torch.nan
    lost = Lags.of(frames, AGE).after(torch.tensor([[30.0]]))
    frames[:, 2, 3, :seen] = left[:, 3, :seen]
    nearly = Lags.of(frames, AGE).after(torch.tensor([[30.0]]))
    assert (nearly - lost)[:, :, :-2].abs().max() < 0.05, "weights"
    torch.testing.assert_close(nearly[:, :, -2], lost[:, :, -2], atol=0.3, rtol=0)


def test_the_spread_of_what_was_half_observed_is_that_of_the_whole():
    frames = rain(6 * process(0.9, 0.75, 3, 3))[None]
    whole = Lags.of(frames, AGE).spread
    frames[..., 96:] = torch.nan
    torch.testing.assert_close(Lags.of(frames, AGE).spread[:, :4], whole[:, :4], atol=0.1, rtol=0.2)


def test_rain_that_is_new_is_not_taken_to_last():
    frames = torch.zeros(1, 3, 192, 192)
    frames[:, 0, 90:102, 90:102] = 10.0
    coefficients = Lags.of(frames, AGE).after(torch.tensor([[5.0, 60.0]]))
    (soon, late), (sure, unsure), _ = (
        [told[90:102, 90:102].mean() for told in part]
        for part in continued(frames[:, 0].expand(2, -1, -1), frames[:, 1].expand(2, -1, -1), coefficients[0])
    )
    assert late < soon < 10 and late < 0
    assert unsure > sure > 0


def test_between_steps_the_weights_are_between_theirs_and_long_ones_are_told_apart():
    lags = Lags.of(rain(6 * process(0.9, 0.75, 14, 3))[None], AGE)
    five, between, ten, twenty, hour = lags.after(torch.tensor([[5.0, 7.5, 10.0, 20.0, 60.0]]))[0]
    torch.testing.assert_close(between[: 2 * LEVELS], (five + ten)[: 2 * LEVELS] / 2)
    assert (twenty - hour)[:LEVELS].abs().amax(dim=(1, 2)).min() > 1e-3
    assert (five[-2:] < ten[-2:]).all() and (ten[-2:] < hour[-2:]).all()


def test_slow_swings_of_large_rain_are_kept():
    """Seen at correlations so near to 1 that a margin of a thousandth would damp them."""
    turn = torch.tensor([0.0, -0.05, -0.10])
    one, other = noise(14, 1), noise(14, 2)
    frames = rain(4 * (turn.cos()[:, None, None] * one + turn.sin()[:, None, None] * other))[None]
    truth = decibel(rain(4 * (math.cos(0.3) * one + math.sin(0.3) * other)))[None]
    told, *_ = continued(frames[:, 0], frames[:, 1], Lags.of(frames, AGE).after(torch.tensor([[30.0]]))[:, 0])
    inside = (..., slice(40, -40), slice(40, -40))
    apart = [(field - truth)[inside].square().mean().sqrt() for field in (told, decibel(frames[:, 0]))]
    assert apart[0] < 0.55 * apart[1]


@pytest.mark.parametrize("frames", [1, 2])
def test_with_fewer_frames_nothing_is_made_up(frames):
    fields = rain(5 * torch.stack([noise(8, seed) for seed in range(frames)]))[None]
    coefficients = Lags.of(fields, AGE[:, :frames]).after(torch.tensor([[5.0, 60.0]]))
    assert coefficients.shape == (1, 2, 2 * LEVELS + 2, 12, 12)
    assert coefficients[:, :, : 2 * LEVELS].abs().max() <= 1 + 1e-3, "no trend is told by two frames"
    told, spread, _ = continued(fields[:, 0], fields[:, -1], coefficients[:, 1])
    assert torch.isfinite(told).all() and torch.isfinite(spread).all()
    if frames == 1:
        assert told.std() < 0.9 * decibel(fields[:, 0]).std(), "lumps last as long as such lumps usually do"
        assert (spread > 1).all()


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_frame_that_is_not_there_leaves_the_others_as_they_are(gone):
    fields = rain(5 * torch.stack([noise(8, seed) for seed in range(3)]))[None]
    fields[:, gone] = torch.nan
    coefficients = Lags.of(fields, AGE).after(torch.tensor([[30.0]]))[:, 0]
    newest = fields[:, 0] if gone else fields[:, 1]
    told, spread, _ = continued(newest, fields[:, 1], coefficients)
    assert torch.isfinite(told).all() and torch.isfinite(spread).all()
    assert told.abs().max() < 60


def test_ages_of_every_kind_give_finite_weights():
    fields = rain(5 * torch.stack([noise(8, seed) for seed in range(3)]))[None]
    for ages in ([0.0, 5, 10], [0.0, 5, 20], [30.0, 35, 40], [10.0, 0, 5], [0.0, 0, 0]):
        told = Lags.of(fields, torch.tensor([ages])).after(torch.tensor([[0.0, 1.0, 60.0, 1e4]]))
        assert torch.isfinite(told).all()
