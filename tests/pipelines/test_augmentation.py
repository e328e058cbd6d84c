import pickle
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metnet.batch import Batch
from metnet.model import MetNet
from pipelines.augmentation import AS_OBSERVED, Augmentation, Change, Leeway, widened
from pipelines.beside import Beside
from pipelines.drop_out import DropOut
from pipelines.motion import FRAMES, motion_and_doubt
from pipelines.samples import Mixed, Samples, Span, check_apart, collate, split
from pipelines.task import Task
from tests.pipelines.fields import Field, showers, telling
from tests.pipelines.training import START, drifting, made_cube, trained_on

SPAN = Span(frames=3, leads=(1, 2, 6))
STILL = Beside(motion=False)
INITS = np.arange(2, 34)  # all of 40 frames


def numbered(times=40, side=40):
    """A cube whose frame number i holds i + 1 everywhere."""
    return Field(np.broadcast_to(np.arange(1.0, times + 1)[:, None, None], (times, side, side)).astype("f4"))


def changed(cube, inits=INITS, span=SPAN, crop=16, beside=STILL, seed=0, **shares):
    return Samples(cube, inits, span, crop, seed=seed, beside=beside, augmentation=Augmentation(**shares))


def init_of(batch):
    return round((int(batch.init_time[0]) - START.timestamp()) / 300)


def steps_of(batch):
    """The number of each frame, and of each target, of a sample of `numbered`."""
    return [[round(float(field.mean())) - 1 for field in part[0]] for part in (batch.radar, batch.target)]


# ---- reverse


def test_a_reversed_sample_sees_what_followed_and_is_asked_for_what_came_before():
    samples = changed(numbered(), reverse=1.0)
    for index in range(30):
        batch = samples[index]
        init = init_of(batch)
        assert steps_of(batch) == [[init + 2, init + 1, init], [init - 1, init - 2, init - 6]]
        assert batch.age.tolist() == [[10.0, 5.0, 0.0]]
        assert batch.lead_time.tolist() == [5.0, 10.0, 30.0]


def test_rain_that_grew_and_went_east_shrinks_and_goes_west():
    cube = showers()
    cube.rain *= np.linspace(0.5, 2.0, len(cube.rain))[:, None, None].astype("f4")
    forwards = changed(cube, np.arange(8, 20), crop=48, beside=Beside())[0]
    backwards = changed(cube, np.arange(8, 20), crop=48, beside=Beside(), reverse=1.0)[0]
    for batch, sign in ((forwards, 1), (backwards, -1)):
        assert batch.motion[0, 0].mean() * sign > 0.1  # cells a minute, of 0.3
        assert (batch.target[0, 0].max() - batch.radar[0, 0].max()) * sign > 0


def test_reversed_samples_reach_both_ends_of_what_is_learned_from_and_no_further():
    inits = np.arange(12, 24)  # frames 10 to 29 are learned from
    samples = changed(numbered(), inits, reverse=0.5, stride=0.3)
    touched = [step for index in range(400) for part in steps_of(samples[index]) for step in part]
    assert min(touched) == 10 and max(touched) == 29
    turned = {init_of(samples[index]) for index in range(400) if samples.told(index).count("backwards")}
    assert turned == set(range(16, 28))  # 6 steps before, 2 after


def test_what_changed_samples_may_hold_is_told_where_leaks_are_looked_for():
    for share, steps in ((0.0, [10, 11, 12, 13, 14, 18]), (0.5, [*range(10, 19)])):
        touched = changed(numbered(), np.array([12]), reverse=share).touched
        assert ((touched - START.timestamp()) / 300).tolist() == steps


