from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import uniform_filter

from metnet.advection import advect, carry_ahead
from metnet.batch import Batch
from metnet.mended import mended
from metnet.model import STILL, MetNet, Moving, _to_carry, climatology
from metnet.prior import FINE, SIDES, AdvectionPrior, Pixels, _share, box_mean, means, pixels
from metnet.rain import RainBins

BINS = RainBins((0.1, 1.0, 5.0), 50.0)
LEADS = torch.tensor([5.0, 30.0, 60.0])
AHEAD = LEADS[None, None]  # of the one frame of one sample


def a_batch(rows=48, columns=64, frames=4, seed=0, speed=(0.4, -0.2)):
    """Smooth rain that moves by `speed` cells a minute (east, south)."""
    random = np.random.default_rng(seed)
    rain = uniform_filter(random.gamma(0.3, 20.0, (rows, columns)), 5).astype(np.float32)
    rain[rain < 3] = 0
    newest = torch.from_numpy(rain)[None]
    motion = torch.tensor(speed)[None, :, None, None].expand(1, 2, rows, columns).contiguous()
    age = torch.arange(frames - 1, -1, -1.0) * 5
    radar = advect(newest, motion, -age).nan_to_num()
    return Batch(radar, age[None], torch.tensor([0]), LEADS, torch.tensor([1000.0]), motion)


def small(**arguments):
    torch.manual_seed(0)
    return MetNet(frames=4, channels=16, fine_channels=8, depth=1, bins=BINS, grid=(12, 16), **arguments)


