"""What stands beside the radar is of the right time and the right place, or NaN where there is none."""

from datetime import UTC, datetime, timedelta
from hashlib import sha256

import numpy as np
import pytest
import torch
from pyproj import Transformer

from metnet.metnet1 import MetNet1
from metnet.metnet2 import MetNet2
from metnet.model import MetNet
from pipelines import cf
from pipelines.baselines.persistence import Persistence
from pipelines.beside import Beside, Sides, check_sources
from pipelines.cube import Cube
from pipelines.frame import ALWAYS, Frame
from pipelines.grid import Grid
from pipelines.past import cut, past
from pipelines.sample_store import SampleStore, stored
from pipelines.static import write_static

START = datetime(2024, 6, 1, tzinfo=UTC)
FIVE, QUARTER = timedelta(minutes=5), timedelta(minutes=15)
GRID = Grid("EPSG:3035", 4e6, 1000.0, 20, 3e6, -1000.0, 16)
HEIGHT = np.arange(320, dtype=np.float32).reshape(16, 20)


def filled(path, group, variable, cadence, steps, values):
    """A group of frames whose values are what `values(step)` says."""
    cube = Cube.open_or_create(str(path), GRID, variable, START, cadence, group)
    for step in steps:
        field = np.broadcast_to(np.float32(values(step)), GRID.shape).copy()
        digest = sha256(f"{group}{step}".encode()).hexdigest()
        cube.write([Frame(variable, START + step * cadence, cadence, GRID, field, "noise", digest, group)])
    return cube


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    """Radar every 5 minutes, two channels every 15, elevation; the numbers tell time and place."""
    path = tmp_path_factory.mktemp("cubes") / "cube"
    filled(path, "ir_087", cf.BRIGHTNESS_TEMPERATURE, QUARTER, (0, 1, 3), lambda step: 200 + step)
    filled(path, "ir_108", cf.BRIGHTNESS_TEMPERATURE, QUARTER, range(4), lambda step: 300 + step)
    write_static(str(path), Frame(cf.ELEVATION, ALWAYS, None, GRID, HEIGHT, "hills", "ab" * 32, "static"))
    return filled(path, "radar", cf.RAINFALL_RATE, FIVE, range(12), lambda step: step + HEIGHT / 1000)


SEES = Beside(("ir_108", "ir_087"), (3,), ("elevation",), True, 4, 2.0)


def test_a_network_says_what_it_was_made_to_see():
    goes = ((250.0, 10.0), (260.0, 10.0))
    assert Beside.of(MetNet(channels=8, depth=0, frames=2)) == Beside(motion=True)
    assert Beside.of(MetNet(channels=8, depth=0, frames=2, advection=False)) == Beside(motion=False)
    network = MetNet(
        channels=8, depth=0, frames=2, satellite=goes, satellite_frames=3, static=((0.0, 1.0),),
        position=True, surroundings=4,
    )  # fmt: skip
    assert Beside.of(network, ["b", "a"], ["elevation"], 3.0) == Beside(
        ("b", "a"), (3,), ("elevation",), True, 4, 3.0
    )
    one = MetNet1(
        side=64, target=4, frames=3, satellite=goes, first=8, channels=8, memory=8, width=16, heads=2
    )
    assert Beside.of(one, "ab", ["elevation"]) == Beside(
        ("a", "b"), (3,), ("elevation",), True, motion=False, ages=False
    )
    two = MetNet2(side=64, target=16, frames=3, satellite=goes, satellite_frames=2, told=8, memory=8, width=8,
                  blocks=(1, 1), fine_width=8, dense=8)  # fmt: skip
    assert Beside.of(two, "ab", ["elevation"]) == Beside(
        ("a", "b"), (2,), ("elevation",), True, motion=False, ages=False
    )
    assert Beside.of(Persistence()) == Beside(motion=False)
    with pytest.raises(ValueError, match=r"satellite=\['a'\]: this network was made to see 2"):
        Beside.of(network, ["a"], ["elevation"])
    with pytest.raises(ValueError, match=r"static=\[\]: this network was made to see 1"):
        Beside.of(network, "ab")


@pytest.mark.parametrize("wrong", [{"surroundings": 0}, {"reach": 0.5}, {"reach": float("nan")}])
def test_surroundings_that_do_not_surround_are_refused(wrong):
    with pytest.raises(ValueError, match="at least as wide as the sample"):
        Beside(**wrong)


def test_images_are_the_newest_that_there_can_be_with_their_true_ages(cube):
    batch = past(cube, START + 7 * FIVE, 2, [5.0], SEES)  # 00:35, the newest image is of 00:30
    assert batch.satellite_age.tolist() == [[[35.0], [20.0], [5.0]]]
    assert batch.satellite[0, :, 0, 3, 4].tolist() == [300, 301, 302]  # the first channel asked for
    other = batch.satellite[0, :, 1, 3, 4]
    assert other[:2].tolist() == [200, 201] and other[2].isnan()  # that of 00:30 never came
    early = past(cube, START, 1, [5.0], SEES)
    assert early.satellite[0, :, 0].isnan().all(dim=(1, 2)).tolist() == [True, True, False]
    assert early.satellite_age.tolist() == [[[30.0], [15.0], [0.0]]]