@settings(max_examples=30)
@given(
    observed=st.lists(st.booleans(), min_size=20, max_size=80),
    frames=st.integers(1, 4),
    leads=st.sets(st.integers(1, 6), min_size=1),
    share=st.floats(0, 0.5),
)
def test_no_augmented_sample_holds_a_frame_that_is_validated_on(observed, frames, leads, share):
    span, cube = Span(frames, tuple(sorted(leads))), numbered(len(observed), side=8)
    cube.rain[~np.array(observed)] = np.nan
    try:
        parts = split(np.array(observed), span, share)
    except ValueError:
        return
    asked = {"reverse": 0.5, "stride": 0.5}
    learned = Samples(cube, parts.training, span, 8, beside=STILL, augmentation=Augmentation(**asked))
    if len(parts.validation):
        check_apart([learned], [Samples(cube, parts.validation, span, 8)])
    allowed = set(np.flatnonzero(learned.leeway.learned))
    for index in range(20):
        batch = learned[index]  # never beyond the ends of the cube, where `Field` has no frames
        init, back = init_of(batch), "backwards" in learned.told(index)
        ages, ahead = batch.age[0] / 5, batch.lead_time / 5
        held = {*(init - (-1 if back else 1) * ages).int().tolist()}
        held |= {*(init + (-1 if back else 1) * ahead).int().tolist()}
        assert held <= allowed
        assert observed[init] and not batch.radar[0, -1].isnan().any()
        assert not batch.target.isnan().all()


def test_a_share_of_one_half_is_about_half_of_the_samples_and_the_rest_is_as_it_was():
    asked = {"reverse": 0.5, "stride": 0.25, "coarsen": 0.25}
    plain, samples = changed(telling(rows=64, columns=64)), changed(telling(rows=64, columns=64), **asked)
    told = [samples.told(index) for index in range(400)]
    shares = {word: sum(word in each for each in told) / 400 for word in ("backwards", "2 frames", "2 x 2")}
    assert shares["backwards"] == pytest.approx(0.5, abs=0.07)
    assert shares["2 frames"] == pytest.approx(0.25, abs=0.07)
    assert shares["2 x 2"] == pytest.approx(0.25, abs=0.07)
    untouched = [index for index in range(60) if told[index].endswith(tuple("0123456789"))]
    assert len(untouched) > 8
    for index in untouched:
        assert torch.equal(samples[index].radar, plain[index].radar)
        assert torch.equal(samples[index].target, plain[index].target)


# ---- gain


def test_all_rates_of_a_sample_are_times_one_factor_and_nan_and_dry_stay():
    cube = telling()
    cube.rain[:, :4] = np.nan
    cube.rain[:, :, :4] = 0.0
    beside = Beside(motion=False, surroundings=4)
    plain, strong = changed(cube, beside=beside), changed(cube, beside=beside, gain=0.35)
    logarithms = []
    for index in range(200):
        one, other = plain[index], strong[index]
        factor = other.target.nansum() / one.target.nansum()
        for name in ("radar", "target", "surroundings"):
            before, after = getattr(one, name), getattr(other, name)
            assert torch.equal(before.isnan(), after.isnan())
            assert torch.equal(before == 0, after == 0)
            assert torch.allclose(after, factor * before, rtol=1e-5, equal_nan=True)
        logarithms.append(float(factor.log()))
    assert np.mean(logarithms) == pytest.approx(0, abs=0.08)
    assert np.std(logarithms) == pytest.approx(0.35, abs=0.06)


def test_of_what_stands_beside_the_radar_only_other_radars_are_stronger():
    satellite = torch.full((1, 2, 2, 8, 8), 3.0)
    rain = torch.ones(1, 2, 8, 8)
    batch = Batch(
        rain,
        torch.tensor([[5.0, 0.0]]),
        torch.zeros(1).long(),
        torch.tensor([5.0]),
        torch.tensor([1000.0]),
        satellite=satellite,
        satellite_age=torch.tensor([[[5.0], [0.0]]]),
    )
    after = Change(gain=2.0)(batch, rain=(1,))
    assert (after.radar == 2).all()
    assert (after.satellite[:, :, 0] == 3).all() and (after.satellite[:, :, 1] == 6).all()
    assert (Change(gain=2.0)(batch).satellite == 3).all()


# ---- stride


def test_of_a_sample_at_twice_the_cadence_every_second_frame_is_seen_and_targets_stay():
    samples = changed(numbered(), stride=1.0)
    doubled = 0
    for index in range(40):
        batch = samples[index]
        init, (seen, asked) = init_of(batch), steps_of(batch)
        assert asked == [init + 1, init + 2, init + 6]
        assert batch.lead_time.tolist() == [5.0, 10.0, 30.0]
        if init >= 4:  # there are four steps before it
            assert seen == [init - 4, init - 2, init]
            assert batch.age.tolist() == [[20.0, 10.0, 0.0]]
            doubled += 1
        else:
            assert seen == [init - 2, init - 1, init]
            assert batch.age.tolist() == [[10.0, 5.0, 0.0]]
    assert doubled > 25


