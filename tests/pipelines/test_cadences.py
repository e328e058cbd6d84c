"""Radars and satellites, each at its own cadence: a source that is late, holed or absent fails by itself."""

import json
from datetime import timedelta
from hashlib import sha256

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metnet.inputs import Inputs
from metnet.model import MetNet
from pipelines import cf
from pipelines.beside import Beside, Sides
from pipelines.cube import Cube
from pipelines.drop_out import DropOut
from pipelines.forecast import forecast
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.late import newest_past, past_at
from pipelines.past import past
from pipelines.plain import rain_cube
from pipelines.runs import ForecastStore
from pipelines.sample_store import stored
from pipelines.trained import trained, with_motion
from tests.pipelines.training import FIVE, MODEL, START, drifting, made_cube, trained_on

TEN, QUARTER, HALF_HOUR = timedelta(minutes=10), timedelta(minutes=15), timedelta(minutes=30)
NAMES = ["radar_b", "ir_108"]
SEES = {"satellite": ["rain", [250.0, 25.0]], "satellite_frames": [3, 2]}
SOURCES = Beside(tuple(NAMES), (3, 2), rain=("radar_b",))
NOW = START + 9 * QUARTER  # an image of each is due


def filled(path, group, variable, cadence, steps, value):
    """A group of a cube; its frames say by `value(step)` which they are."""
    radar, frames = Cube.open(path), []
    grid, start = radar.grid, radar.times[0]
    for step in steps:
        field = np.full(grid.shape, value(step), np.float32)
        digest = sha256(f"{group}{step}".encode()).hexdigest()
        frames.append(Frame(variable, start + step * cadence, cadence, grid, field, "noise", digest, group))
    Cube.open_or_create(path, grid, variable, start, cadence, group).write(frames)


def several(path, radar_b=range(21), ir_108=range(14), start=START):
    """Showers every 5 minutes, another radar every 10, a satellite channel every 15."""
    made = made_cube(path, drifting(40), start)
    if radar_b:
        filled(made, "radar_b", cf.RAINFALL_RATE, TEN, radar_b, lambda step: step / 4)
    if ir_108:
        filled(made, "ir_108", cf.BRIGHTNESS_TEMPERATURE, QUARTER, ir_108, lambda step: 230 + step)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return several(tmp_path_factory.mktemp("whole") / "cube")


@pytest.fixture(scope="module")
def without_radar_b(tmp_path_factory):
    return several(tmp_path_factory.mktemp("without") / "cube", radar_b=())


def network():
    torch.manual_seed(0)
    small = {"frames": 2, "channels": 8, "fine_channels": 4, "depth": 0, "grid": (4, 4), "advection": False}
    return MetNet(**small, **SEES).eval()


def shown(batch):
    """What a network sees of a batch: its channels, each source's value, mask and age among them."""
    frames, _ = Inputs(2, **SEES)(batch)
    return frames


@pytest.mark.parametrize("quick", [False, True], ids=["the cube", "its store"])
def test_each_source_brings_its_newest_images_with_their_own_ages(whole, quick):
    cube = rain_cube(whole)
    batch = past(stored(cube) if quick else cube, START + 7 * FIVE, 2, [5.0], SOURCES)  # 00:35
    assert batch.age.tolist() == [[5.0, 0.0]]
    assert batch.satellite_age[0].T.tolist() == [[25.0, 15.0, 5.0], [35.0, 20.0, 5.0]]
    assert batch.satellite[0, :, 0, 0, 0].tolist() == [0.25, 0.5, 0.75]
    assert batch.satellite[0, 0, 1].isnan().all(), "of the satellite two images were asked for"
    assert batch.satellite[0, 1:, 1, 0, 0].tolist() == [231.0, 232.0]


class Telling:
    """A group that tells of each cell the minute it was observed; some of its newest frames never came."""

    path, grid, variable = "memory", Grid("EPSG:3035", 4e6, 1000.0, 3, 3e6, -1000.0, 2), cf.RAINFALL_RATE

    def __init__(self, cadence, offset, late):
        self.cadence, self.snapshot = timedelta(minutes=cadence), "now"
        long = 400 // cadence  # steps: further back than any image that is asked for
        self.times = [START + timedelta(minutes=offset) + step * self.cadence for step in range(-long, long)]
        past = [time for time in self.times if time <= NOW]
        self.observed = np.array([time not in past[len(past) - late :] for time in self.times])

    def block(self, first, count, window):
        fields = np.full((count, *window[2:]), np.nan, np.float32)
        for index in range(count):
            time = first + index * self.cadence
            if time in self.times and self.observed[self.times.index(time)]:
                fields[index] = (time - START) / timedelta(minutes=1)
        return fields


