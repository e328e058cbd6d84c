"""`metnet.quantisation`: what a sensor rounds to each class is found in the values that it tells."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from metnet.batch import Batch
from metnet.local import _said
from metnet.model import MetNet, Moving, _newest, _told
from metnet.quantisation import ALIKE, FADES, MANY, SHARED, Steps
from metnet.rain import RainBins

BINS = RainBins.preferred()
EDGES = torch.tensor(BINS.edges)
SIDE = 96


def rain(seed=0, side=SIDE, frames=3):
    """Rain of 0 to some 50 mm/h whose values are fine, and some that is dry."""
    noise = np.random.default_rng(seed).normal(size=(frames, side, side))
    field = np.stack([gaussian_filter(part, 3, mode="wrap") for part in noise])
    decibel = 9 * field / field.std()
    return torch.from_numpy(np.where(decibel > -13, 10 ** (decibel / 10), 0.0).astype(np.float32))[None]


def rounded(field, step):
    """Told in steps of so many mm/h."""
    return (field / step).round() * step


@pytest.mark.parametrize("step", [0.12, 0.3, 0.5])
def test_a_sensor_with_steps_tells_what_it_rounds_to_a_class(step):
    steps = Steps.of(rounded(rain(), step), BINS)
    reached = np.ceil(EDGES.numpy().astype(np.float64) / step - 1e-5) * step - step / 2
    few = (EDGES >= 0.7) & (EDGES <= 5)
    torch.testing.assert_close(
        steps.near[0, few], torch.from_numpy(reached).float()[few], atol=0.02, rtol=0.01
    )
    torch.testing.assert_close(steps.far[0, few], steps.near[0, few])
    least = step / 2
    assert (steps.near[0, step >= EDGES] - least).abs().max() < 0.02


def test_of_rain_to_come_the_edge_between_dry_and_the_least_value_is_that_of_the_class():
    steps = Steps.of(rounded(rain(), 0.5), BINS)
    low = EDGES <= 0.5
    torch.testing.assert_close(steps.far[0, low], EDGES[low])
    after = steps.after(torch.tensor([[0.0, FADES, 600.0]]))
    assert after.shape == (3, len(EDGES))
    torch.testing.assert_close(after[0], steps.near[0])
    torch.testing.assert_close(after[1], (steps.near[0] + (np.e - 1) * steps.far[0]) / np.e)
    torch.testing.assert_close(after[2], steps.far[0])


def test_fine_values_leave_the_edges_where_they_are():
    told = Steps.of(rain(side=256) + 0.001, BINS)
    few = EDGES <= 20
    for part in told:
        torch.testing.assert_close(part[0, few], EDGES[few], rtol=0.01, atol=0)


def test_half_decibels_lie_between_two_of_them():
    decibel = (10 * (rain() + 1e-3).log10() * 2).round() / 2
    near = Steps.of(10 ** (decibel / 10), BINS).near[0]
    low = 10 ** (torch.ceil(10 * EDGES.log10() * 2 - 1e-4) / 2 / 10)
    between = (low + low * 10**-0.05) / 2
    few = (EDGES > 0.8) & (EDGES < 6)
    torch.testing.assert_close(near[few], between[few], rtol=0.01, atol=0)


def test_few_cells_of_a_value_are_hardly_believed_and_many_are():
    frames = torch.zeros(1, 1, 64, 64)
    for count in (SHARED - 1, SHARED, MANY, 900):
        shown = frames.clone()  # of which every second row and column is looked at
        shown[0, 0, ::2, ::2] = torch.where(torch.arange(1024).reshape(32, 32) < count, 0.6, 0.0)
        many = min(count, 1024 - count) if count >= SHARED else 0
        expected = EDGES.lerp(torch.tensor(0.3), many / (many + MANY))
        near = Steps.of(shown, BINS).near[0]
        low = EDGES <= 0.5
        torch.testing.assert_close(near[low], expected[low])
        torch.testing.assert_close(near[~low], EDGES[~low])


def test_an_odd_cell_between_two_steps_changes_next_to_nothing_and_many_do():
    told = rounded(rain(), 0.5)
    places = torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(0))
    shifts = []
    for odd in (1, SIDE * SIDE // 2):
        frames = told.clone()
        frames.flatten(2)[:, :, places[:odd]] = rain().flatten(2)[:, :, places[:odd]]
        frames[0, 0, 2, 2] = 0.98
        shifts.append((Steps.of(frames, BINS).near - Steps.of(told, BINS).near)[0, EDGES == 1].abs().item())
    assert shifts[0] < 0.001
    assert shifts[1] > 0.05


def test_where_light_rain_is_told_only_what_lies_below_the_least_of_it_is_in_doubt():
    steps = Steps.of(rounded(rain(), 0.12), BINS)
    low = BINS.edges.index(0.2)
    torch.testing.assert_close(steps.far[0, low], steps.near[0, low])
    torch.testing.assert_close(steps.near[0, low], torch.tensor(0.18), atol=0.005, rtol=0)
    assert steps.near[0, 0] < 0.07
    assert steps.far[0, 0] == EDGES[0]


def test_a_hole_in_rain_is_not_dry():
    wet = rounded(rain(), 0.5).clamp(min=0.5)
    hole = wet.clone()
    hole[:, :, : SIDE // 2] = torch.nan
    torch.testing.assert_close(Steps.of(hole, BINS).near[0, :4], EDGES[:4])


def test_values_that_rounding_sets_apart_are_one():
    alike = torch.full((1, 1, 16, 16), 0.6)
    alike[..., ::4, :] = 1.2
    frames = alike.clone()
    frames[..., 2::4] *= 1 + ALIKE / 4
    for one, other in zip(Steps.of(frames, BINS), Steps.of(alike, BINS), strict=True):
        torch.testing.assert_close(one, other, rtol=ALIKE, atol=0)


@pytest.mark.parametrize("value", [torch.nan, 0.0, 200.0])
def test_of_one_value_alone_or_none_nothing_is_known(value):
    steps = Steps.of(torch.full((2, 3, 16, 16), value), BINS)
    for part in steps:
        torch.testing.assert_close(part, EDGES.expand(2, -1))


def test_what_was_not_observed_changes_nothing_and_samples_stand_by_themselves():
    fine, coarse = rain(1), rounded(rain(2), 0.5)
    hole = coarse.clone()
    hole[:, 1, 20:40] = torch.nan
    both = Steps.of(torch.cat([fine, hole]), BINS)
    torch.testing.assert_close(both.near[:1], Steps.of(fine, BINS).near)
    torch.testing.assert_close(both.near[1], Steps.of(coarse, BINS).near[0], rtol=0.02, atol=0)
    assert (both.near.diff(dim=1) >= 0).all()
    assert (both.far.diff(dim=1) >= 0).all()


def network():
    """Untrained, but what is local counts, and tells smooth distributions that differ from pixel to pixel."""
    torch.manual_seed(0)
    made = MetNet(3, channels=8, fine_channels=4, depth=0, grid=(8, 8), local=8).eval()
    made.local._begin(3.0)
    torch.nn.init.normal_(made.local.last.weight, std=0.02)
    made.local.pool.copy_(torch.tensor([0.0, 0.0]))
    return made


def batch_of(*radars):
    """Samples whose rain stands still and is looked for 5 and 20 minutes ahead."""
    count = len(radars)
    target = torch.cat([rounded(rain(4, frames=2), 0.5)] * count)
    ages, times = torch.tensor([[10.0, 5.0, 0.0]] * count), torch.zeros(count, dtype=torch.int64)
    motion, size = torch.zeros(count, 3, SIDE, SIDE), torch.full((count,), 1000.0)
    return Batch(
        torch.cat(radars), ages, times, torch.tensor([5.0, 20.0]), size, motion=motion, target=target
    )


def test_a_smooth_distribution_tells_no_class_that_the_sensor_does_not():
    """In steps of 0.5 mm/h nothing is told between 0.7 and 1 mm/h; what is told as 1 begins at 0.75."""
    fine, told = (network()(batch_of(radar)).probability for radar in (rain(3), rounded(rain(3), 0.5)))
    untold = BINS.edges.index(0.7) + 1
    assert told[:, :, untold].mean() < 0.2 * fine[:, :, untold].mean()


def test_each_sample_of_a_batch_has_the_steps_of_its_own_sensor():
    made, radars = network(), (rain(3), rounded(rain(3), 0.5))
    both = made(batch_of(*radars)).probability
    for index, radar in enumerate(radars):
        alone = made(batch_of(radar)).probability
        torch.testing.assert_close(both[index : index + 1], alone, atol=1e-5, rtol=0)
    drawn = made.pixels(batch_of(*radars), 50, torch.Generator().manual_seed(0))
    expected = Steps.of(torch.cat(radars), BINS).after(torch.tensor([[5.0, 20.0]] * 2))
    torch.testing.assert_close(drawn.reached, expected.repeat_interleave(50, dim=0))
    said = _said(made.prior, drawn)
    halves = [torch.arange(100), torch.arange(100, 200)]
    costs = [made.local._cost(drawn.some(half), said[half]) for half in halves]
    torch.testing.assert_close(made.local._cost(drawn, said), sum(costs) / 2)


def test_the_steps_are_those_of_the_frames_as_they_were_told_not_as_they_were_carried():
    radar = rounded(rain(5), 0.5)
    known = torch.tensor([[0.0, 5.0, 10.0]]), torch.full((1, 2, SIDE, SIDE), 0.37), torch.zeros(1, SIDE, SIDE)
    moving = Moving(radar, *known, torch.tensor([1000.0]), BINS)
    torch.testing.assert_close(moving.steps.near, Steps.of(radar, BINS).near)
    assert (Steps.of(moving.together, BINS).near - moving.steps.near).abs().max() > 0.05
    lead = torch.tensor([30.0])
    carried = moving.carried(lead)
    seen = carried, *_newest(carried), moving.ahead(lead), moving.age, moving.doubt, moving.changes
    near, far = moving.steps
    says, alike, other = (_told(Steps(*pair), *seen)[1] for pair in ((near, far), (near, near), (far, far)))
    assert torch.equal(says, alike), "the chances are of what is carried, and so lies between two values"
    assert (says - other).abs().max() > 0.01
