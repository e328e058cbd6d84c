"""Simulated storms: reproducible, moving, and like rain."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from pipelines.sources.simulated import EPOCH, Simulated, carry, rain_rate
from pipelines.sources.source import RemoteFile

START = datetime(2020, 6, 1, tzinfo=UTC)
HOUR = (START - EPOCH) / timedelta(hours=1)
DAY = Simulated()


@pytest.fixture(scope="module")
def day() -> np.ndarray:
    """Every third frame of the default day: (time, y, x)."""
    return np.stack([DAY.read(file).values for file in list(DAY.files(None, None))[::3]])


def test_a_seed_is_a_weather_and_another_seed_is_another():
    url = next(Simulated(seed=3).files(None, None)).url
    assert (
        Simulated(seed=3).read(RemoteFile(url, None)).values.tobytes()
        == Simulated(seed=3).read(RemoteFile(url, None)).values.tobytes()
    )
    assert (rain_rate(3, 128, HOUR + 2) != rain_rate(4, 128, HOUR + 2)).mean() > 0.05


def test_a_frame_does_not_depend_on_those_read_before():
    files = list(DAY.files(None, None))
    late = DAY.read(files[40])
    for file in files[30:40]:
        DAY.read(file)
    assert Simulated().read(files[40]).sha256 == late.sha256


def test_rates_are_those_of_rain(day):
    seen = ~np.isnan(day)
    wet = (day >= 0.1).sum(axis=(1, 2)) / seen.sum(axis=(1, 2))
    assert 0.05 < wet.mean() < 0.3
    assert wet.min() < 0.05  # it stops raining
    assert wet.max() > 0.3  # and there are wide systems
    assert 20 < np.nanmax(day) <= 90
    rain = day[day > 0]
    assert rain.min() == np.float32(0.1)
    assert 0.15 < rain[rain > 10].sum() / rain.sum() < 0.7  # heavy rain is rare but much of the water
    assert np.median(rain) < 1.0 < rain.mean()


def test_small_scales_are_weaker_than_large_ones_but_there():
    field = np.log10(np.maximum(rain_rate(1, 128, HOUR + 15.5), 0.05))
    power = np.abs(np.fft.fft2(field - field.mean())) ** 2
    waves = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    wavelengths = np.array([[64, 24], [24, 12], [12, 6], [6, 3]])  # km
    means = [power[(waves > 1 / long) & (waves <= 1 / short)].mean() for long, short in wavelengths]
    slopes = np.diff(np.log(means)) / np.log(2)
    assert (slopes < -1).all()
    assert (slopes > -5).all()


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    both = ~np.isnan(a) & ~np.isnan(b)
    return float(np.corrcoef(a[both], b[both])[0, 1])


@pytest.mark.parametrize("seed", [1, 2])
def test_the_wind_predicts_rain_and_birth_and_death_end_it(seed):
    carried, still = [], []
    hours = [hour for hour in HOUR + np.arange(0, 24, 3) if (rain_rate(seed, 128, hour) > 0).mean() > 0.1]
    y, x = np.mgrid[:128, :128].astype(float)
    for lead in (0.25, 1.0):
        pairs = []
        for hour in hours:
            before, after = (np.log1p(rain_rate(seed, 128, at)) for at in (hour, hour + lead))
            from_x, from_y = carry(seed, x, y, hour + lead, hour)
            moved = map_coordinates(before, [from_y, from_x], order=1, cval=np.nan)
            pairs.append((correlation(moved, after), correlation(before, after)))
        moved_skill, still_skill = np.mean(pairs, axis=0)
        carried.append(moved_skill)
        still.append(still_skill)
    assert 0.8 < carried[0] < 0.98
    assert 0.1 < carried[1] < 0.6
    assert carried[0] > still[0] + 0.2
    assert carried[1] > still[1] + 0.1


def test_the_wind_differs_from_place_to_place_and_hour_to_hour():
    corners = np.array([0.0, 127.0])
    x, y = carry(1, corners, corners, HOUR, HOUR + 1)
    drift = np.hypot(np.diff(x - corners), np.diff(y - corners))
    later = np.stack(carry(1, corners, corners, HOUR + 6, HOUR + 7)) - np.stack([x, y])
    assert drift[0] > 1.0  # km
    assert np.abs(later).max() > 1.0


def test_going_and_coming_back_ends_at_the_start():
    place = np.linspace(-50, 150, 9)
    x, y = carry(1, *carry(1, place, place[::-1], HOUR, HOUR + 3), HOUR + 3, HOUR)
    assert np.hypot(x - place, y - place[::-1]).max() < 0.2  # km


def test_beyond_the_range_nothing_is_observed_and_sectors_fail_at_times(day):
    never = np.isnan(day).all(axis=0)
    assert never[0, 0]
    assert never[127, 127]
    assert not never[64, 64]
    lost = np.isnan(day).mean(axis=(1, 2)) - never.mean()
    assert 0 < (lost > 0.03).mean() < 0.3


def test_a_few_frames_are_missing():
    delivered = [file.valid_time for file in DAY.files(None, None)]
    missing = {START + timedelta(minutes=5 * index) for index in range(300)} - set(delivered)
    assert 1 <= len(missing) <= 20
    assert delivered == sorted(set(delivered))


def test_a_span_gives_the_files_within_it():
    start, end = START + timedelta(hours=2), START + timedelta(hours=3)
    files = list(DAY.files(start, end))
    assert files == [file for file in DAY.files(None, None) if start <= file.valid_time <= end]
    assert len(files) > 5


def test_a_larger_domain_is_rain_too():
    wet = (rain_rate(1, 256, HOUR + 15.5) > 0).mean()
    assert 0.03 < wet < 0.7


@pytest.mark.parametrize("name", ["simulated:2:20200601T000000Z", "simulated:1:now", "x.grib2"])
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match="expected a name such as"):
        DAY.read(RemoteFile(name, None))


@pytest.mark.parametrize("keys", [{"seed": -1}, {"cadence": float("nan")}])
def test_other_numbers_than_a_radar_has_are_named(keys):
    with pytest.raises(ValueError, match=f"{next(iter(keys))}="):
        Simulated(**keys)


def test_no_radar_is_refused():
    with pytest.raises(ValueError, match="at least 8 cells"):
        Simulated(size=4)
