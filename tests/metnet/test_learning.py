"""A small network learns, and says less where it sees less."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from metnet.advection import advect
from metnet.attention.axial import AxialAttention
from metnet.batch import Batch
from metnet.head import Categorical, Ordinal
from metnet.lead_time import LeadTimePlanes
from metnet.loss import cross_entropy, ordinal
from metnet.model import MetNet
from metnet.rain import RainBins
from tests.metnet.learning import learn

LEADS = torch.tensor([5.0, 15.0, 30.0])
PLANES = LeadTimePlanes(5.0, 6)
BINS = RainBins((0.2, 1.0, 5.0, 20.0), 60.0)


def drifting_storms(batch=4, side=32, frames=3, storms=6, seed=0):
    """Round storms in motion, each sample its own; the truth is the same field further along."""
    random = torch.Generator().manual_seed(seed)
    y = torch.arange(float(side))[:, None]
    x = torch.arange(float(side))
    rain = torch.zeros(batch, side, side)
    for _ in range(storms):
        at_y, at_x, size, peak = torch.rand(4, batch, 1, 1, generator=random)
        square = (y - at_y * side) ** 2 + (x - at_x * side) ** 2
        rain += (5 + 40 * peak) * torch.exp(-square / (2 * (1 + 3 * size) ** 2))
    rain[rain < 0.5] = 0.0
    speed = torch.rand(batch, 2, 1, 1, generator=random) * 0.6 - 0.3
    motion = speed.expand(batch, 2, side, side).contiguous()
    age = torch.arange(frames - 1, -1, -1.0) * 5
    return Batch(
        radar=advect(rain, motion, -age).nan_to_num(),
        age=age.repeat(batch, 1),
        init_time=torch.zeros(batch, dtype=torch.int64),
        lead_time=LEADS,
        cell_size=torch.full((batch,), 1000.0),
        motion=motion,
        target=advect(rain, motion, LEADS).nan_to_num(),
    )


def small(**arguments):
    torch.manual_seed(0)
    return MetNet(
        frames=3,
        channels=32,
        fine_channels=24,
        depth=1,
        attention=partial(AxialAttention, heads=2, dim_index=1),
        grid=(8, 8),
        bins=BINS,
        **arguments,
    )


def entropy(forecast):
    return torch.special.entr(forecast.probability).sum(dim=2).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "loss", "rate", "steps"),
    [
        pytest.param({"advection": False}, cross_entropy, 5e-3, 295, id="plain"),
        pytest.param({"advection": False, "lead_time": PLANES}, cross_entropy, 5e-3, 295, id="input"),
        pytest.param({"advection": False, "head": Ordinal()}, ordinal, 3e-3, 500, id="ordinal"),
    ],
)
def test_four_samples_are_learned_by_heart(choice, loss, rate, steps):
    costs = learn(small(**choice), drifting_storms(), steps, loss, rate)
    assert costs[-1] < 0.05 * costs[0]


@pytest.mark.parametrize("head", [Categorical(), Ordinal()])
def test_untrained_it_says_climatology_where_nothing_is_seen_and_more_where_rain_is(head):
    net, batch = small(head=head).eval(), drifting_storms(storms=1)
    blind = replace(batch, radar=torch.full_like(batch.radar, torch.nan))
    with torch.no_grad():
        seen, unseen = net(batch), net(blind)
    assert entropy(unseen) > 1.2 * entropy(seen)
    assert (unseen.quantile(0.99) > 1).all(), "rain is possible everywhere"
    assert unseen.probability[0, 0, :, 0, 0].allclose(unseen.probability[2, 2, :, 9, 9], atol=1e-5)


@pytest.mark.parametrize(
    "choice", [{"advection": False}, pytest.param({"advection": True}, marks=pytest.mark.slow)]
)
def test_trained_with_samples_that_see_nothing_it_is_wide_there_and_no_worse_than_their_climatology(choice):
    net, batch = small(**choice), drifting_storms(batch=8)
    radar = batch.radar.clone()
    radar[4:] = torch.nan
    learn(net, replace(batch, radar=radar), 60)
    net.eval()
    blind = replace(batch, radar=torch.full_like(batch.radar, torch.nan))
    with torch.no_grad():
        seen, unseen = net(batch), net(blind)
        share = (
            torch.nn.functional.one_hot(BINS.classify(batch.target), len(BINS))
            .double()
            .mean(dim=(0, 1, 2, 3))
        )
        usual = torch.special.entr(share).sum().item()
        cost = cross_entropy(net.logits(blind), batch.target, BINS).item()
    assert entropy(unseen) > 1.25 * entropy(seen)
    assert entropy(unseen) > 0.6 * usual
    assert cost < 1.3 * usual