@settings(max_examples=60)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 30), st.integers(0, 20), st.integers(0, 4), st.integers(1, 5)), max_size=6
    ),
    stalest=st.sampled_from([0, 10, 45]),
)
def test_of_any_number_of_sources_every_image_has_its_own_value_and_its_true_age(groups, stalest):
    """Each with a cadence, an offset in minutes, a number of frames that are late, and one that are asked for."""
    images = tuple(count for *_, count in groups)
    sides = Sides(Telling(5, 0, 0), Beside(tuple(map(str, range(len(groups)))), images, motion=False))
    sides.__dict__["_satellite"] = {str(i): Telling(*group[:3]) for i, group in enumerate(groups)}
    read = sides.read(NOW, 2, (0, 0, 2, 3), stalest=timedelta(minutes=stalest))
    assert bool(read) == bool(groups)
    for band, (cadence, offset, late, count) in enumerate(groups):
        values, ages = read["satellite"][0, :, band, 1, 2], read["satellite_age"][0, :, band]
        now = (NOW - START) / timedelta(minutes=1)
        waits = late * cadence if late * cadence <= stalest else 0
        assert ages[-1] == (now - offset) % cadence + waits
        assert (ages[:-1] - ages[1:] == cadence).all()
        there = ~values.isnan()
        assert torch.equal(values[there], now - ages[there]), "the value is the minute of the image"
        lost = 0 if waits else min(late, count)
        assert there.tolist() == [False] * (len(there) - count) + [True] * (count - lost) + [False] * lost


def test_a_hole_in_one_source_changes_its_value_and_mask_alone(whole, tmp_path):
    holed = several(tmp_path / "cube", radar_b=[step for step in range(21) if step != 12])  # 02:00
    before, after = (shown(past(rain_cube(cube), NOW, 2, [5.0], SOURCES)) for cube in (whole, holed))
    changed = (before != after)[0].flatten(2).any(dim=2)
    value, mask = 3, 5  # of radar_b, behind the three channels of the radar
    assert changed.nonzero().tolist() == [[1, value], [1, mask]]
    assert after[0, 1, [value, mask]].unique().tolist() == [0.0]


def test_a_source_that_is_late_is_as_old_as_it_is_and_leaves_the_others_as_they_are(whole, tmp_path):
    late = several(tmp_path / "cube", ir_108=range(8))  # up to 01:45
    expected = past(rain_cube(whole), NOW, 2, [5.0], SOURCES)
    batch = newest_past(rain_cube(late), NOW, 2, [5.0], stalest=30, beside=SOURCES)
    assert batch.satellite_age[0].T.tolist() == [[25.0, 15.0, 5.0], [60.0, 45.0, 30.0]]
    assert batch.satellite[0, 1:, 1, 0, 0].tolist() == [236.0, 237.0]
    assert torch.equal(batch.satellite[:, :, 0], expected.satellite[:, :, 0])
    for name in ("radar", "age", "init_time"):
        assert torch.equal(getattr(batch, name).nan_to_num(-1), getattr(expected, name).nan_to_num(-1))
    assert shown(batch)[0, -1, -1].unique() * 60 == 30
    assert network()(batch).probability.isfinite().all()


def test_what_is_later_than_that_is_not_observed_when_it_was_due(tmp_path):
    late = rain_cube(several(tmp_path / "cube", ir_108=range(8)))
    for batch in (
        newest_past(late, NOW, 2, [5.0], stalest=20, beside=SOURCES),
        past(late, NOW, 2, [5.0], SOURCES),
    ):
        assert batch.satellite[0, :, 1].isnan().all()
        assert batch.satellite_age[0, :, 1].tolist() == [30.0, 15.0, 0.0]
        assert not batch.satellite[0, :, 0].isnan().any()


def test_where_the_radar_is_late_the_others_are_not(whole):
    cube, wide = rain_cube(whole), Beside(tuple(NAMES), (3, 2), surroundings=4, reach=1.0)
    late, in_time = past_at(cube, NOW, 2, [5.0], TEN, wide), past(cube, NOW, 2, [5.0], wide)
    earlier = past(cube, NOW - TEN, 2, [5.0], wide)
    assert late.age.tolist() == [[15.0, 10.0]] and torch.equal(late.init_time, in_time.init_time)
    for name, same in (("satellite", in_time), ("satellite_age", in_time), ("radar", earlier)):
        assert torch.equal(getattr(late, name).nan_to_num(-1), getattr(same, name).nan_to_num(-1))
    assert torch.equal(late.surroundings, earlier.surroundings), "which are of the radar's times"


def test_a_source_that_never_was_is_masked_with_finite_ages(without_radar_b, whole):
    batch = past(rain_cube(without_radar_b), NOW, 2, [5.0], SOURCES)
    frames, usual = shown(batch), shown(past(rain_cube(whole), NOW, 2, [5.0], SOURCES))
    assert not frames[:, :, [3, 5]].any() and frames.isfinite().all()
    others = [channel for channel in range(frames.shape[2]) if channel not in (3, 5, 7)]
    assert torch.equal(frames[:, :, others], usual[:, :, others])
    assert network()(batch).probability.isfinite().all()


