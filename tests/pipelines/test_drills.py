"""Parts of the past are lost, dead or late: the forecast stays whole, gets worse, and says how unsure it is."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from benchmarks.drills import _sums, cases, outcomes, sector
from metnet.batch import Batch
from metnet.model import MetNet
from metnet.prior import Pixels
from metnet.rain import BinnedForecast, RainBins
from pipelines.cf import RAINFALL_RATE
from pipelines.cube import Cube
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.trained import TrainedModel, with_motion

FRAMES, SIDE, STEPS = 4, 80, 48
START, CADENCE = datetime(2024, 6, 1, tzinfo=UTC), timedelta(minutes=5)


def weather():
    """Rain that drifts by a cell a frame, while a part of it turns into other rain (mm/h)."""
    random = np.random.default_rng(0)

    def noise():
        field = gaussian_filter(random.normal(size=(SIDE, SIDE)), 4, mode="wrap")
        return field / field.std()

    field = noise()
    for _ in range(STEPS):
        yield np.maximum(3 * np.exp(field) - 3, 0).astype(np.float32)
        field = 0.95 * np.roll(field, 1, axis=1) + np.sqrt(1 - 0.95**2) * noise()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the drills do to a fitted prior, which every training starts from."""
    grid = Grid("EPSG:3035", 4e6, 1000.0, SIDE, 3e6, -1000.0, SIDE)
    cube = Cube.open_or_create(
        str(tmp_path_factory.mktemp("cube") / "cube"), grid, RAINFALL_RATE, START, CADENCE
    )
    cube.write(
        [
            Frame(RAINFALL_RATE, START + i * CADENCE, CADENCE, grid, rain, "noise", f"{i + 1:064x}")
            for i, rain in enumerate(weather())
        ]
    )
    torch.manual_seed(0)
    network = MetNet(frames=FRAMES, channels=8, fine_channels=4, depth=0, grid=(8, 8)).eval()
    generator = torch.Generator().manual_seed(0)
    learned, judged = (
        cases(cube, FRAMES, 6, SIDE, leads=leads) for leads in ((5.0, 30.0, 60.0), (10.0, 30.0))
    )
    drawn = [
        network.pixels(with_motion(replace(case.in_time, target=case.target)), 400, generator)
        for case in learned
    ]
    network.prior.fit(Pixels.joined(drawn), steps=60)
    return outcomes(TrainedModel(network, {}, ""), judged)


def test_no_drill_leaves_a_hole_where_any_frame_saw(found):
    assert len(found) == 2 * FRAMES + 4
    assert [outcome.missing for outcome in found.values()] == [0.0] * len(found)
    assert all(np.isfinite(list(vars(outcome).values())).all() for outcome in found.values())


LOST = ["as it is", *(f"newest {count} of {FRAMES} frames lost" for count in (1, 2, 3)), "nothing at all"]
LATE = ["as it is", *(f"{minutes} min late" for minutes in (10, 20, 30)), "nothing at all"]


@pytest.mark.parametrize("row", [LOST, LATE])
@pytest.mark.parametrize("score", ["crps", "light", "rain"])
def test_the_more_is_lost_the_worse_the_forecast(found, row, score):
    values = [getattr(found[name], score) for name in row]
    assert all(less < more for less, more in pairwise(values)), values


@pytest.mark.parametrize("row", [LOST[:-1], LATE[:-1]])
def test_the_more_is_lost_the_wider_the_forecast(found, row):
    entropies = [found[name].entropy for name in row]
    assert all(less < more for less, more in pairwise(entropies)), entropies
    moving = [name for name in row if "newest 3" not in name]  # a single frame tells no motion
    widths = [found[name].width for name in moving]
    assert all(less < more for less, more in pairwise(widths)), widths


def test_a_dead_radar_costs_skill_and_less_than_all_of_them(found):
    whole, dead, nothing = (found[name] for name in ("as it is", "90 degree sector cut", "nothing at all"))
    assert whole.crps < dead.crps < nothing.crps
    assert whole.rain < dead.rain < nothing.rain


def test_a_forecast_with_holes_is_judged_where_there_is_one():
    random = torch.Generator().manual_seed(0)
    bins, target = RainBins((0.5, 2.0), 5.0), 3 * torch.rand(1, 1, 8, 8, generator=random)
    whole = torch.rand(1, 1, 3, 8, 8, generator=random).softmax(dim=2)
    holed, seen = whole.clone(), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    upper = (..., slice(4), slice(None))
    holed[upper] = torch.nan
    seen[..., 6:] = False
    sums, half = _sums(BinnedForecast(holed, bins), target, seen), (..., slice(4, None), slice(None))
    without = _sums(BinnedForecast(whole[half], bins), target[half], seen[half])
    assert torch.allclose(sums[0] / sums[1], without[0] / without[1] + torch.tensor([0] * 5 + [0.5]))


def test_the_sector_is_a_quarter_of_the_circle_to_the_north_east():
    one = torch.zeros(1)
    there = sector(Batch(torch.zeros(1, 1, 6, 6), one[None], one.long(), one + 5, one + 1000))
    assert there[:3, 3:].all() and there.sum() == 9
