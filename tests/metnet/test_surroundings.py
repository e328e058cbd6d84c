from dataclasses import replace
from functools import partial

import pytest
import torch

from metnet.attention.axial import AxialAttention
from metnet.surroundings import Surroundings
from tests.metnet.test_inputs import everything

ATTENTION = partial(AxialAttention, heads=2, dim_index=1)


class Newest(torch.nn.Module):
    """In the memory's place: the newest frame as it is."""

    def forward(self, x):
        return x[:, -1]


def bare(factor):
    """The surroundings without anything learned: means of the scaled rain over 4 x 4 coarse pixels."""
    part = Surroundings(factor, 8, ATTENTION, (8, 8))
    part.downsampler, part.memory = torch.nn.AvgPool2d(4), Newest()
    part.positions, part.rise, part.blocks = torch.nn.Identity(), torch.nn.Identity(), torch.nn.ModuleList()
    return part


@pytest.mark.parametrize("size", [(64, 64), (62, 45)])
@pytest.mark.parametrize(("factor", "coarse"), [(2, 48), (4, 48), (8, 24), (3, 70)])
def test_every_cell_of_the_centre_gets_what_lies_over_it(size, factor, coarse):
    """Rain that rises by a straight line with the pixels of the fine grid, counted from the common middle."""
    pixel = (torch.arange(coarse) + 0.5 - coarse / 2) * factor
    slope = 0.5 / pixel.max()
    value = (pixel[:, None] * slope + 2 * pixel * slope + 1.6) / 3.2
    rain = (4 * torch.atanh(value.double().clamp(max=0.999))).expm1().float()
    batch = everything(batch=1, rows=size[0], columns=size[1])
    batch = replace(batch, surroundings=rain.expand(1, 3, coarse, coarse))
    said = bare(factor)(batch)[0, 0] * 3.2 - 1.6
    y, x = (4 * torch.arange(-(-side // 4)) + 2 - side / 2 for side in size)
    torch.testing.assert_close(said, y[:, None] * slope + 2 * x * slope, atol=1e-3, rtol=0)


def test_far_surroundings_reach_the_middle():
    torch.manual_seed(0)
    part = Surroundings(4, 8, ATTENTION, (8, 8)).eval()
    batch = everything(batch=1, rows=32, columns=32)
    rain = torch.zeros(1, 3, 64, 64, requires_grad=True)
    part(replace(batch, surroundings=rain))[..., 4, 4].square().sum().backward()
    assert (torch.nn.functional.avg_pool2d(rain.grad.abs(), 16) > 0).all()


def test_the_frames_have_an_order():
    torch.manual_seed(0)
    part = Surroundings(4, 8, ATTENTION, (8, 8)).eval()
    batch = everything()
    turned = replace(batch, surroundings=batch.surroundings.flip(1))
    assert (part(batch) - part(turned)).abs().max() > 1e-4