@pytest.mark.parametrize("quick", [False, True], ids=["the cube", "its store"])
def test_a_window_has_its_own_part_of_everything(cube, quick):
    read = stored(cube) if quick else cube
    sides = Sides(read, SEES)
    window = (4, 6, 8, 8)
    batch = cut(sides, START + 6 * FIVE, 2, [5.0], window)
    assert torch.equal(batch.static[0, 0], torch.from_numpy(HEIGHT[4:12, 6:14]))
    np.testing.assert_allclose(batch.radar[0, 1], 6 + HEIGHT[4:12, 6:14] / 1000, rtol=1e-6)
    assert batch.satellite.shape == (1, 3, 2, 8, 8)
    to_lonlat = Transformer.from_crs("EPSG:3035", "EPSG:4326", always_xy=True)
    assert batch.place[0, :, 2, 3].tolist() == pytest.approx(to_lonlat.transform(4e6 + 9000, 3e6 - 6000))
    assert isinstance(sides._satellite["ir_087"], SampleStore if quick else Cube)


def test_surroundings_are_means_around_the_same_middle_and_unknown_beyond_the_grid(cube):
    batch = cut(Sides(cube, SEES), START + 6 * FIVE, 2, [5.0], (4, 6, 8, 8))
    wide = batch.surroundings
    assert wide.shape == (1, 2, 4, 4)  # 16 x 16 cells, from row 0 and column 2
    expected = (6 + HEIGHT / 1000)[:, 2:18].reshape(4, 4, 4, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(wide[0, 1], expected, rtol=1e-5)
    corner = cut(Sides(cube, SEES), START + 6 * FIVE, 1, [5.0], (0, 12, 8, 8)).surroundings[0, 0]
    assert corner.isnan().tolist() == [[True] * 4] + [[False, False, False, True]] * 3


@pytest.mark.parametrize(("size", "factor"), [(8, 4), (7, 3), (8, 3), (5, 1 + 4), (9, 3)])
def test_the_middle_of_the_surroundings_is_that_of_the_sample_to_the_cell(cube, size, factor):
    sides = Sides(cube, Beside(surroundings=factor))
    for first in (0, 3, 7):
        low, count = sides._wide(first, size)
        assert low + count * factor / 2 == first + size / 2
        assert count * factor >= 2 * size


def test_surroundings_leave_out_what_was_not_observed(cube, tmp_path):
    rain = filled(tmp_path / "cube", "radar", cf.RAINFALL_RATE, FIVE, [0], lambda _: 3.0)
    hole = np.full(GRID.shape, 3.0, np.float32)
    hole[4:8, 4:8], hole[8, 8] = np.nan, np.nan
    rain.write([Frame(cf.RAINFALL_RATE, START + FIVE, FIVE, GRID, hole, "noise", "cd" * 32)])
    wide = past(rain, START + FIVE, 1, [5.0], Beside(surroundings=4, reach=1.0)).surroundings[0, 0]
    assert wide[1, 1].isnan() and (wide.nan_to_num(3.0) == 3).all() and wide.isnan().sum() == 1


def test_what_a_cube_does_not_have_is_not_observed(tmp_path):
    rain = filled(tmp_path / "cube", "radar", cf.RAINFALL_RATE, FIVE, range(3), lambda _: 1.0)
    batch = past(rain, START + 2 * FIVE, 2, [5.0], SEES)
    assert batch.satellite.isnan().all() and batch.static.isnan().all()
    assert batch.satellite_age[0].diff(dim=0).lt(0).all()
    assert batch.place.isfinite().all() and batch.surroundings.isfinite().any()


def test_a_source_that_no_cube_has_is_refused_by_name(cube, tmp_path):
    rain = filled(tmp_path / "cube", "radar", cf.RAINFALL_RATE, FIVE, [0], lambda _: 1.0)
    sides = [Sides(each, SEES) for each in (rain, cube)]
    assert sides[0].lacking == ["ir_108", "ir_087", "elevation"] and sides[1].lacking == []
    check_sources(sides)
    with pytest.raises(ValueError, match=r"elevation, ir_087, ir_108: no such .* in .*cube; metnet inspect"):
        check_sources(sides[:1])


def test_channels_of_other_times_are_refused(tmp_path):
    path = tmp_path / "cube"
    filled(path, "radar", cf.RAINFALL_RATE, FIVE, [0], lambda _: 1.0)
    filled(path, "a", cf.BRIGHTNESS_TEMPERATURE, QUARTER, [0], lambda _: 250)
    filled(path, "b", cf.BRIGHTNESS_TEMPERATURE, FIVE, [0], lambda _: 250)
    with pytest.raises(ValueError, match="b has images at other times than a"):
        past(Cube.open(str(path)), START, 1, [5.0], Beside(("a", "b"), (1,)))


def test_a_network_that_sees_everything_forecasts_from_what_is_read(cube):
    network = MetNet(
        frames=2, channels=8, fine_channels=4, depth=1, advection=False, grid=(4, 4), lead_features=8,
        satellite=((250.0, 30.0),) * 2, satellite_frames=3, static=((100.0, 100.0),), position=True,
        surroundings=4,
    ).eval()  # fmt: skip
    beside = Beside.of(network, ["ir_108", "ir_087"], ["elevation"])
    with torch.no_grad():
        forecast = network(past(cube, START + 7 * FIVE, 2, [5.0], beside))
    assert forecast.mean().shape == (1, 1, 16, 20) and forecast.mean().isfinite().all()
