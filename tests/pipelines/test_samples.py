from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metnet.model import MetNet
from pipelines.beside import Beside
from pipelines.drop_out import DropOut
from pipelines.ingest import ingest
from pipelines.motion import FRAMES, motion_and_doubt
from pipelines.plain import rain_cube
from pipelines.sample_store import stored
from pipelines.samples import Mixed, Samples, Span, check_apart, collate, loader, split
from pipelines.sources.simulated import Simulated
from pipelines.trained import with_motion
from tests.pipelines.fields import Field, showers, telling
from tests.pipelines.training import FIVE, START

SPAN = Span(frames=3, leads=(1, 2, 6))


def test_lead_times_in_minutes_become_steps_of_the_cadence():
    assert Span.of(FIVE, 3, [5, 10, 30]) == SPAN
    assert Span.of(timedelta(minutes=2), 4, [2.0, 20.0]).leads == (1, 10)
    assert Span.of(timedelta(seconds=150), 4, [2.5, 5]).leads == (1, 2)


@pytest.mark.parametrize("leads", [[5, 7], [0, 5], [-5], [2.5], [float("nan")], [float("inf")]])
def test_a_lead_time_between_two_frames_is_refused_with_both_numbers(leads):
    with pytest.raises(ValueError, match=r"minutes is no multiple of the cube's cadence, 5 minutes"):
        Span.of(FIVE, 3, leads)


@pytest.mark.parametrize("leads", [[], [10, 5], [5, 5]])
def test_lead_times_that_do_not_rise_are_refused(leads):
    with pytest.raises(ValueError, match="minutes that rise"):
        Span.of(FIVE, 3, leads)


@given(
    observed=st.lists(st.booleans(), min_size=12, max_size=120),
    frames=st.integers(1, 4),
    lead=st.integers(1, 5),
    share=st.floats(0, 0.5, exclude_max=True),
)
def test_no_frame_is_both_trained_on_and_validated_on(observed, frames, lead, share):
    span = Span(frames, tuple(range(1, lead + 1)))
    try:
        parts = split(np.array(observed), span, share)
    except ValueError:
        return

    def touched(inits):
        return {i + step for i in inits for step in range(-(frames - 1), lead + 1)}

    assert not touched(parts.training) & touched(parts.validation)
    for init in (*parts.training, *parts.validation):
        assert observed[init]
        assert any(observed[init + step] for step in span.leads)
        assert init - (frames - 1) >= 0 and init + lead < len(observed)
    assert len(parts.training) > 0


def test_validation_is_the_last_share_behind_a_blackout():
    parts = split(np.ones(108, bool), SPAN, 0.2)
    assert parts.validation.tolist() == list(range(82, 102))  # 100 init times, from the third frame on
    assert parts.training.tolist() == list(range(2, 82 - SPAN.steps))


def test_between_training_and_validation_lies_all_that_another_radar_reaches_back():
    span = replace(SPAN, back=9)
    parts = split(np.ones(108, bool), span, 0.2)
    assert parts.validation[0] - 9 == parts.training[-1] + SPAN.leads[-1] + 1
    assert replace(SPAN, back=1).steps == SPAN.steps, "the radar itself reaches further"
    cube = telling(times=108)
    learned, kept = (Samples(cube, inits, span, crop=16) for inits in (parts.training, parts.validation))
    check_apart([learned], [kept])
    later = Samples(cube, parts.training + 1, span, crop=16)
    with pytest.raises(ValueError, match="hold the same rain"):
        check_apart([later], [kept])


def test_a_cube_too_short_to_split_is_all_for_training():
    parts = split(np.ones(14, bool), SPAN, 0.4)
    assert parts.training.tolist() == [2, 3, 4, 5, 6, 7]
    assert parts.validation.size == 0


def test_too_few_frames_are_refused_with_the_numbers_and_what_to_do():
    with pytest.raises(
        ValueError, match=r"8 frames .* needs 9 in a row \(3 past frames.*ingest a longer time"
    ):
        split(np.ones(8, bool), SPAN, 0.1)


@pytest.mark.parametrize("share", [-0.1, 0.6])
def test_a_share_that_makes_no_sense_is_refused(share):
    with pytest.raises(ValueError, match="validation="):
        split(np.ones(50, bool), SPAN, share)


