"""What rain gained at a place goes on there, where frames tell it, and adds to what comes by."""

import pytest
import torch

from metnet.advection import KEPT
from metnet.chances import lasting
from metnet.evolution import GOES_ON, MOST, SHORTEST, STOPS, evolution, evolved
from metnet.local import known_rates
from metnet.model import Moving, _newest, _told
from metnet.rain import RainBins

AGES = torch.tensor([[0.0, 5.0, 10.0]])
SIDE = 128
BINS = RainBins.preferred()
X = torch.arange(SIDE).float().expand(SIDE, SIDE)


def uniform(x: float, y: float = 0.0) -> torch.Tensor:
    return torch.tensor([x, y]).view(1, 2, 1, 1).repeat(1, 1, SIDE, SIDE)


def wetter(decibel: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Rain everywhere, of 8 to 16 dB and so much more."""
    noise = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return 10 ** ((8 + 8 * noise + decibel) / 10)


def fed(rate: torch.Tensor) -> torch.Tensor:
    """Three frames carried to one time, the newest first, of rain that gained so many dB a minute."""
    return torch.stack([wetter(-age * rate) for age in AGES[0]])[None]


def test_what_was_gained_a_minute_is_told_at_its_place():
    rate = 0.4 * torch.exp(-(((X - 60) / 30) ** 2)) - 0.1
    told = evolution(fed(rate), AGES)
    assert told.shape == (1, 1, SIDE // 4, SIDE // 4)
    middle = rate[2::4, 2::4]
    torch.testing.assert_close(told[0, 0, 4:-4, 4:-4], middle[4:-4, 4:-4], atol=0.03, rtol=0)


def test_where_nobody_knows_nothing_is_gained():
    seen = fed(torch.full((SIDE, SIDE), 0.3))
    assert not evolution(seen[:, :1], AGES[:, :1]).any()  # a single frame
    assert not evolution(torch.full_like(seen, torch.nan), AGES).any()
    assert not evolution(torch.zeros_like(seen), AGES).any()  # dry, and so it stays
    assert not evolution(seen, torch.zeros(1, 3)).any()  # of one time
    one = seen.clone()
    one[:, 1:] = torch.nan
    assert not evolution(one, AGES).any()
    half = seen.clone()
    half[..., :64] = torch.nan
    told = evolution(half, AGES)
    assert not told[..., :12].any()
    torch.testing.assert_close(told[..., 20:], torch.full((1, 1, 32, 12), 0.3), atol=1e-4, rtol=0)


def test_of_the_frames_the_oldest_tells_it_that_shows_a_place():
    seen = torch.stack([wetter(torch.tensor(gain)) for gain in (0.0, -1.0, -5.0)])[None]
    torch.testing.assert_close(evolution(seen, AGES).mean().item(), 0.5, atol=1e-3, rtol=0)
    seen[:, 2] = torch.nan
    torch.testing.assert_close(evolution(seen, 4 * AGES).mean().item(), 0.05, atol=1e-3, rtol=0)


def test_late_frames_and_those_of_other_samples_tell_it_by_their_own_ages():
    rates = (0.3 * (X > 64), -0.1 * (X > 30))
    ages = torch.tensor([[7.0, 12.0, 17.0], [0.0, 15.0, 30.0]])
    gains = [
        [torch.as_tensor(-(old - of[0]) * rate) for old in of] for rate, of in zip(rates, ages, strict=True)
    ]
    seen = torch.stack([torch.stack([wetter(gain) for gain in each]) for each in gains])
    both = evolution(seen, ages)
    for told, rate in zip(both, rates, strict=True):
        torch.testing.assert_close(told[0, 4:-4, 20:-4], rate[2::4, 2::4][4:-4, 20:-4], atol=1e-4, rtol=0)


def test_what_shows_in_a_minute_is_not_taken_for_what_goes_on_so():
    seen = torch.stack([wetter(torch.tensor(gain)) for gain in (0.0, -1.0)])[None]
    told = evolution(seen, torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(told.mean().item(), 1 / SHORTEST, atol=1e-3, rtol=0)


def test_a_gain_of_a_block_is_spread_over_those_around():
    seen = fed(torch.where((X >= 64) & (X < 68) & (X.mT >= 64) & (X.mT < 68), 0.9, 0.0))
    told = evolution(seen, AGES)[0, 0]
    assert told[16, 16].item() == pytest.approx(0.1, abs=1e-3)  # 3 of 9 by 3 of 9 ways lead back
    assert told.sum().item() == pytest.approx(0.9, abs=1e-2)
    assert (told > 1e-3).sum() == 25


@pytest.mark.parametrize("minutes", [5.0, 40.0, KEPT + 60.0])
def test_rain_gains_the_mean_of_what_lies_on_its_way(minutes):
    """Oracle: along a motion that is linear in place, the way back is an inverse matrix; the source is curved."""
    slopes, first = torch.tensor([[0.0004, 0.0006], [-0.0005, 0.0003]]), torch.tensor([0.1, -0.15])
    cells = torch.stack([X, X.mT])
    motion = (first[:, None, None] + torch.einsum("ij,jyx->iyx", slopes, cells))[None]
    kept = min(minutes, KEPT)
    inverse = torch.linalg.inv(torch.eye(2) + kept * slopes)
    there = torch.einsum("ij,jyx->iyx", inverse, cells - kept * first[:, None, None])
    way = (there - cells) * minutes / kept

    def source(place: torch.Tensor) -> torch.Tensor:
        return 0.1 + 0.05 * torch.cos(place[0] / 12) * torch.sin(place[1] / 15)

    told = evolved(source(cells[:, 2::4, 2::4] - 0.5)[None, None], motion, torch.tensor([[minutes]]))
    assert told.shape == (1, SIDE, SIDE)
    mean = torch.stack([source(cells + share * way) for share in torch.linspace(0, 1, STOPS)]).mean(dim=0)
    ends = torch.cat([cells, there, cells + way])  # away from the grid's sides, as all between them then is
    inner = ((ends > 4) & (ends < SIDE - 4)).all(dim=0)
    assert inner.float().mean() > 0.3
    assert way.norm(dim=0)[inner].mean() > (minutes > 30) * 4
    most = GOES_ON * lasting(torch.tensor([[minutes]])).item()
    torch.testing.assert_close(told[0][inner] / most, mean[inner], atol=0.004, rtol=0)


def test_it_is_bounded_and_begins_with_nothing():
    source = torch.full((1, 1, SIDE // 4, SIDE // 4), 4.0)
    told = evolved(source, uniform(1.0), torch.tensor([[0.0, 2.0, 120.0]]))
    assert not told[0].any()
    gained = 4 * GOES_ON * lasting(torch.tensor([[2.0]])).item()
    torch.testing.assert_close(told[1], torch.full((SIDE, SIDE), gained))
    assert (told[2] == MOST).all()
    assert (evolved(-source, uniform(1.0), torch.tensor([[120.0]])) == -MOST).all()


def test_samples_and_lead_times_do_not_mix():
    sources = torch.randn(2, 1, SIDE // 4, SIDE // 4)
    motion = torch.cat([uniform(0.5, 0.2), uniform(-0.3, 0.9)])
    minutes = torch.tensor([[5.0, 30.0], [10.0, 90.0]])
    told = evolved(sources, motion, minutes).unflatten(0, (2, 2))
    for sample in range(2):
        for lead in range(2):
            alone = evolved(sources[[sample]], motion[[sample]], minutes[[sample], lead : lead + 1])
            torch.testing.assert_close(told[sample, lead], alone[0])


def test_it_turns_with_the_map():
    source = torch.randn(1, 1, SIDE // 4, SIDE // 4)
    motion = uniform(0.7, -0.2) + 0.1 * torch.rand(1, 2, SIDE, SIDE)
    told = evolved(source, motion, torch.tensor([[30.0]]))
    turned = evolved(source.mT, motion.mT.flip(1), torch.tensor([[30.0]]))
    torch.testing.assert_close(turned.mT, told, atol=1e-4, rtol=0)


@pytest.mark.parametrize("late", [0.0, 5.0])
def test_rain_that_dies_at_a_coast_goes_on_dying_there(late):
    """It moves to the east, and loses half a dB a minute beyond column 64; the chances of a network know it."""
    speed, minutes, ages = 2.0, 20.0, AGES + late

    def rain(time: float) -> torch.Tensor:
        shape = torch.sin((X - speed * time) / 7) * torch.cos(X.mT / 9) + torch.sin(
            (X - speed * time) / 23 + 1
        )
        return 10 ** ((12 + 4 * shape - 0.5 * (X - 64).clamp(min=0) / speed) / 10)

    frames = torch.stack([rain(-age.item()) for age in ages[0]])[None]
    moving = Moving(frames, ages, uniform(speed), torch.zeros(1, SIDE, SIDE), torch.tensor([1000.0]), BINS)
    lead = torch.tensor([minutes])
    carried = moving.carried(lead)
    seen = moving.steps, carried, *_newest(carried), moving.ahead(lead), moving.age, moving.doubt
    nothing = moving.changes._replace(evolution=torch.zeros_like(moving.changes.evolution))
    known = (~carried[0, 0, 0].isnan()) & (X > 70) & (X < 110)
    fell = (rain(minutes) >= 20.0)[known].float()
    edge = BINS.edges.index(20.0) + 1
    (without, before, _), (told, after, _) = (_told(*seen, changes) for changes in (nothing, moving.changes))
    error, less = (((part[0, edge:].sum(dim=0)[known] - fell) ** 2).mean() for part in (before, after))
    assert less < 0.95 * error
    gained = evolved(moving.changes.evolution, moving.mended, lead[None] + late)
    assert gained[0][known].mean() < -0.5
    onward = known_rates(3) + 1  # in tens of dB, as `describe` tells it
    torch.testing.assert_close(10 * (told - without)[:, onward], gained, atol=1e-4, rtol=0)