def test_the_surroundings_are_of_the_frames_that_are_seen_in_their_order():
    beside = Beside(motion=False, surroundings=4, reach=1.0)
    for shares in ({"stride": 1.0}, {"reverse": 1.0}, {"reverse": 1.0, "stride": 1.0}, {"coarsen": 1.0}):
        samples = changed(numbered(), beside=beside, **shares)
        for index in range(10):
            batch = samples[index]
            middle = batch.surroundings[0].nanmean(dim=(1, 2))
            assert torch.allclose(middle, batch.radar[0, :, 0, 0])


def test_rain_seen_every_second_frame_has_the_motion_it_has():
    cube = showers(times=40)
    batch = changed(cube, np.arange(10, 30), crop=48, beside=Beside(), stride=1.0)[1]
    assert batch.age.tolist() == [[20.0, 10.0, 0.0]]
    wet = batch.radar[0, -1] > 1
    assert batch.motion[0, 0][wet].mean() == pytest.approx(1.5 / 5, rel=0.25)


# ---- coarsen


def test_a_coarse_sample_is_the_means_of_an_area_twice_as_wide():
    cube = telling(rows=64, columns=64)
    samples = changed(cube, coarsen=1.0)
    corners = set()
    for index in range(20):
        batch, init = samples[index], init_of(samples[index])
        y, x = (int(samples.told(index).split(name)[1].split("-")[0]) for name in ("rows ", "columns "))
        window = cube.rain[[init - 2, init - 1, init, init + 1, init + 2, init + 6], y : y + 32, x : x + 32]
        means = torch.from_numpy(window).unfold(1, 2, 2).unfold(2, 2, 2).mean(dim=(3, 4))
        assert torch.allclose(torch.cat([batch.radar[0], batch.target[0]]), means)
        assert batch.cell_size.item() == pytest.approx(2000, rel=0.01)
        corners.add((y, x))
    assert len(corners) > 15


def test_coarse_surroundings_are_means_over_as_many_coarse_cells_around_the_same_middle():
    beside = Beside(motion=False, surroundings=4, reach=1.0)
    samples = changed(telling(rows=64, columns=64), beside=beside, coarsen=1.0)
    for index in range(5):
        batch = samples[index]
        means = batch.radar[0].unfold(1, 4, 4).unfold(2, 4, 4).mean(dim=(3, 4))
        assert torch.allclose(batch.surroundings[0], means, rtol=1e-5)


def test_means_of_less_than_half_of_the_cells_are_not_observed_and_dry_counts_as_dry():
    field = torch.tensor([[8.0, 4.0, 8.0, torch.nan], [0.0, 4.0, torch.nan, 0.0]])
    less = torch.tensor([[torch.nan, torch.nan], [5.0, torch.nan]])
    radar = torch.cat([field, less.repeat(1, 2)])[None, None]
    batch = Batch(radar, torch.zeros(1, 1), torch.zeros(1).long(), torch.tensor([5.0]), torch.tensor([500.0]))
    after = Change(side=2)(batch)
    assert torch.allclose(
        after.radar[0, 0], torch.tensor([[4.0, 4.0], [torch.nan, torch.nan]]), equal_nan=True
    )
    assert after.cell_size.item() == 1000.0


def test_coarse_rain_moves_half_as_many_cells_a_minute():
    cube = showers(times=30, rows=96, columns=96, speed=2.0)
    fine = changed(cube, np.array([12]), crop=48, beside=Beside())[0]
    coarse = changed(cube, np.array([12]), crop=48, beside=Beside(), coarsen=1.0)[0]
    speeds = [float(batch.motion[0, 0][batch.radar[0, -1] > 1].mean()) for batch in (fine, coarse)]
    assert speeds[0] == pytest.approx(2 / 5, rel=0.2)
    assert speeds[1] == pytest.approx(speeds[0] / 2, rel=0.2)
    newest, ages = coarse.radar[0, -FRAMES:].numpy(), coarse.age[0, -FRAMES:].tolist()
    assert np.array_equal(coarse.motion[0], motion_and_doubt(newest, ages))