def test_a_sample_is_cut_from_one_place_at_consecutive_times():
    cube = telling()
    samples = Samples(cube, np.arange(2, 34), SPAN, crop=16, count=20)
    for batch in samples:
        radar, target = batch.radar[0].double(), batch.target[0].double()
        init = round((int(batch.init_time[0]) - START.timestamp()) / 300)
        assert radar[:, 0, 0].long().tolist() == [init - 2, init - 1, init]
        assert target[:, 0, 0].long().tolist() == [init + 1, init + 2, init + 6]
        place = radar - radar.floor()
        assert torch.allclose(place, (target - target.floor())[:3], atol=1e-3)
        assert torch.allclose(place[0, 0].diff(), torch.tensor(1e-4).double(), atol=2e-5)
        assert batch.age.tolist() == [[10.0, 5.0, 0.0]]
        assert batch.lead_time.tolist() == [5.0, 10.0, 30.0]
        assert batch.cell_size.item() == pytest.approx(1000, rel=0.01)


def test_the_same_seed_and_number_give_the_same_sample_and_others_do_not():
    cube = telling()

    def firsts(seed):
        samples = Samples(cube, np.arange(2, 34), SPAN, crop=16, seed=seed, augment=True)
        return [samples[i].radar[0, 0] for i in range(12)]

    again = [torch.equal(a, b) for a, b in zip(firsts(1), firsts(1), strict=True)]
    other = [torch.equal(a, b) for a, b in zip(firsts(1), firsts(2), strict=True)]
    assert all(again)
    assert not any(other)
    assert len({float(sample.sum()) for sample in firsts(1)}) > 8


def test_samples_end_where_they_were_told_to():
    assert len(list(Samples(telling(), np.arange(2, 34), SPAN, crop=16, count=3))) == 3


def test_places_with_rain_are_drawn_more_often_and_dry_ones_still_are():
    rain = np.zeros((30, 64, 64), np.float32)
    rain[:, 40:56, 8:24] = 5.0
    samples = Samples(Field(rain), np.arange(2, 24), SPAN, crop=16, count=300)
    wet = np.array([float((samples[i].radar[0, -1] > 0).float().mean()) for i in range(300)])
    assert wet.mean() > 3 * (16 / 64) ** 2
    assert (wet == 0).sum() > 10


def test_a_place_where_nothing_was_observed_is_never_drawn():
    rain = np.full((30, 64, 64), np.nan, np.float32)
    rain[:, :, :20] = 0.0
    samples = Samples(Field(rain), np.arange(2, 24), SPAN, crop=16, count=100)
    assert all(samples[i].radar[0, -1].isfinite().any() for i in range(100))


def test_every_cell_can_be_the_corner_of_a_sample():
    cube, still = telling(rows=24, columns=24), Beside(motion=False)
    samples = Samples(cube, np.arange(2, 34), SPAN, crop=16, count=2000, beside=still)
    corners = {tuple(divmod(round(float(samples[i].radar[0, 0, 0, 0]) % 1 * 1e4), 24)) for i in range(2000)}
    assert {row for row, _ in corners} == set(range(9))
    assert {column for _, column in corners} == set(range(9))


def test_a_grid_smaller_than_the_crop_is_taken_whole():
    samples = Samples(telling(rows=12, columns=30), np.arange(2, 34), SPAN, crop=16, count=3, augment=True)
    assert samples[0].radar.shape == (1, 3, 12, 16)


def test_a_missing_frame_stays_missing_and_dry_stays_dry():
    cube = telling()
    cube.rain[::2] = np.nan
    cube.rain[1::2] = 0.0
    samples = Samples(cube, np.arange(3, 33, 2), SPAN, crop=16, count=5, augment=True)
    for batch in samples:
        assert batch.radar[0].isnan().float().mean(dim=(1, 2)).tolist() == [0.0, 1.0, 0.0]
        assert batch.target[0].isnan().float().mean(dim=(1, 2)).tolist() == [1.0, 0.0, 0.0]
        assert batch.radar.nansum() == 0


def test_past_and_future_are_turned_alike():
    rain = np.repeat(telling(times=1, rows=16, columns=16).rain, 40, axis=0)
    samples = Samples(Field(rain), np.arange(2, 34), SPAN, crop=16, count=64, augment=True)
    seen = set()
    for batch in samples:
        assert torch.equal(batch.radar[0], batch.target[0])
        corners = batch.radar[0, 0][[0, 0, -1, -1], [0, -1, 0, -1]]
        seen.add(tuple(corners.argsort().tolist()))
    assert len(seen) == 8


