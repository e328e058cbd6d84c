"""Where the sun stands, to 0.01 degrees (The Astronomical Almanac, section C: low-precision formulas)."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

J2000 = 946_728_000  # seconds since 1970-01-01 UTC at 2000-01-01 12:00
DAY = 86_400  # seconds
YEAR = 365.2425  # days


def solar_elevation_sine(
    place: Float[Tensor, "batch 2 y x"], time: Int[Tensor, "batch"]
) -> Float[Tensor, "batch y x"]:
    """The sine of the sun's height over the horizon, -1 to 1, without refraction.

    Args:
        place: longitude and latitude, degrees.
        time: seconds since 1970-01-01 UTC.
    """
    days = (time - J2000).double() / DAY
    longitude = (280.460 + 0.9856474 * days) % 360
    anomaly = torch.deg2rad((357.528 + 0.9856003 * days) % 360)
    ecliptic = torch.deg2rad(longitude + 1.915 * anomaly.sin() + 0.020 * (2 * anomaly).sin())
    obliquity = torch.deg2rad(23.439 - 4e-7 * days)
    sidereal = torch.deg2rad((280.46062 + 360.98564737 * days) % 360)  # of Greenwich
    # towards the sun: how much lies towards the equinox, a quarter of the equator further, and the pole; no
    # angles, for ONNX Runtime knows their functions in single precision only
    equinox, quarter, pole = (
        part.to(place)[:, None, None]
        for part in (ecliptic.cos(), obliquity.cos() * ecliptic.sin(), obliquity.sin() * ecliptic.sin())
    )
    east, north = torch.deg2rad(place).unbind(dim=1)
    turned = sidereal.to(place)[:, None, None] + east  # from the equinox to each meridian
    return north.sin() * pole + north.cos() * (turned.cos() * equinox + turned.sin() * quarter)


def calendar(time: Int[Tensor, "batch"]) -> Float[Tensor, "batch 4"]:
    """Sine and cosine of the hour of the day (UTC), then of the day of the year; no jump at midnight."""
    seconds = (time - J2000).double()
    day = 2 * math.pi * (seconds / DAY % 1)
    year = 2 * math.pi * (seconds / (DAY * YEAR) % 1)
    return torch.stack([day.sin(), day.cos(), year.sin(), year.cos()], dim=1).float()
