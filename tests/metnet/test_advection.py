"""Rain goes where the motion carries it, and nothing is made up where nothing was seen."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metnet.advection import KEPT, advect, carry_ahead, come_from


def uniform(x: float, y: float, shape: tuple[int, int]) -> torch.Tensor:
    return torch.tensor([x, y]).view(1, 2, 1, 1).expand(1, 2, *shape).clone()


def leads(*minutes: float) -> torch.Tensor:
    return torch.tensor(minutes)


def blob(shape: tuple[int, int], x: float, y: float, width: float = 4.0) -> torch.Tensor:
    rows, columns = torch.arange(shape[0])[:, None], torch.arange(shape[1])
    return 10 * torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * width**2))


def test_a_shift_by_whole_cells_is_exact_and_rain_moves_along_the_motion():
    rain = torch.rand(1, 12, 15)

    moved = advect(rain, uniform(2.0, -1.0, (12, 15)), leads(1.0, 3.0))

    assert torch.equal(moved[0, 0, :11, 2:], rain[0, 1:, :13])  # 2 to the east, 1 to the north
    assert torch.equal(moved[0, 1, :9, 6:], rain[0, 3:, :9])
    assert moved[0, 0, 11].isnan().all() and moved[0, 0, :, :2].isnan().all()


def test_half_a_cell_is_the_mean_of_two():
    rain = torch.tensor([[[0.0, 4.0, 8.0]]])

    moved = advect(rain, uniform(0.5, 0.0, (1, 3)), leads(1.0))

    assert moved[0, 0, 0].tolist()[1:] == [2.0, 6.0]
    assert math.isnan(moved[0, 0, 0, 0])  # half of it from outside is not enough


def test_unobserved_is_never_smeared_into_rain_nor_rain_into_unobserved():
    rain = torch.full((1, 1, 6), 5.0)
    rain[0, 0, 2] = torch.nan

    moved = advect(rain, uniform(0.25, 0.0, (1, 6)), leads(1.0))[0, 0, 0]

    # cell 2 is 3/4 unobserved, cell 3 is 1/4 unobserved, cell 0 is 3/4 inside the grid
    assert moved.isnan().tolist() == [False, False, True, False, False, False]
    assert moved[~moved.isnan()].tolist() == [5.0] * 5


def test_nothing_observed_stays_nothing_and_dry_stays_dry():
    unseen = torch.full((1, 5, 5), torch.nan)
    motion = torch.randn(1, 2, 5, 5)

    assert advect(unseen, motion, leads(3.0)).isnan().all()
    dry = advect(torch.zeros(1, 5, 5), motion * 0.1, leads(3.0))
    assert (dry[~dry.isnan()] == 0).all() and (~dry.isnan()).any()


def test_without_motion_or_time_the_field_stays():
    rain = torch.rand(2, 30, 41)
    rain[0, 3:9] = torch.nan

    still = advect(rain, torch.zeros(2, 2, 30, 41), leads(5.0, 60.0))
    assert torch.equal(still.nan_to_num(-1), rain[:, None].expand_as(still).nan_to_num(-1))

    now = advect(rain, torch.randn(2, 2, 30, 41), leads(0.0))
    assert torch.equal(now[:, 0].nan_to_num(-1), rain.nan_to_num(-1))


def test_trajectories_follow_a_rotation():
    """Oracle: under rigid rotation a storm a quarter turn later lies where the turn takes it."""
    size, middle, turn = 101, 50, 90.0  # minutes for a quarter turn
    place = torch.arange(size) - float(middle)
    rate = math.pi / 2 / turn
    motion = torch.stack([-rate * place[:, None].expand(size, size), rate * place.expand(size, size)])[None]
    storm = blob((size, size), x=middle + 25, y=middle)

    moved = advect(storm[None], motion, leads(turn))[0, 0]

    expected = blob((size, size), x=middle, y=middle + 25)  # east turns to south: y counts down the rows
    known = ~moved.isnan()
    assert known[20:80, 20:80].all()
    assert (moved - expected)[known].abs().max() < 0.1  # of 10, by bilinear sampling


def test_one_lead_time_does_not_depend_on_the_others():
    rain, motion = torch.rand(1, 20, 20), 0.5 * torch.randn(1, 2, 1, 1) + 0.05 * torch.randn(1, 2, 20, 20)

    together = advect(rain, motion.expand(1, 2, 20, 20), leads(5.0, 10.0, 15.0))
    alone = advect(rain, motion.expand(1, 2, 20, 20), leads(15.0))

    torch.testing.assert_close(together[:, 2:], alone, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_bands_of_rows_do_not_show(monkeypatch):
    rain, motion = torch.rand(2, 40, 17), torch.randn(2, 2, 40, 17)
    once = advect(rain, motion, leads(2.0, 4.0))

    monkeypatch.setattr("metnet.advection.CELLS_AT_ONCE", 2 * 17 * 3)

    torch.testing.assert_close(advect(rain, motion, leads(2.0, 4.0)), once, rtol=0, atol=0, equal_nan=True)


def test_batches_do_not_mix():
    rain, motion = torch.rand(3, 9, 8), torch.randn(3, 2, 9, 8)

    together = advect(rain, motion, leads(1.0))

    for i in range(3):
        alone = advect(rain[i : i + 1], motion[i : i + 1], leads(1.0))
        torch.testing.assert_close(together[i : i + 1], alone, equal_nan=True)


def test_it_can_be_learned_through():
    torch.manual_seed(0)
    rain = torch.rand(1, 6, 6, dtype=torch.float64, requires_grad=True)
    motion = (0.3 + 0.1 * torch.rand(1, 2, 6, 6, dtype=torch.float64)).requires_grad_()

    def inner(field: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
        return advect(field, along, leads(1.0, 2.0).double())[:, :, 2:, 2:]

    assert torch.autograd.gradcheck(inner, (rain, motion))


def test_an_unobserved_cell_leaves_no_nan_in_the_gradient():
    rain = torch.rand(1, 6, 6)
    rain[0, 3, 3] = torch.nan
    rain.requires_grad_()
    motion = torch.full((1, 2, 6, 6), 0.3, requires_grad=True)

    advect(rain, motion, leads(1.0)).nansum().backward()

    assert rain.grad.isfinite().all() and motion.grad.isfinite().all() and motion.grad.any()


@settings(max_examples=25)
@given(x=st.floats(-40, 40), y=st.floats(-40, 40), lead=st.floats(0, 30))
def test_the_forecast_never_leaves_the_range_of_what_was_seen(x, y, lead):
    rain = torch.rand(1, 8, 9) + 1
    rain[0, 2, 2:5] = torch.nan

    moved = advect(rain, uniform(x, y, (8, 9)), leads(lead))

    seen = rain[~rain.isnan()]
    known = moved[~moved.isnan()]
    assert (known >= seen.min() - 1e-5).all() and (known <= seen.max() + 1e-5).all()


@pytest.mark.parametrize("minutes", [10.0, -10.0])
def test_backward_undoes_forward(minutes):
    storm = blob((60, 60), 30, 30, width=6)[None]
    motion = uniform(0.7, -0.4, (60, 60))

    there = advect(storm, motion, leads(minutes))
    back = advect(there[:, 0].nan_to_num(), motion, leads(-minutes))

    inner = slice(12, 48)
    assert (there - storm[:, None]).nan_to_num().abs().max() > 1
    assert (back[0, 0, inner, inner] - storm[0, inner, inner]).abs().max() < 0.05


def test_along_an_even_motion_rain_goes_as_along_a_steady_one_whatever_else_is_asked_for():
    rain, motion = torch.rand(1, 1, 40, 120), uniform(1.3, -0.4, (40, 120))
    times = leads(0.0, 20.0, KEPT, KEPT + 20.0)
    moved = carry_ahead(rain, motion, times)
    torch.testing.assert_close(moved[0], advect(rain[0], motion, times), atol=1e-3, rtol=0, equal_nan=True)
    assert torch.equal(moved[0, 0, 0], rain[0, 0])
    alone = carry_ahead(rain, motion, leads(KEPT))
    assert torch.equal(alone.nan_to_num(-1), moved[:, :, 2:3].nan_to_num(-1))


def linear(first: tuple[float, float], slopes: list[list[float]], shape: tuple[int, int]) -> torch.Tensor:
    """A motion that grows with x and y."""
    y, x = torch.meshgrid(*(torch.arange(float(size)) for size in shape), indexing="ij")
    place = torch.stack([x, y])
    return (torch.tensor(first)[:, None, None] + torch.einsum("ij,jyx->iyx", torch.tensor(slopes), place))[
        None
    ]


def test_rain_keeps_its_motion():
    """It comes from where it goes as far as from there to here, at the motion that it has there."""
    first, slopes, minutes = (0.1, -0.3), [[0.004, 0.006], [-0.005, 0.003]], 20.0
    motion = linear(first, slopes, (30, 44))
    rows = range(10, 20)
    told = come_from(motion, torch.tensor(minutes), rows)[0]
    moved = come_from(motion, torch.tensor(minutes), rows, torch.zeros(1, 2, 10, 44))[0]
    torch.testing.assert_close(moved, told, atol=1e-4, rtol=0)
    inverse = torch.linalg.inv(torch.eye(2) + minutes * torch.tensor(slopes))
    y, x = torch.meshgrid(torch.arange(10.0, 20.0), torch.arange(44.0), indexing="ij")
    here = torch.stack([x, y])
    there = torch.einsum("ij,jyx->iyx", inverse, here - minutes * torch.tensor(first)[:, None, None])
    assert (told - (there - here))[:, :, 12:32].abs().max() < 0.2
    assert (there - here)[:, :, 12:32].abs().amax(dim=(1, 2)).min() > 3


def test_after_an_hour_the_pattern_of_motion_stays_where_it_is():
    motion = linear((0.1, -0.3), [[0.004, 0.006], [-0.005, 0.003]], (60, 80))
    rain = torch.rand(1, 2, 60, 80)
    times = leads(30.0, KEPT, KEPT + 30.0)
    told = carry_ahead(rain, motion, times)
    nearly = carry_ahead(rain, motion, leads(KEPT + 1e-3))
    torch.testing.assert_close(nearly[:, :, 0], told[:, :, 1], atol=1e-2, rtol=0, equal_nan=True)
    back = advect(told[:, 0, 1:2], motion, leads(30.0))[:, 0, 0]  # in two steps, the second along what stays
    both = ~(back.isnan() | told[:, 0, 2].isnan())
    assert both.float().mean() > 0.2
    assert torch.corrcoef(torch.stack([back[both], told[:, 0, 2][both]]))[0, 1] > 0.8


@pytest.mark.parametrize("cells", [50, 7 * 24])
def test_bands_of_rows_do_not_show_in_what_is_carried_ahead(cells, monkeypatch):
    motion = linear((0.1, -0.3), [[0.004, 0.006], [-0.005, 0.003]], (20, 24))
    rain, times = torch.rand(1, 2, 20, 24), leads(5.0, 40.0, 90.0)
    whole = carry_ahead(rain, motion, times)
    monkeypatch.setattr("metnet.advection.CELLS_AT_ONCE", cells)
    assert torch.equal(carry_ahead(rain, motion, times).nan_to_num(-1), whole.nan_to_num(-1))