@given(rows=st.integers(16, 50), columns=st.integers(16, 50), seed=st.integers(0, 100), data=st.data())
def test_a_wider_window_holds_the_one_it_is_around_and_lies_in_the_grid(rows, columns, seed, data):
    y, x = data.draw(st.integers(0, rows - 8)), data.draw(st.integers(0, columns - 8))
    random = np.random.default_rng(seed)
    top, left, height, width = widened((y, x, 8, 8), 2, (rows, columns), random)
    assert (height, width) == (16, 16)
    assert 0 <= top <= y <= top + 8 and top + 16 <= rows
    assert 0 <= left <= x <= left + 8 and left + 16 <= columns
    assert widened((y, x, 8, 8), 1, (rows, columns), random) == (y, x, 8, 8)


# ---- all of it


ALL = {"reverse": 0.5, "gain": 0.35, "stride": 0.5, "coarsen": 0.5}


def test_the_same_seed_and_number_give_the_same_change_in_whatever_process():
    cube = telling(rows=64, columns=64)
    samples = changed(cube, beside=Beside(), **ALL)
    samples[0]
    copy = pickle.loads(pickle.dumps(samples))
    other = changed(cube, beside=Beside(), seed=1, **ALL)
    for index in range(20):
        for name in ("radar", "age", "init_time", "target", "cell_size", "motion"):
            assert torch.equal(getattr(samples[index], name), getattr(copy[index], name)), name
    kinds = {
        samples.told(index).split("columns")[1].partition(", ")[2].split("rates")[0] for index in range(60)
    }
    assert len(kinds) == 8, "each with each"
    assert [samples.told(index) for index in range(20)] != [other.told(index) for index in range(20)]


def test_samples_that_are_changed_otherwise_make_one_batch():
    samples = changed(telling(rows=64, columns=64), **ALL)
    batch = collate([Mixed([samples], 8)[index] for index in range(8)])
    assert set(batch.cell_size.div(1000).round().int().tolist()) == {1, 2}
    assert {tuple(age) for age in batch.age.tolist()} == {(10.0, 5.0, 0.0), (20.0, 10.0, 0.0)}


def test_nothing_asked_for_is_nothing_changed():
    cube = telling()
    plain, off = Samples(cube, INITS, SPAN, 16, beside=STILL), changed(cube)
    for index in range(20):
        for name in ("radar", "age", "init_time", "target", "cell_size"):
            assert torch.equal(getattr(plain[index], name), getattr(off[index], name))
        assert plain.told(index) == off.told(index)
    assert Augmentation().draw(np.random.default_rng(0)) == AS_OBSERVED
    assert torch.equal(torch.from_numpy(plain.touched), torch.from_numpy(off.touched))


def test_what_drops_out_drops_out_of_the_changed_sample():
    cube = showers(rows=96, columns=96)
    samples = Samples(
        cube, np.arange(8, 20), SPAN, 32, drop_out=DropOut(0.3, 0.3, 0.3), augmentation=Augmentation(**ALL)
    )
    for index in range(20):
        batch = samples[index]
        told = motion_and_doubt(batch.radar[0, -FRAMES:].numpy(), batch.age[0, -FRAMES:].tolist())
        assert np.array_equal(batch.motion[0], told)
        assert not batch.radar.isnan().all() and not batch.target.isnan().any()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"reverse": 1.2}, "augmentation.reverse=1.2: expected a share of the samples, from 0 to 1"),
        ({"coarsen": -0.1}, "augmentation.coarsen=-0.1: expected a share"),
        ({"stride": float("nan")}, "augmentation.stride=nan: expected a share"),
        ({"gain": 3.0}, "augmentation.gain=3.0: expected the spread of the logarithm"),
        ({"gain": -0.1}, "augmentation.gain=-0.1: expected the spread"),
    ],
)
def test_what_is_no_share_is_refused_by_its_key(wrong, told):
    with pytest.raises(ValueError, match=told):
        Augmentation(**wrong)


# ---- where it cannot be