def test_before_training_the_forecast_is_the_widened_extrapolation():
    batch = a_batch()
    batch.radar[:, -1, 12:30, 20:45] = torch.nan  # filled by the frame before, and in part of that too
    batch.radar[:, -2, 20:30, 30:45] = torch.nan
    network = small()
    with torch.no_grad():
        probability = network(batch).probability[0]
    prior = network.prior
    radar, ages = batch.radar[:, -3:].flip(1), batch.age[:, -3:].flip(1)
    together = [advect(radar[:, n], batch.motion, ages[0, n : n + 1]) for n in range(3)]
    further = mended(batch.motion, torch.cat(together, dim=1), ages)
    carried = carry_ahead(radar[:, :1], further, LEADS)[0, 0]
    minutes = torch.zeros_like(carried)  # since each value was seen
    for back, age in ((1, 5.0), (2, 10.0)):
        older = carry_ahead(together[back], further, LEADS)[0, 0]
        filled = carried.isnan() & ~older.isnan()
        carried, minutes = torch.where(filled, older, carried), minutes.masked_fill(filled, age)
    usual = np.array(climatology(BINS))
    each = {age: prior.weights(LEADS + age, torch.full((3,), 1000.0)) for age in (0.0, 5.0, 10.0)}
    for n, field in enumerate(carried.numpy()):
        classes = np.where(np.isnan(field), -1, np.digitize(field, BINS.edges))
        of_age = sum(
            (minutes[n] == age).numpy()[..., None, None] * each[age][n].detach().numpy() for age in each
        )
        weights = np.moveaxis(of_age, (2, 3), (1, 0))[None]  # (1, part, bin, y, x)
        onehot = np.stack([(classes == k).astype(float) for k in range(len(BINS))])
        seen = (classes >= 0).astype(float)
        total = weights[0, -1] * usual[:, None, None]
        near = usual[:, None, None]
        for part in reversed(range(len(SIDES))):
            coarse = 4 if part >= 2 else 1
            cells = np.stack([blocked(one) if coarse > 1 else one for one in (*onehot, seen)])
            *shares, known = (uniform_filter(one, SIDES[part] // coarse, mode="constant") for one in cells)
            if part == len(SIDES) - 1:  # a tenth of climatology for what is unknown of the widest
                near = (shares + 0.1 * (1 - known) * near) / (known + 0.1 * (1 - known))
            else:  # else as the next wider says
                near = shares + (1 - known) * (upsampled(near) if part == 1 else near)
            total = total + weights[0, part] * (upsampled(near) if coarse > 1 else near)
        expected = total / total.sum(axis=0)
        np.testing.assert_allclose(probability[n].numpy(), expected, atol=1e-3)


def blocked(field):
    return field.reshape(field.shape[0] // 4, 4, field.shape[1] // 4, 4).mean(axis=(1, 3))


def upsampled(blocks):
    """Bilinear between the middles of the blocks."""
    for axis in (1, 2):
        size = blocks.shape[axis]
        place = np.clip((np.arange(4 * size) + 0.5) / 4 - 0.5, 0, size - 1)
        low = np.minimum(place.astype(int), size - 2)
        share = (place - low).reshape([-1 if n == axis else 1 for n in range(3)])
        blocks = blocks.take(low, axis) * (1 - share) + blocks.take(low + 1, axis) * share
    return blocks


def test_the_further_ahead_the_wider_the_neighbourhoods_that_count():
    weights = AdvectionPrior(BINS, climatology(BINS)).weights(LEADS, torch.full((3,), 1000.0))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, len(BINS)))
    typical = (weights[..., :-1] * torch.tensor(SIDES)).sum(dim=-1)
    assert (typical.diff(dim=0) > 0).all()
    assert (weights[..., -1].diff(dim=0) > 0).all(), "so does climatology"


def test_nothing_observed_is_climatology_and_nothing_else():
    prior = AdvectionPrior(BINS, climatology(BINS))
    said = prior(torch.full((1, 3, 16, 16), torch.nan), AHEAD, torch.tensor([1000.0])).exp()
    expected = torch.tensor(climatology(BINS))[:, None, None].expand(len(BINS), 16, 16)
    for lead in range(3):
        torch.testing.assert_close(said[0, lead], expected)


def test_a_hole_in_the_newest_frame_is_filled_by_the_one_before():
    whole = a_batch()
    radar = whole.radar.clone()
    radar[:, -1, :, 20:40] = torch.nan
    holed = Batch(radar, whole.age, whole.init_time, LEADS, whole.cell_size, whole.motion)
    radar = whole.radar.clone()
    radar[:, -3:] = torch.nan
    blind = Batch(radar, whole.age, whole.init_time, LEADS, whole.cell_size, whole.motion)
    network = small()
    with torch.no_grad():
        full, patched, unseen = (network(batch).mean() for batch in (whole, holed, blind))
    assert torch.isfinite(unseen).all()
    assert (patched - full).abs().mean() < 0.2 * (unseen - full).abs().mean()


def test_a_value_counts_as_far_ahead_as_it_was_carried():
    prior = AdvectionPrior(BINS, climatology(BINS))
    for weight in prior.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    batch = a_batch()
    carried, cell = advect(batch.radar[:, -1], batch.motion, LEADS), torch.tensor([1000.0])
    frame = (torch.rand(carried.shape) < 0.3).to(torch.uint8)
    with torch.no_grad():
        said = prior(carried, torch.cat([AHEAD + 5, AHEAD + 25], dim=1), cell, frame)
        fresh, stale = (prior(carried, AHEAD + age, cell) for age in (5.0, 25.0))
    older = (frame == 1)[:, :, None]
    torch.testing.assert_close(said, torch.where(older, stale, fresh))


def test_the_older_the_newest_frame_the_wider_the_forecast():
    network, entropies = small(), []
    for late in (0.0, 10.0, 30.0):
        batch = a_batch(speed=(0.0, 0.0))
        with torch.no_grad():
            probability = network(replace(batch, age=batch.age + late)).probability
        entropies.append(-(probability * probability.log()).sum(dim=2).mean().item())
    assert entropies[0] < entropies[1] < entropies[2]


def test_frames_that_are_missing_are_as_frames_that_are_late():
    gone = a_batch()
    gone.radar[:, -2:] = torch.nan
    late = replace(gone, radar=gone.radar.roll(2, 1), age=gone.age + 10)
    network = small()
    with torch.no_grad():
        torch.testing.assert_close(network(gone).probability, network(late).probability)


def test_of_frames_that_were_lost_the_last_one_left_is_carried():
    batch = a_batch()
    batch.radar[:, 1:] = torch.nan
    with torch.no_grad():
        said = small()(batch).mean()
    lost = replace(batch, radar=torch.full_like(batch.radar, torch.nan))
    with torch.no_grad():
        nothing = small()(lost).mean()
    assert (said - nothing).abs().max() > 0.5


def test_every_weight_of_network_and_prior_learns():
    batch = replace(a_batch(), cell_size=torch.tensor([2000.0]))
    network = small()
    for name, weight in network.named_parameters():
        if "tell" in name or "classify" in name or "local.last" in name:  # the identity, or nothing
            torch.nn.init.normal_(weight, std=0.1)
    network.logits(batch).square().mean().backward()
    still = [
        name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()
    ]

    assert still == []


def test_without_motion_it_says_what_is_missing():
    batch = a_batch()
    still = Batch(batch.radar, batch.age, batch.init_time, LEADS, batch.cell_size)
    with pytest.raises(ValueError, match="no motion"):
        small()(still)
    assert torch.isfinite(small(advection=False)(still).probability).all()


def test_rain_whose_motion_nobody_knows_counts_as_farther_ahead(monkeypatch):
    network, batch = small().eval(), a_batch()
    torch.nn.init.normal_(network.local.last.weight, std=0.3)
    radar = batch.radar.clone()
    radar[:, :-1] = torch.nan  # one frame tells no motion
    alone = replace(batch, radar=radar, motion=torch.zeros_like(batch.motion))
    target = replace(alone, target=torch.ones(1, 3, *radar.shape[2:]))
    assert network.pixels(target, 5, torch.Generator()).lead_time.unique().tolist() == [10.0, 60.0, 120.0]
    with torch.no_grad():
        lost = network(alone).probability
        monkeypatch.setattr("metnet.model.STILL", 1.0)
        torch.testing.assert_close(network(replace(alone, lead_time=2 * LEADS)).probability, lost)
        assert (network(alone).probability - lost).abs().max() > 0.05


def test_each_sample_and_each_part_of_a_grid_counts_as_ahead_by_the_motion_there_is():
    batch = a_batch()
    radar = batch.radar.clone()
    radar[:, :-1] = torch.nan
    still = torch.zeros_like(batch.motion)
    cases = [(radar, still), (batch.radar, still), (radar, batch.motion), (batch.radar, batch.motion)]
    radars, motions = (torch.cat(each) for each in zip(*cases, strict=True))
    age = batch.age.expand(4, -1)
    moving = Moving(*_to_carry(radars, age), motions, motions[:, 0].abs(), batch.cell_size.expand(4), BINS)
    factors = moving.ahead(LEADS)[:, 0] / (LEADS + batch.age[0, -1])
    assert factors.tolist() == [[STILL] * 3, [1.0] * 3, [1.0] * 3, [1.0] * 3]
    one = Moving(radar[:, -1:], batch.age[:, -1:], still, still[:, 0], batch.cell_size, BINS)
    assert torch.equal(one.ahead(LEADS)[0, 0], LEADS + batch.age[0, -1]), "of a network that sees one"


def test_a_newest_frame_that_comes_late_is_carried_as_one_in_time_is_to_as_much_later():
    batch = a_batch()
    radar, age = _to_carry(batch.radar, batch.age)
    slow, sure = batch.motion / 2, torch.zeros_like(batch.motion[:, 0])
    now, late = (Moving(radar, age + by, slow, sure, batch.cell_size, BINS) for by in (0.0, 20.0))
    assert (now.mended - slow).abs().max() > 1e-3
    torch.testing.assert_close(late.carried(LEADS), now.carried(LEADS + 20), equal_nan=True)
    torch.testing.assert_close(late.changes.paces, now.changes.paces)


def some_pixels(spread, cell=1000.0, seed=0):
    """Rain that is carried well, and then lies up to `spread` cells elsewhere."""
    random = np.random.default_rng(seed)
    carried, fell = [], []
    for n in range(12):
        rain = a_batch(64, 64, seed=100 * seed + n).radar[0, -1].numpy()
        carried.append(rain)
        fell.append(np.roll(rain, random.integers(-spread, spread + 1, 2), axis=(0, 1)))
    field, target = (torch.from_numpy(np.stack(each))[:, None] for each in (carried, fell))
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.full((12,), cell)
    return pixels(BINS, field, torch.full((12, 1, 1), 30.0), sizes, target, 1500, generator)


def cross_entropy(prior, some):
    return torch.nn.functional.nll_loss(prior.at(some), some.fell).item()


def test_single_pixels_get_what_the_whole_field_gets():
    prior = AdvectionPrior(BINS, climatology(BINS))
    for weight in prior.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    batch = a_batch(32, 32)
    carried = advect(batch.radar[:, -1], batch.motion, LEADS)
    target, cell = torch.full_like(carried, torch.nan), torch.tensor([500.0])
    target[0, 1, 20, 7] = 3.0  # the only observed pixel
    some = pixels(BINS, carried, AHEAD, cell, target, 3, torch.Generator().manual_seed(0))
    assert some.fell.tolist() == [2, 2, 2] and some.lead_time.tolist() == [30.0] * 3
    with torch.no_grad():
        torch.testing.assert_close(prior.at(some)[0], prior(carried, AHEAD, cell)[0, 1, :, 20, 7])
    ahead, frame = torch.cat([AHEAD, AHEAD + 15], dim=1), torch.zeros_like(carried, dtype=torch.uint8)
    frame[0, 1, 20, 7] = 1
    old = pixels(BINS, carried, ahead, cell, target, 1, torch.Generator().manual_seed(0), frame)
    assert old.lead_time.tolist() == [45.0]
    with torch.no_grad():
        torch.testing.assert_close(prior.at(old)[0], prior(carried, ahead, cell, frame)[0, 1, :, 20, 7])


def test_a_fitted_prior_is_as_wide_as_the_rain_turned_out_to_be_unsure():
    sure, unsure = AdvectionPrior(BINS, climatology(BINS)), AdvectionPrior(BINS, climatology(BINS))
    before = cross_entropy(unsure, some_pixels(12, seed=1))
    sure.fit(some_pixels(0), steps=60)
    unsure.fit(some_pixels(12), steps=60)
    assert cross_entropy(unsure, some_pixels(12, seed=1)) < before
    lead, cell = torch.tensor([30.0]), torch.tensor([1000.0])
    sides = torch.tensor([float(side) for side in SIDES])
    width = [(prior.weights(lead, cell)[0, :, :-1] @ sides).mean().item() for prior in (sure, unsure)]
    assert 1.5 * width[0] < width[1]


def test_cells_of_another_size_get_other_neighbourhoods():
    prior = AdvectionPrior(BINS, climatology(BINS))
    prior.fit(Pixels.joined([some_pixels(1, cell=4000.0), some_pixels(12, cell=500.0)]), steps=60)
    lead = torch.tensor([30.0])
    sides = torch.tensor([float(side) for side in SIDES])
    coarse, fine = (
        (prior.weights(lead, torch.tensor([cell]))[0, :, :-1] @ sides).mean() for cell in (4000.0, 500.0)
    )
    assert coarse < fine
    with pytest.raises(ValueError, match="no observed pixel"):
        nothing = torch.full((1, 1, 16, 16), torch.nan)
        generator = torch.Generator()
        one, size = AHEAD[:, :, :1], torch.tensor([1000.0])
        prior.fit(pixels(BINS, nothing, one, size, nothing, 5, generator))


def test_means_of_squares_are_those_that_trained_weights_have_seen_to_the_bit():
    fields = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    for said, side in zip(means(fields), FINE, strict=False):
        assert torch.equal(said, F.avg_pool2d(fields, side, stride=1, padding=side // 2))


@pytest.mark.parametrize("side", FINE)
def test_shares_counted_in_bytes_are_the_means_to_the_bit(side):
    ones = (torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    ones[0, 0] = 1.0
    assert torch.equal(_share(ones, side), box_mean(ones, side))
