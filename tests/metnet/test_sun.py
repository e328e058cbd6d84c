import math
from datetime import UTC, datetime

import pytest
import torch

from metnet.sun import calendar, solar_elevation_sine


def seconds(*date):
    return torch.tensor([round(datetime(*date, tzinfo=UTC).timestamp())])


def elevation(lon, lat, *date):
    place = torch.tensor([lon, lat]).reshape(1, 2, 1, 1)
    return math.degrees(math.asin(solar_elevation_sine(place, seconds(*date)).item()))


def spencer(lon, lat, date):
    """Degrees, by Fourier series (Spencer 1971, Search 2, 172): another formula, good to half a degree."""
    angle = 2 * math.pi * (date.timetuple().tm_yday - 1 + (date.hour - 12) / 24) / 365
    declination = 0.006918 - 0.399912 * math.cos(angle) + 0.070257 * math.sin(angle)
    declination += -0.006758 * math.cos(2 * angle) + 0.000907 * math.sin(2 * angle)
    declination += -0.002697 * math.cos(3 * angle) + 0.00148 * math.sin(3 * angle)
    equation = 7.5e-5 + 0.001868 * math.cos(angle) - 0.032077 * math.sin(angle)
    equation -= 0.014615 * math.cos(2 * angle) + 0.040849 * math.sin(2 * angle)
    hour = math.radians(15 * (date.hour + date.minute / 60 - 12) + lon) + equation
    north = math.radians(lat)
    sine = math.sin(north) * math.sin(declination) + math.cos(north) * math.cos(declination) * math.cos(hour)
    return math.degrees(math.asin(sine))


@pytest.mark.parametrize("month", range(1, 13))
@pytest.mark.parametrize(
    ("lon", "lat"), [(5.2, 52.1), (-97.0, 35.5), (151.2, -33.9), (25.0, 69.0), (179.9, 0.0)]
)
def test_it_agrees_with_another_formula(lon, lat, month):
    for hour in (0, 5, 11, 18):
        expected = spencer(lon, lat, datetime(2019, month, 14, hour, 30, tzinfo=UTC))
        assert elevation(lon, lat, 2019, month, 14, hour, 30) == pytest.approx(expected, abs=0.6)


def test_at_the_solstice_the_sun_stands_over_the_tropic():
    noon = max(elevation(0.0, 23.44, 2020, 6, 20, 12, minute) for minute in range(0, 10))
    assert noon == pytest.approx(90, abs=0.1)


def test_at_the_equinox_day_and_night_are_equal_everywhere():
    day = [elevation(0.0, 50.0, 2020, 3, 20, hour, 0) for hour in range(24)]
    assert sum(sine > 0 for sine in day) == 12


def test_the_calendar_does_not_jump_at_midnight_or_at_new_year():
    before, after = calendar(seconds(2019, 12, 31, 23, 59)), calendar(seconds(2020, 1, 1, 0, 1))
    assert (before - after).abs().max() < 0.01
    noon, night = calendar(seconds(2020, 7, 1, 12)), calendar(seconds(2020, 7, 1, 0))
    assert (noon - night)[0, :2].abs().max() > 1.9
    summer, winter = calendar(seconds(2020, 7, 1, 12)), calendar(seconds(2020, 1, 1, 12))
    assert (summer - winter)[0, 2:].abs().max() > 1.9