@pytest.mark.parametrize(("rows", "columns"), [(30, 1), (1, 30), (1, 1)])
def test_a_grid_of_a_single_line_can_be_turned_too(rows, columns):
    samples = Samples(telling(rows=rows, columns=columns), np.arange(2, 20), SPAN, crop=16, augment=True)
    for index in range(8):
        assert samples[index].radar.shape == (1, 3, min(rows, 16), min(columns, 16))


def test_of_a_frame_no_more_is_read_than_the_sample_holds():
    cube = telling()
    samples = Samples(cube, np.arange(2, 34), SPAN, crop=16)
    samples.index.draw(np.random.default_rng(0))
    cube.read.clear()
    samples[0]
    assert [(count, window[2:]) for count, window in cube.read] == [(3, (16, 16)), (6, (16, 16))]


def test_a_sample_does_not_share_memory_with_the_cube():
    cube = telling()
    samples = Samples(cube, np.arange(2, 34), SPAN, crop=40, count=1)
    before = cube.rain.copy()
    samples[0].radar.fill_(-1)
    assert np.array_equal(cube.rain, before)


def test_collating_keeps_the_order_and_the_shared_lead_times():
    samples = Samples(telling(), np.arange(2, 34), SPAN, crop=16, count=3)
    batch = collate([samples[i] for i in range(3)])
    assert batch.radar.shape == (3, 3, 16, 16)
    assert batch.lead_time.tolist() == [5.0, 10.0, 30.0]
    for i in range(3):
        assert torch.equal(batch.target[i], samples[i].target[0])
        assert batch.init_time[i] == samples[i].init_time[0]


def test_a_cube_without_an_observed_pixel_is_refused():
    cube = Field(np.full((30, 16, 16), np.nan, np.float32))
    with pytest.raises(ValueError, match="nothing to learn from"):
        Samples(cube, np.arange(2, 20), SPAN, crop=16, count=3)[0]


def test_of_several_cubes_only_the_lead_times_that_fit_one_count():
    five = Field(np.zeros((30, 8, 8), np.float32))
    ten = Field(np.zeros((30, 8, 8), np.float32), timedelta(minutes=10))
    assert Span.of_those(ten, 3, [5, 10, 15, 30]).leads == (1, 3)
    assert Span.of_those(five, 3, [5, 10, 15, 30]).leads == (1, 2, 3, 6)
    with pytest.raises(ValueError, match="no multiple of the cube's cadence, 10 minutes"):
        Span.of_those(ten, 3, [5, 15])


def test_a_short_event_has_no_long_lead_times():
    ten_frames = Field(np.zeros((10, 8, 8), np.float32))
    assert Span.of_those(ten_frames, 3, [5, 10, 25, 30, 60]).leads == (1, 2, 5)  # 0.6 x 45 min


def test_a_batch_is_of_one_cube_and_every_cube_has_its_turn():
    ten = timedelta(minutes=10)
    cubes = [telling(), replace(telling(), cadence=ten), Field(telling().rain + 100)]
    parts = [
        Samples(cube, np.arange(2, 30), Span(3, (1, 2)), crop=16, seed=n) for n, cube in enumerate(cubes)
    ]
    mixed = Mixed(parts, batch_size=4, seed=3)
    seen = []
    for first in range(0, 240, 4):
        batch = collate([mixed[index] for index in range(first, first + 4)])
        minutes = (batch.lead_time[0].item(), bool(batch.radar.min() > 100))
        seen.append(minutes)
    assert {place: seen.count(place) > 10 for place in seen} == dict.fromkeys(
        [(5.0, False), (10.0, False), (5.0, True)], True
    )
    again = Mixed(parts, batch_size=4, seed=3)
    assert torch.equal(again[101].radar, mixed[101].radar)
    with pytest.raises(ValueError, match="0 cubes"):
        Mixed([], 4)


