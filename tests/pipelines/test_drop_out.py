"""What fails is NaN, as often as it was asked for, and never all of it."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metnet.batch import Batch
from pipelines.drop_out import DropOut

SIDE, FRAMES, FACTOR = 24, 6, 4
SECONDARY = ("satellite", "static", "surroundings")


def sample(radar=None):
    """All that a batch can hold, observed everywhere; the rain says which frame it is."""
    steps = torch.arange(1.0, FRAMES + 1)
    return Batch(
        radar=steps[None, :, None, None].repeat(1, 1, SIDE, SIDE) if radar is None else radar,
        age=torch.arange(25.0, -1, -5)[None],
        init_time=torch.tensor([0]),
        lead_time=torch.tensor([5.0]),
        cell_size=torch.tensor([1000.0]),
        target=torch.ones(1, 1, SIDE, SIDE),
        static=torch.ones(1, 2, SIDE, SIDE),
        satellite=steps[None, :3, None, None, None].repeat(1, 1, 2, SIDE, SIDE),
        satellite_age=torch.tensor([[[30.0], [15.0], [0.0]]]),
        place=torch.ones(1, 2, SIDE, SIDE),
        surroundings=steps[None, :, None, None].repeat(1, 1, 12, 12),
    )


def two_sources():
    """The same with two sources: three images every 15 minutes, and two every 10."""
    batch = sample()
    batch.satellite[:, 0, 1] = torch.nan
    return replace(batch, satellite_age=torch.tensor([[[30.0, 20.0], [15.0, 10.0], [0.0, 0.0]]]))


def dropped(drop_out, number, batch=None, ages=True):
    return drop_out(sample() if batch is None else batch, np.random.default_rng((5, number)), FACTOR, ages)


def test_nothing_is_moved_up_for_a_network_that_is_told_no_ages():
    for number in range(20):
        kept, before = dropped(DropOut(late=1.0), number, ages=False), sample()
        assert torch.equal(kept.age, before.age) and torch.equal(kept.satellite_age, before.satellite_age)
        assert kept.radar[:, -1].isnan().all() and kept.satellite[:, -1].isnan().all()


def gone(field):
    """Of a series (1, time, ...), which frames are NaN throughout."""
    return field[0].isnan().flatten(1).all(dim=1)


def test_without_a_chance_of_failure_nothing_changes():
    kept, before = dropped(DropOut(), 0), sample()
    for field in fields(Batch):
        value = getattr(before, field.name)
        assert value is None or torch.equal(getattr(kept, field.name), value), field.name


@pytest.mark.parametrize("key", ["frames", "sectors", "late", "sources"])
@pytest.mark.parametrize("chance", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(key, chance):
    with pytest.raises(ValueError, match=rf"drop_out\.{key}=.*from 0 to 1"):
        DropOut(**{key: chance})


def test_the_same_number_gives_the_same_failures():
    every = DropOut(0.3, 0.5, 0.5, 0.5)
    for number in range(20):
        one, other = dropped(every, number), dropped(every, number)
        for field in ("radar", "age", *SECONDARY):
            assert torch.equal(getattr(one, field).nan_to_num(-1), getattr(other, field).nan_to_num(-1))


@settings(max_examples=60)
@given(
    chances=st.tuples(*[st.sampled_from([0.0, 0.4, 1.0])] * 4),
    missing=st.lists(st.booleans(), min_size=FRAMES, max_size=FRAMES),
    number=st.integers(0, 10**6),
)
def test_of_what_was_observed_something_always_stays(chances, missing, number):
    batch = sample()
    batch.radar[0, torch.tensor(missing)] = torch.nan
    kept = dropped(DropOut(*chances), number, batch)
    assert bool(kept.radar.isfinite().any()) == (not all(missing))
    assert torch.equal(kept.target, batch.target) and torch.equal(kept.place, batch.place)
    left = kept.radar[kept.radar.isfinite()]
    assert set(left.tolist()) <= {step + 1.0 for step in range(FRAMES) if not missing[step]}


def test_frames_are_missing_as_often_as_was_asked_for():
    shares = [gone(dropped(DropOut(frames=0.3), number).radar).float().mean() for number in range(400)]
    assert np.mean(shares) == pytest.approx(0.3, abs=0.03)


def test_every_frame_keeps_its_true_age():
    every = DropOut(frames=0.3, late=0.7)
    shifted = 0
    for number in range(100):
        kept = dropped(every, number)
        shifted += kept.age[0, -1].item() > 0
        for frame, age in zip(kept.radar[0], kept.age[0], strict=True):
            if frame.isfinite().any():
                assert age.item() == 5 * (FRAMES - frame.nan_to_num(0).max().item())
    assert 20 < shifted < 80


def test_a_late_source_lacks_its_newest_frames_and_keeps_an_older_one():
    kinds = set()
    for number in range(200):
        kept = dropped(DropOut(late=1.0), number)
        newest = kept.radar.nan_to_num(0).max().item()
        assert 1 <= newest < FRAMES
        assert torch.equal(gone(kept.radar), gone(kept.surroundings))
        kinds.add((newest, bool(gone(kept.radar)[-1])))
    assert len(kinds) == 2 * (FRAMES - 1)  # each delay, both as missing frames and as older ages


def test_each_source_of_images_is_late_by_itself_and_every_image_keeps_its_true_age():
    kinds = {0: set(), 1: set()}
    together = []
    for number in range(400):
        kept = dropped(DropOut(late=0.5), number, two_sources())
        late = []
        for band, (minutes, seen) in enumerate(((15, [1, 2, 3]), (10, [2, 3]))):
            newest = [image.nan_to_num(0).max().item() for image in kept.satellite[0, :, band]]
            left = [image for image in newest if image]
            assert left == seen[: len(left)] or left == seen[-len(left) :]
            assert all(
                age == minutes * (3 - image)
                for image, age in zip(newest, kept.satellite_age[0, :, band].tolist(), strict=True)
                if image
            )
            kinds[band].add((max(newest), newest[-1] == 0))
            late.append(max(newest) < 3)
        together.append(tuple(late))
    assert kinds[0] == {(3, False), (2, False), (2, True), (1, False), (1, True), (0, True)}
    assert kinds[1] == {(3, False), (2, False), (2, True), (0, True)}
    for pair in ((False, False), (False, True), (True, False), (True, True)):
        assert 0.15 < together.count(pair) / 400 < 0.35


def test_bands_of_one_source_are_late_together():
    for number in range(50):
        kept = dropped(DropOut(late=0.5, sources=0.3), number)
        assert torch.equal(kept.satellite[:, :, 0].nan_to_num(-1), kept.satellite[:, :, 1].nan_to_num(-1))


def test_a_source_of_which_nothing_was_there_is_neither_late_nor_older():
    batch = two_sources()
    batch.satellite[:, :, 1] = torch.nan
    kept = [dropped(DropOut(late=1.0), number, batch) for number in range(20)]
    assert all(each.satellite[:, :, 1].isnan().all() for each in kept)
    assert all(torch.equal(each.satellite_age[..., 1], batch.satellite_age[..., 1]) for each in kept)
    assert len({each.satellite_age[0, -1, 0].item() for each in kept}) > 1


@pytest.mark.parametrize("late", [0.0, 1.0])
def test_a_source_with_one_image_can_only_be_missing(late):
    batch = two_sources()
    batch = replace(batch, satellite=batch.satellite[:, -1:], satellite_age=batch.satellite_age[:, -1:])
    kept = dropped(DropOut(late=late), 0, batch)
    assert kept.satellite.isnan().all() == bool(late)
    assert torch.equal(kept.satellite_age, batch.satellite_age)


def test_each_of_several_sources_is_missing_by_itself():
    kept = [dropped(DropOut(sources=0.5), number, two_sources()).satellite for number in range(200)]
    missing = [tuple(bool(each[:, :, band].isnan().all()) for band in range(2)) for each in kept]
    for pair in ((False, False), (False, True), (True, False), (True, True)):
        assert 0.15 < missing.count(pair) / 200 < 0.35


def test_a_dead_radar_hides_the_same_cells_of_all_frames_and_of_the_surroundings():
    hidden = []
    for number in range(200):
        kept = dropped(DropOut(sectors=1.0), number)
        holes = kept.radar[0].isnan()
        assert (holes == holes[0]).all()
        hidden.append(holes[0].float().mean().item())
        wide = kept.surroundings[0, 0].isnan()
        middle = wide[3:9, 3:9].repeat_interleave(4, 0).repeat_interleave(4, 1)  # 48 cells wide around 24
        if 0.1 < hidden[-1] < 0.9:
            assert (middle == holes[0]).float().mean() > 0.75
        assert not kept.satellite.isnan().any()
    assert 0.1 < np.mean(hidden) < 0.5 and max(hidden) < 1


def test_a_secondary_source_is_missing_whole_and_each_by_itself():
    kept = [dropped(DropOut(sources=0.5), number) for number in range(100)]
    for name in SECONDARY:
        holes = [getattr(each, name).isnan() for each in kept]
        assert all(hole.all() or not hole.any() for hole in holes)
        assert 25 < sum(bool(hole.all()) for hole in holes) < 75
    assert len({tuple(bool(getattr(each, name).isnan().any()) for name in SECONDARY) for each in kept}) == 8
    assert not any(each.radar.isnan().any() for each in kept)