def test_a_group_without_frames_is_a_source_that_is_not_there(tmp_path):
    cube = several(tmp_path / "cube", radar_b=())
    Cube.open_or_create(cube, Cube.open(cube).grid, cf.RAINFALL_RATE, START, TEN, "radar_b")
    sides = Sides(stored(rain_cube(cube)), SOURCES)
    assert sides.lacking == ["radar_b"]
    assert past(rain_cube(cube), NOW, 2, [5.0], SOURCES).satellite[:, :, 0].isnan().all()


def test_how_far_other_radars_reach_back_is_told_and_a_satellite_does_not_count(whole, without_radar_b):
    assert Sides(rain_cube(whole), SOURCES).back == 6  # 3 frames of 10 minutes each, in steps of 5
    assert Sides(rain_cube(without_radar_b), SOURCES).back == 0


def test_what_is_taken_for_rain_must_be_rain(whole):
    taken = Beside.of(network(), ["ir_108", "radar_b"])
    with pytest.raises(
        ValueError, match=r"ir_108 holds brightness_temperature \(K\).*rainfall_rate \(mm h-1\)"
    ):
        past(rain_cube(whole), NOW, 2, [5.0], taken)


def test_one_number_of_images_wants_one_cadence(whole):
    together = MetNet(channels=8, depth=0, frames=2, satellite=SEES["satellite"], satellite_frames=3)
    with pytest.raises(
        ValueError, match=r"ir_108 has images at other times than radar_b; .*satellite_frames"
    ):
        past(rain_cube(whole), NOW, 2, [5.0], Beside.of(together, NAMES))
    with pytest.raises(ValueError, match=r"images=\[3, 2\]: expected one number for all"):
        Beside(("a", "b", "c"), (3, 2))


@pytest.fixture(scope="module")
def run(whole, without_radar_b, tmp_path_factory):
    """Two steps on samples of two cubes, one of which has no second radar."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.train._calibrated", lambda *_: None)
        trained_on(
            [whole, without_radar_b],
            folder,
            2,
            model={**MODEL, **SEES},
            satellite=NAMES,
            validation=0.0,
            drop_out=DropOut(frames=0.1, sectors=0.1, late=0.5, sources=0.3),
            trainer={"log_every_n_steps": 1},
        )
    return folder


def test_a_network_of_several_cadences_trains_on_cubes_of_which_one_lacks_a_source(run):
    weights = trained(run).network.state_dict()
    assert all(weight.isfinite().all() for weight in weights.values())
    assert weights["head.classify.weight"].any(), "which is 0 before the first step"
    card = json.loads((run / "model.json").read_text())
    assert card["satellite"] == NAMES and len(card["cubes"]) == 2
    assert card["scaling"]["satellite"][0] == {"value": card["scaling"]["radar"]["value"]}


@pytest.mark.usefixtures("uncalibrated")
def test_it_is_validated_on_a_cube_that_lacks_a_source(whole, tmp_path):
    other = several(tmp_path / "cube", radar_b=(), start=START + timedelta(days=1))
    done = trained_on(
        whole, tmp_path / "run", 1, model={**MODEL, **SEES}, satellite=NAMES, validation_cubes=[other]
    )
    assert np.isfinite(list(done.validation.values())).all() and done.validation["val_crps"] > 0


@pytest.mark.parametrize("name", ["whole", "without_radar_b"])
def test_the_trained_network_forecasts_from_either_cube(run, name, request, tmp_path):
    cube, store = request.getfixturevalue(name), str(tmp_path / "forecasts")
    made = forecast(cube, trained(run), store, init_time=f"{NOW:%Y-%m-%dT%H:%MZ}")
    mean = ForecastStore.open(store).dataset(made.made[0])["rainfall_rate_mean"].values
    seen = ~np.isnan(Cube.open(cube).block(NOW, 1)[0])
    assert np.isfinite(mean[:, seen]).all()


def test_its_forecast_depends_on_every_image_of_every_source(run, whole):
    model = trained(run)
    batch = with_motion(past(rain_cube(whole), NOW, 2, [5.0, 15.0], Beside.of(model.network, NAMES)))
    fields = {"radar": batch.radar.clone(), "satellite": batch.satellite.clone()}
    told = {name: field.requires_grad_() for name, field in fields.items()}
    replaced = type(batch)(**{**vars(batch), **told})
    model.network.logits(replaced).square().sum().backward()
    assert (told["radar"].grad[0].abs().sum(dim=(1, 2)) > 0).all()
    each = told["satellite"].grad[0].abs().sum(dim=(2, 3)) > 0
    assert each.T.tolist() == [[True, True, True], [False, True, True]]
