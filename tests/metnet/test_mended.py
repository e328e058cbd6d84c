"""A motion that lags behind the rain is put right, where there is rain to tell it and nowhere else."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from metnet.advection import advect
from metnet.mended import FARTHEST, mended

AGES = torch.tensor([[0.0, 5.0, 10.0]])
TRUE = (0.9, -0.6)  # cells a minute
SIDE = 160


def uniform(x: float, y: float, side: int = SIDE) -> torch.Tensor:
    return torch.tensor([x, y]).view(1, 2, 1, 1).repeat(1, 1, side, side)


def frames(true: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Rain that moves so, as it was seen, the newest first; its lumps are some 30 cells wide."""
    noise = np.random.default_rng(seed).normal(size=(SIDE, SIDE))
    rain = torch.from_numpy((gaussian_filter(noise, 8, mode="wrap") * 60).clip(0)).float()[None]
    return torch.stack([advect(rain, true, 10 - age[None])[:, 0] for age in AGES[0]], dim=1)


def together(seen: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    each = [advect(seen[:, n], flow, AGES[0, n : n + 1]) for n in range(seen.shape[1])]
    return torch.cat(each, dim=1)


@pytest.mark.parametrize("share", [0.7, 0.9, 1.0, 1.2])
def test_a_motion_that_lags_or_hurries_is_put_right(share):
    true = uniform(*TRUE)
    flow = share * true

    told = mended(flow, together(frames(true), flow), AGES)

    wrong, left = ((each - true)[..., 30:-30, 30:-30].norm(dim=1).mean().item() for each in (flow, told))
    assert left < max(0.2 * wrong, 0.02)


def test_along_it_rain_is_forecast_with_less_than_half_the_error_of_a_flow_too_slow():
    true = uniform(*TRUE)
    flow = 0.85 * true
    seen = frames(true)
    told = mended(flow, together(seen, flow), AGES)
    ahead = torch.tensor([30.0])
    fell = advect(seen[:, 0], true, ahead)
    wrong, left = ((advect(seen[:, 0], way, ahead) - fell).abs().nanmean() for way in (flow, told))
    assert left < 0.5 * wrong


def test_where_nothing_shows_it_the_motion_stays_as_it_is():
    flow = torch.randn(1, 2, SIDE, SIDE)
    seen = frames(uniform(*TRUE))
    assert torch.equal(mended(flow, seen[:, :1], AGES[:, :1]), flow)  # a single frame
    assert torch.equal(mended(flow, torch.full_like(seen, torch.nan), AGES), flow)
    assert torch.equal(mended(flow, torch.zeros_like(seen), AGES), flow)
    assert torch.equal(mended(flow, seen[:, :1].repeat(1, 3, 1, 1), AGES), flow)
    assert torch.equal(mended(flow, seen, torch.zeros(1, 3)), flow)  # the same time again and again


def test_an_unobserved_frame_is_left_out_and_an_unobserved_part_of_one_tells_nothing():
    true = uniform(*TRUE)
    flow = 0.8 * true
    shown = together(frames(true), flow)
    lost = shown.clone()
    lost[:, 2] = torch.nan
    assert torch.equal(mended(flow, lost, AGES), mended(flow, shown[:, :2], AGES[:, :2]))
    between = torch.stack([shown[:, 0], torch.full_like(shown[:, 0], torch.nan), shown[:, 2]], dim=1)
    ages = torch.tensor([[0.0, 1.0, 10.0]])  # as empty frames come in: an age that tells nothing either
    assert torch.equal(mended(flow, between, ages), mended(flow, shown[:, ::2], AGES[:, ::2]))
    hidden, wild = shown.clone(), shown.clone()
    hidden[:, 0, :, 64:] = torch.nan
    wild[:, 0, :, 64:] = torch.nan
    wild[:, 1:, :, 64:] = 100.0 * torch.rand(1, 2, SIDE, SIDE - 64)
    assert torch.equal(mended(flow, hidden, AGES), mended(flow, wild, AGES))


def test_the_edge_of_what_is_observed_does_not_stand_still_beside_moving_rain():
    true = uniform(*TRUE)
    flow = 0.8 * true
    edge = together(frames(true), flow)
    edge[:, :, :, 80:] = torch.nan  # a radar's edge: there in every frame, wherever rain goes
    left = (mended(flow, edge, AGES) - true)[:, :, 30:-30, 30:80].norm(dim=1).max()
    assert left < 0.2 * (flow - true).norm(dim=1).max()


def test_the_older_a_frame_the_more_it_tells():
    true = uniform(*TRUE)
    flow = 0.8 * true
    ages = torch.tensor([[0.0, 5.0, 10.0]])
    shown = together(frames(true), flow)
    wrong = shown.clone()
    wrong[:, 1] = together(frames(-true, seed=1), flow)[:, 1]  # the next newest is of something else

    left = (mended(flow, wrong, ages) - true)[..., 30:-30, 30:-30].norm(dim=1).mean()

    assert left < 0.4 * (flow - true).norm(dim=1).mean()


def test_of_a_few_cells_hardly_anything_is_believed():
    noise = torch.full((1, 3, SIDE, SIDE), torch.nan)
    noise[..., 72:88, 72:88] = 20 * torch.rand(1, 3, 16, 16)
    flow = torch.zeros(1, 2, SIDE, SIDE)
    assert mended(flow, noise, AGES).abs().max() < 0.05


@pytest.mark.parametrize("shape", [(4, 4), (4, 40), (40, 4), (8, 8)])
def test_on_the_smallest_grids_the_motion_stays_as_it_is_or_is_finite(shape):
    shown = 20 * torch.rand(1, 3, *shape)
    assert mended(torch.zeros(1, 2, *shape), shown, AGES).isfinite().all()


def test_east_and_south_are_alike_and_samples_do_not_see_each_other():
    true, flow = uniform(*TRUE), uniform(0.5, -0.5)
    shown = together(frames(true), flow)
    told = mended(flow, shown, AGES)
    turned = mended(flow.mT.flip(1), shown.mT, AGES)
    torch.testing.assert_close(turned.mT.flip(1), told, atol=1e-4, rtol=0)
    other = together(frames(uniform(-1.0, 0.3), seed=1), flow)
    both = mended(flow.repeat(2, 1, 1, 1), torch.cat([shown, other]), AGES.repeat(2, 1))
    torch.testing.assert_close(both[:1], told, atol=1e-5, rtol=0)


def test_frames_that_have_nothing_in_common_move_it_no_farther_than_flow_may_lack():
    """Rain a hundred times as strong all over as 5 minutes before, and far stronger in the east."""
    slope = 10 ** ((1 + 3 * torch.arange(SIDE) / SIDE).expand(SIDE, SIDE))
    shown = torch.stack([slope, slope / 100, slope / 100])[None]

    told = mended(torch.zeros(1, 2, SIDE, SIDE), shown, AGES)

    assert told.abs().max().item() == pytest.approx(4 * FARTHEST / 5.0)
    shown[:, 2] = torch.nan  # an empty frame, whenever it should have been
    far = mended(torch.zeros(1, 2, SIDE, SIDE), shown, torch.tensor([[0.0, 10.0, 5.0]]))
    assert far.abs().max().item() == pytest.approx(4 * FARTHEST / 10.0)