def test_everything_that_is_a_map_is_turned_alike_and_the_motion_is_that_of_the_turned_rain():
    cube = showers()
    beside = Beside(place=True, surroundings=3, reach=1.0)
    plain = Samples(cube, np.array([9]), SPAN, crop=48, beside=beside)[0]
    turned = Samples(cube, np.array([9]), SPAN, crop=48, count=40, augment=True, beside=beside)
    east = set()
    for batch in turned:
        order, where = (
            (1e3 * b.place[0, 0].double() + b.place[0, 1]).flatten().argsort() for b in (plain, batch)
        )
        for name in ("radar", "target", "place"):
            before, after = (getattr(b, name)[0].flatten(1) for b in (plain, batch))
            assert torch.equal(before[:, order], after[:, where]), name
        coarse = batch.radar[0].unfold(1, 3, 3).unfold(2, 3, 3).mean(dim=(3, 4))
        assert torch.allclose(batch.surroundings[0], coarse, atol=1e-4)
        newest = batch.radar[0, -FRAMES:].numpy()
        assert np.array_equal(batch.motion[0], motion_and_doubt(newest, batch.age[0, -FRAMES:].tolist()))
        # east on the map is where the longitude rises: the rain still drifts there
        lon = batch.place[0, 0]
        rising = torch.stack([lon.diff(dim=1).mean(), lon.diff(dim=0).mean()])
        drift = batch.motion[0, :2].mean(dim=(1, 2))
        assert torch.nn.functional.cosine_similarity(rising, drift, dim=0) > 0.9
        east.add(
            tuple(drift.sign().int().tolist()) if drift.abs().min() > 0.02 else int(drift.abs().argmax())
        )
    assert len(east) >= 2


def test_what_is_dropped_is_not_in_the_motion_either_and_the_target_stays():
    cube = showers()
    whole = Samples(cube, np.arange(5, 12), SPAN, crop=32, count=30, seed=2)
    holed = Samples(
        cube, np.arange(5, 12), SPAN, crop=32, count=30, seed=2, drop_out=DropOut(0.3, 0.3, 0.3, 0.3)
    )
    less = 0
    for one, other in zip(whole, holed, strict=True):
        assert torch.equal(one.target, other.target) and torch.equal(one.init_time, other.init_time)
        less += bool(other.radar.isnan().any())
        told = motion_and_doubt(other.radar[0, -FRAMES:].numpy(), other.age[0, -FRAMES:].tolist())
        assert np.array_equal(other.motion[0], told)
    assert 15 < less <= 30
    again = Samples(cube, np.arange(5, 12), SPAN, crop=32, seed=2, drop_out=DropOut(0.3, 0.3, 0.3, 0.3))
    assert all(torch.equal(again[i].radar.nan_to_num(-1), holed[i].radar.nan_to_num(-1)) for i in range(30))


def test_samples_of_a_network_that_is_told_no_ages_end_at_the_init_time():
    late = DropOut(late=1.0)
    for ages in (True, False):
        samples = Samples(showers(), np.arange(5, 12), SPAN, 32, 20, beside=Beside(ages=ages), drop_out=late)
        assert all(sample.age[0, -1] == 0 for sample in samples) != ages


def test_the_motion_is_that_of_the_newest_frames_that_are_there_as_in_a_forecast():
    span = Span(frames=8, leads=(1,))
    holed = Samples(showers(), np.arange(8, 12), span, crop=32, count=20, drop_out=DropOut(0.5, 0.0, 0.5))
    for sample in holed:
        forecast_with = with_motion(replace(sample, motion=None)).motion
        assert torch.equal(sample.motion, forecast_with)
        assert (~sample.radar.isnan()).flatten(2).any(dim=2).sum() < 2 or sample.motion.any()


def test_a_network_forecasts_from_whatever_is_left():
    torch.manual_seed(0)
    network = MetNet(frames=3, channels=8, fine_channels=4, depth=1, lead_features=8, grid=(4, 4)).eval()
    worst = DropOut(0.7, 0.7, 0.7, 0.7)
    samples = Samples(showers(), np.arange(5, 12), SPAN, crop=16, count=40, augment=True, drop_out=worst)
    for batch in samples:
        with torch.no_grad():
            assert network(batch).mean().isfinite().all()


def test_a_network_without_advection_has_no_motion_worked_out_for_it():
    assert Samples(showers(), np.array([9]), SPAN, crop=32, beside=Beside(motion=False))[0].motion is None