def refused(cube, inits=INITS, span=SPAN, crop=16, beside=STILL):
    asked = Augmentation(reverse=0.5, gain=0.3, stride=0.5, coarsen=0.5)
    leeway = Leeway(
        asked, cube, inits, span.frames, span.reach, span.leads, (min(crop, cube.grid.y_size),) * 2, beside
    )
    kept = {name for name in ("reverse", "gain", "stride", "coarsen") if getattr(leeway.applied, name)}
    assert kept == {"reverse", "gain", "stride", "coarsen"} - set(leeway.refused)
    return leeway.refused


def test_a_cube_of_rain_alone_that_is_long_and_wide_enough_allows_all():
    assert refused(numbered()) == {}
    assert refused(numbered(), beside=replace(STILL, static=("elevation",), surroundings=4)) == {}


def test_a_cube_that_is_too_short_too_slow_too_small_or_too_coarse_says_so():
    short = refused(numbered(10), np.array([2, 3]))  # frames 0 to 9
    assert set(short) == {"stride"} and "too short" in short["stride"]
    holed = numbered(9)
    holed.rain[6] = np.nan
    assert set(refused(holed, np.array([2]))) == {"reverse", "stride"}
    slow = refused(replace(numbered(), cadence=timedelta(minutes=10)))
    assert set(slow) == {"stride"} and "10 minutes, above 6" in slow["stride"]
    narrow = refused(numbered(side=31))
    assert set(narrow) == {"coarsen"} and "31 x 31 cells" in narrow["coarsen"]
    assert refused(numbered(side=32)) == {}
    odd = refused(numbered(), beside=replace(STILL, surroundings=3))
    assert set(odd) == {"coarsen"} and "surroundings=3" in odd["coarsen"]


class Wide(Field):
    """Its cells are 2 km wide."""

    @property
    def grid(self):
        return replace(super().grid, x_step=2000.0, y_step=-2000.0)


def test_cells_that_are_coarse_already_stay():
    cells = refused(Wide(numbered().rain))
    assert set(cells) == {"coarsen"} and "m wide, above 1100" in cells["coarsen"]


@pytest.mark.parametrize(
    ("beside", "left_out"),
    [
        (Beside(("ir_108",), (2,)), {"reverse", "coarsen"}),
        (Beside(("radar_b",), (2,), rain=("radar_b",)), {"reverse"}),
        (Beside(place=True), {"reverse", "coarsen"}),
    ],
)
def test_clouds_and_the_sun_never_run_backwards(beside, left_out):
    assert set(refused(numbered(), beside=beside)) == left_out


# ---- in a training


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    return made_cube(tmp_path_factory.mktemp("cubes") / "cube", drifting(60))


def rates_shown_to(monkeypatch, kind, name):
    """The rates of rain in all batches that a method is called with; filled as it is called."""
    method, rates = getattr(kind, name), set()

    def noted(self, batch, *more):
        for part in (batch.radar, batch.target):
            rates.update(part[part > 0].tolist())
        return method(self, batch, *more)

    monkeypatch.setattr(kind, name, noted)
    return rates


def test_the_network_and_its_prior_learn_from_changed_samples_and_are_validated_on_the_observed(
    cube, tmp_path, monkeypatch, one_thread, uncalibrated
):
    """The rain of this cube is 3 mm/h and nothing else."""
    fitted, learned, validated = (
        rates_shown_to(monkeypatch, *method)
        for method in ((MetNet, "pixels"), (Task, "training_step"), (Task, "validation_step"))
    )
    trained_on(cube, tmp_path, steps=3, prior_steps=1, local_steps=0, augmentation=Augmentation(gain=0.5))
    assert validated == {3.0}
    assert len(fitted) > 4 and len(learned) > 2 and not validated & (fitted | learned)


def test_what_a_cube_does_not_allow_is_said(cube, tmp_path, caplog, one_thread, uncalibrated):
    asked = Augmentation(reverse=0.5, coarsen=0.5)
    with caplog.at_level("INFO", logger="pipelines"):
        trained_on(cube, tmp_path, steps=1, augmentation=asked)
    told = [record.getMessage() for record in caplog.records if "augmentation" in record.getMessage()]
    assert len(told) == 1
    assert "without augmentation.coarsen: a grid of 24 x 32 cells is less than 2 samples wide" in told[0]
