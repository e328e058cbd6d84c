"""The baselines carry rain as they say, and say nothing where they know nothing."""

import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from metnet.batch import Batch
from pipelines import motion as motion_module
from pipelines.baselines.extrapolation import Extrapolation
from pipelines.baselines.persistence import Persistence
from pipelines.baselines.steps import Steps
from pipelines.motion import NOISE, motion, motion_and_doubt


def rain_field(size: int = 160, seed: int = 0) -> np.ndarray:
    """Smooth showers (mm/h) with dry places between, periodic."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(size, size)), 4, mode="wrap")
    return (8 * np.clip(noise / noise.std() - 0.5, 0, None)).astype(np.float32)


def drifting(x: int, y: int, frames: int, size: int = 160) -> torch.Tensor:
    """A field that moves by whole cells (to the east, to the south) from frame to frame."""
    field = rain_field(size)
    return torch.from_numpy(np.stack([np.roll(field, (y * i, x * i), (0, 1)) for i in range(frames)]))


def batch(radar: torch.Tensor, lead_time: list[float], minutes: float = 5.0) -> Batch:
    age = minutes * torch.arange(len(radar) - 1, -1, -1, dtype=torch.float32)
    return Batch(
        radar=radar[None],
        age=age[None],
        init_time=torch.zeros(1, dtype=torch.int64),
        lead_time=torch.tensor(lead_time),
        cell_size=torch.tensor([1000.0]),
    )


BASELINES = [Persistence(), Extrapolation(), Steps(members=2)]


def test_persistence_repeats_the_newest_frame():
    radar = drifting(3, 1, 2)
    radar[1, 4:7, 9] = torch.nan

    members = Persistence()(batch(radar, [5.0, 60.0])).members

    for lead in range(2):
        assert torch.equal(members[0, 0, lead].nan_to_num(-1), radar[1].nan_to_num(-1))


def test_motion_finds_a_known_drift():
    flow = motion(drifting(3, -2, 4).numpy(), [15.0, 10.0, 5.0, 0.0])

    middle = flow[:, 30:-30, 30:-30]
    assert np.abs(middle[0] * 5 - 3).max() < 0.5 and np.abs(middle[0].mean() * 5 - 3) < 0.1
    assert np.abs(middle[1] * 5 + 2).max() < 0.5 and np.abs(middle[1].mean() * 5 + 2) < 0.1


def test_extrapolation_brings_a_drifting_field_where_it_will_be():
    frames = drifting(3, -2, 10)
    radar, later = frames[:4], frames[[4, 6, 9]]

    forecast = Extrapolation()(batch(radar, [5.0, 15.0, 30.0])).members[0, 0]

    inner = (slice(None), slice(40, -40), slice(40, -40))
    error = (forecast - later)[inner].abs().mean(dim=(1, 2))
    still = (radar[3] - later)[inner].abs().mean(dim=(1, 2))
    assert (error < 0.12 * still).all(), (error, still)


def test_rain_that_would_come_from_outside_is_no_forecast():
    forecast = Extrapolation()(batch(drifting(4, 0, 4), [25.0])).members[0, 0, 0]

    assert forecast[60:100, :17].isnan().all()  # 4 cells a frame for 5 frames
    assert not forecast[60:100, 24:].isnan().any()


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_extrapolation_knows_real_ages_when_a_past_frame_is_missing(gone):
    frames = drifting(2, 1, 7)
    radar = frames[:4].clone()
    radar[gone] = torch.nan

    whole = Extrapolation()(batch(frames[:4], [15.0])).members[0, 0, 0]
    less = Extrapolation()(batch(radar, [15.0])).members[0, 0, 0]

    inner = (slice(30, -30), slice(30, -30))
    assert (less - whole)[inner].abs().mean() < 0.05
    assert (less - frames[6])[inner].abs().mean() < 0.15 < (frames[3] - frames[6])[inner].abs().mean()


def test_a_missing_newest_frame_is_replaced_by_one_carried_further():
    frames = drifting(2, 1, 6)
    radar = frames[:4].clone()
    radar[3] = torch.nan

    forecast = Extrapolation()(batch(radar, [10.0])).members[0, 0, 0]

    assert (forecast - frames[5])[30:-30, 30:-30].abs().mean() < 0.15


@pytest.mark.parametrize("baseline", BASELINES, ids=str)
def test_dry_stays_dry_and_unobserved_unobserved(baseline):
    dry = torch.zeros(4, 64, 64)
    dry[:, :, 50:] = torch.nan

    forecast = baseline(batch(dry, [5.0, 30.0]))

    for lead in range(2):
        for member in forecast.members[0, :, lead]:
            assert torch.equal(member.nan_to_num(-1), dry[0].nan_to_num(-1))


@pytest.mark.parametrize("baseline", BASELINES, ids=str)
def test_nothing_seen_gives_no_forecast(baseline):
    forecast = baseline(batch(torch.full((4, 40, 40), torch.nan), [5.0]))
    assert forecast.members.isnan().all()


def test_a_static_edge_of_coverage_does_not_hold_rain_back():
    frames = drifting(3, 0, 5).clone()
    rows, columns = torch.arange(160)[:, None] - 80, torch.arange(160) - 80
    frames[:, rows**2 + columns**2 > 70**2] = torch.nan

    flow = motion(frames[:4].numpy(), [15.0, 10.0, 5.0, 0.0]) * 5

    assert abs(flow[0][~frames[0].isnan().numpy()].mean() - 3) < 0.3


def test_motion_on_a_large_grid_is_that_of_the_averaged_one(monkeypatch):
    radar = drifting(4, -2, 3, size=300).numpy()
    fine = motion(radar, [10.0, 5.0, 0.0])

    monkeypatch.setattr(motion_module, "LARGEST_IMAGE", 160)
    coarse = motion(radar, [10.0, 5.0, 0.0])

    assert coarse.shape == fine.shape
    inner = (slice(None), slice(40, -40), slice(40, -40))
    assert np.abs(coarse - fine)[inner].mean() * 5 < 0.3 < np.abs(fine[inner]).mean() * 5


def test_one_frame_or_no_rain_tells_no_motion():
    assert not motion(drifting(3, 1, 1).numpy(), [0.0]).any()
    assert not motion(np.zeros((3, 30, 30), np.float32), [10.0, 5.0, 0.0]).any()


@pytest.mark.parametrize("minutes, asked", [(5.0, 4), (10.0, 3), (15.0, 3)])
def test_rain_that_turned_long_ago_moves_as_it_does_now(minutes, asked):
    rain = drifting(3, -2, 4).numpy()
    rain[0] = np.roll(rain[0], (12, 12), (0, 1))
    age = minutes * np.arange(4)[::-1]
    told = motion(rain, age.tolist())
    assert np.array_equal(told, motion(rain[1:], age[1:].tolist())) == (asked == 3)
    missing = rain.copy()
    missing[2] = np.nan  # three are asked whatever their age
    assert not np.array_equal(motion(missing, age.tolist()), motion(missing[1:], age[1:].tolist()))


@pytest.mark.parametrize("minutes", [5.0, 10.0])
def test_motion_is_in_doubt_by_how_much_it_changed_between_the_newest_frames(minutes):
    turning = drifting(3, -2, 3).numpy()
    turning[2] = np.roll(turning[2], (0, 4), (0, 1))  # 7 cells to the east, after 3
    age = [2 * minutes, minutes, 0.0]
    steady, doubted = (motion_and_doubt(rain, age) for rain in (drifting(3, -2, 3).numpy(), turning))
    np.testing.assert_array_equal(doubted[:2], motion(turning, age))
    assert steady[2].max() < 0.1 / minutes
    middle = doubted[2, 40:-40, 40:-40]
    assert middle.mean() * minutes == pytest.approx(4 - NOISE, abs=0.7)
    assert middle.min() > 0.7 * middle.max()


@pytest.mark.parametrize("frames", [0, 1, 2, 3])
def test_what_shows_no_two_motions_is_in_no_doubt(frames):
    rain = drifting(3, 1, 3).numpy()
    rain[: 3 - frames] = np.nan
    told = motion_and_doubt(rain, [10.0, 5.0, 0.0])
    assert told.shape == (3, *rain.shape[1:]) and np.isfinite(told).all()
    assert not told[2].any() or frames == 3
    assert not motion_and_doubt(np.zeros_like(rain), [10.0, 5.0, 0.0]).any()


@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (11, 12), (12, 12), (13, 700)])
def test_any_grid_has_a_motion(shape, monkeypatch):
    monkeypatch.setattr(motion_module, "LARGEST_IMAGE", 100)
    rain = np.random.default_rng(0).gamma(1, 5, (3, *shape)).astype(np.float32)
    flow = motion_and_doubt(rain, [10.0, 5.0, 0.0])
    assert flow.shape == (3, *shape) and np.isfinite(flow).all()


def test_samples_of_a_batch_are_forecast_alone():
    one, two = batch(drifting(2, 1, 4), [10.0]), batch(drifting(-3, 2, 4), [10.0])
    both = Batch(
        radar=torch.cat([one.radar, two.radar]),
        age=torch.cat([one.age, two.age]),
        init_time=torch.zeros(2, dtype=torch.int64),
        lead_time=one.lead_time,
        cell_size=torch.full((2,), 1000.0),
    )

    members = Extrapolation()(both).members

    for index, alone in enumerate((one, two)):
        torch.testing.assert_close(members[index : index + 1], Extrapolation()(alone).members, equal_nan=True)


def test_steps_spreads_with_lead_time_around_the_extrapolation():
    radar = drifting(2, 1, 3, size=96)
    past = batch(radar, [5.0, 30.0])

    members = Steps(members=4, seed=1)(past).members[0]
    plain = Extrapolation(frames=3)(past).members[0, 0]

    assert (members.isnan() == plain.isnan()).all() and (members[~members.isnan()] >= 0).all()
    spread = members.nan_to_num().std(dim=0).mean(dim=(1, 2))
    assert 0 < spread[0] < spread[1]
    inner = (slice(None), slice(24, -24), slice(24, -24))
    assert (members.mean(dim=0) - plain)[inner].abs().mean() < plain[inner].mean()
    assert torch.equal(Steps(members=4, seed=1)(past).members[0].nan_to_num(), members.nan_to_num()), (
        "the seed decides"
    )


def test_steps_goes_on_with_the_two_newest_frames_or_with_one():
    radar = drifting(2, 1, 3, size=96)
    radar[1] = torch.nan
    two = Steps(members=2)(batch(radar, [10.0])).members[0]
    radar[0] = torch.nan
    one = Steps(members=2)(batch(radar, [10.0])).members[0]

    assert not torch.equal(two[0].nan_to_num(), two[1].nan_to_num())
    assert torch.equal(one[0], radar[2][None]) and torch.equal(one[1], radar[2][None])  # no motion is known


def test_steps_of_rain_alike_everywhere_is_the_extrapolation():
    radar = drifting(2, 1, 3, size=64)
    radar[2] = 3.0
    assert (Steps(members=2)(batch(radar, [10.0])).members[0] - 3.0).abs().nan_to_num().max() < 1e-5


def test_steps_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pysteps.nowcasts", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install 'metnet-nowcast\[verify\]'"):
        Steps()(batch(torch.zeros(3, 8, 8), [5.0]))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="frames=1"):
        Extrapolation(frames=1)
    with pytest.raises(ValueError, match="members=1"):
        Steps(members=1)


@pytest.mark.data
def test_on_real_rain_extrapolation_beats_persistence_and_agrees_with_pysteps(data):
    """Two hours of KNMI rain (2010-08-26): as good as pysteps' Lucas-Kanade motion and its warp."""
    import netCDF4

    pytest.importorskip("pysteps")
    from pysteps.extrapolation.semilagrangian import extrapolate
    from pysteps.motion.lucaskanade import dense_lucaskanade

    frames = []
    for path in sorted((data / "knmi" / "2010" / "08").glob("*.h5"))[18:31]:
        with netCDF4.Dataset(path) as file:
            file.set_auto_maskandscale(False)
            counts = file["image1"]["image_data"][250:506, 250:506]
        frames.append(np.where(counts == 65535, np.nan, counts * 0.12).astype(np.float32))
    radar, later = torch.from_numpy(np.stack(frames[:4])), np.stack([frames[5], frames[9]])

    ours = Extrapolation()(batch(radar, [10.0, 30.0])).members[0, 0].numpy()
    decibel = 10 * np.log10(np.maximum(np.nan_to_num(np.stack(frames[1:4])), 0.1))
    flow = dense_lucaskanade(decibel, verbose=False)
    theirs = extrapolate(frames[3].astype(np.float64), flow, 6, allow_nonfinite_values=True)[[1, 5]]

    known = ~(np.isnan(ours) | np.isnan(theirs) | np.isnan(later))
    assert known.mean() > 0.5

    def error(forecast):
        return np.array([np.abs(forecast[i] - later[i])[known[i]].mean() for i in range(2)])

    still = np.stack([frames[3]] * 2)
    assert (error(ours) < 0.85 * error(still)).all(), (error(ours), error(still))
    assert (error(ours) < 1.05 * error(theirs)).all(), (error(ours), error(theirs))