def test_a_sample_is_told_by_cube_time_and_place():
    cube = telling()
    samples = Samples(cube, np.arange(2, 34), SPAN, crop=16, count=20)
    mixed = Mixed([samples], batch_size=4)
    for index in (0, 7):
        first = round(float(samples[index].radar[0, 0, 0, 0] % 1) * 1e4)
        row, column = divmod(first, 30)
        told = samples.told(index)
        assert f"rows {row}-{row + 15}, columns {column}-{column + 15}" in told
        time = datetime.fromtimestamp(int(samples[index].init_time[0]), UTC)
        assert told.startswith(f"cube memory, init time {time:%Y-%m-%dT%H:%MZ}")
        assert mixed.told(index) == told


def test_samples_of_other_lead_times_are_not_put_into_one_batch():
    cube = telling()
    samples = [Samples(cube, np.arange(2, 30), Span(3, leads), crop=16)[0] for leads in ((1, 2), (1, 3))]
    with pytest.raises(ValueError, match=r"other lead times in one batch: \(5.0, 10.0\) and \(5.0, 15.0\)"):
        collate(samples)


def test_a_source_that_none_of_the_cubes_has_is_refused():
    samples = Samples(telling(), np.arange(2, 30), SPAN, crop=16, beside=Beside(("ir_108",), (2,)))
    with pytest.raises(ValueError, match="ir_108: no such satellite group"):
        Mixed([samples], 4)


def samples_of(cube, inits):
    return Samples(cube, np.array(inits), SPAN, crop=16)


def test_the_two_parts_of_a_split_are_apart():
    cube = telling(times=80)
    parts = split(cube.observed, SPAN, 0.3)
    check_apart([samples_of(cube, parts.training)], [samples_of(cube, parts.validation)])


def test_a_frame_that_is_trained_and_validated_on_is_refused_with_its_time():
    cube = telling(times=80)
    # the last target of init time 20 is frame 26, the first frame of init time 28 is frame 26
    with pytest.raises(ValueError, match=r"memory: what is learned from .* first at 2024-06-01T02:10:00Z"):
        check_apart([samples_of(cube, [10, 20])], [samples_of(cube, [40, 28])])
    check_apart([samples_of(cube, [10, 20])], [samples_of(cube, [40, 29])])


@pytest.mark.parametrize(
    ("west", "hours", "minutes", "leaks"),
    [
        (4e6, 0, 5, True),  # the same place and time
        (4.02e6, 0, 5, True),  # a strip in common
        (4.04e6, 0, 5, False),  # beside it
        (4e6, 5, 5, False),  # later
        (4e6, 0, 10, True),  # of another cadence
    ],
)
def test_two_cubes_of_one_place_and_time_are_one_event(west, hours, minutes, leaks):
    learned = telling(times=40)
    kept = replace(
        telling(times=40), path="other", west=west, cadence=timedelta(minutes=minutes),
        start=START + timedelta(hours=hours, minutes=3),
    )  # fmt: skip
    pair = [samples_of(learned, range(2, 33))], [samples_of(kept, range(2, 33))]
    if leaks:
        with pytest.raises(ValueError, match=r"memory and other: .*hold the same rain"):
            check_apart(*pair)
    else:
        check_apart(*pair)


class Numbers:
    """Numbers that are worked out as they are asked for, more of them than fit into memory."""

    def __len__(self):
        return 2**61

    def __getitem__(self, place):
        return 3 * place


def test_a_loader_takes_numbers_from_an_endless_list():
    samples = Samples(telling(), np.arange(2, 34), SPAN, crop=16)
    batches = iter(loader(Mixed([samples], 2), 2, Numbers()))
    for first in (0, 2):
        expected = collate([samples[3 * (first + n)] for n in (0, 1)])
        assert torch.equal(next(batches).radar, expected.radar)


@pytest.mark.slow
def test_spawned_workers_load_what_this_process_would_load(tmp_path):
    """Two workers on a real cube and its store; each opens them anew."""
    ingest(Simulated(size=64, frames=12), str(tmp_path / "cube"))
    store = stored(rain_cube(str(tmp_path / "cube")), 32)
    inits = np.arange(4, 9)
    samples = Samples(store, inits, Span(3, (1, 2)), 32, 6, augment=True, drop_out=DropOut(0.2, 0.2))
    here = list(loader(samples, 2))
    there = list(loader(samples, 2, workers=2))
    assert len(here) == len(there) == 3
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.radar.nan_to_num(-1), other.radar.nan_to_num(-1))
        assert torch.equal(one.motion, other.motion) and torch.equal(one.lead_time, other.lead_time)
