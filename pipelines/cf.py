"""`Variable`: our names for quantities, with their CF names, units and ranges (CF-1.11).

The only table of names. A standard name is from the CF Standard Name Table, or None where it has none.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any


@dataclass(frozen=True)
class Variable:
    """One physical quantity as it stands in a cube or a forecast."""

    name: str
    long_name: str
    units: str
    valid_range: tuple[float, float]
    standard_name: str | None = None
    classes: tuple[tuple[int, str], ...] = ()  # value and meaning, where values are classes and not amounts

    def attributes(self) -> dict[str, str | list[float]]:
        """The CF attributes of an array that holds this quantity."""
        named: dict[str, str | list[float]] = {}
        if self.standard_name is not None:
            named["standard_name"] = self.standard_name
        named |= {"long_name": self.long_name, "units": self.units}
        if self.units == "K":  # CF-1.11 section 3.1.2
            named["units_metadata"] = "temperature: on_scale"
        if self.classes:  # CF-1.11 section 3.5
            named["flag_values"] = [float(value) for value, _ in self.classes]
            named["flag_meanings"] = " ".join(meaning for _, meaning in self.classes)
        return named


def described(name: str, attributes: dict[str, Any]) -> Variable:
    """The quantity of an array with such attributes, `valid_range` among them."""
    low, high = attributes["valid_range"]
    values, meanings = attributes.get("flag_values", ()), str(attributes.get("flag_meanings", "")).split()
    return Variable(
        name,
        attributes["long_name"],
        attributes["units"],
        (float(low), float(high)),
        attributes.get("standard_name"),
        tuple((int(value), meaning) for value, meaning in zip(values, meanings, strict=True)),
    )


RAINFALL_RATE = Variable(
    "rainfall_rate", "rain rate at the surface", "mm h-1", (0.0, 2000.0), "rainfall_rate"
)
RAINFALL_RATE_MEDIAN = Variable(
    "rainfall_rate_median", "median of the forecast rain rate", "mm h-1", (0.0, 2000.0), "rainfall_rate"
)
RAINFALL_RATE_MEAN = Variable(
    "rainfall_rate_mean", "mean of the forecast rain rate", "mm h-1", (0.0, 2000.0), "rainfall_rate"
)
RAINFALL_RATE_QUANTILE = Variable(
    "rainfall_rate_quantile", "quantile of the forecast rain rate", "mm h-1", (0.0, 2000.0), "rainfall_rate"
)
PROBABILITY_OF_EXCEEDANCE = Variable(
    "probability_of_exceedance",
    "probability that the rain rate is at or above the threshold",
    "1",
    (0.0, 1.0),
)

PRECIPITATION_AMOUNT_1H = Variable(
    "precipitation_amount_1h",
    "precipitation of the hour that ends at the valid time",
    "mm",
    (0.0, 500.0),
    "lwe_thickness_of_precipitation_amount",
)
PRECIPITATION_AMOUNT_24H = Variable(
    "precipitation_amount_24h",
    "precipitation of the 24 hours that end at the valid time",
    "mm",
    (0.0, 2500.0),
    "lwe_thickness_of_precipitation_amount",
)
SUMS = {
    PRECIPITATION_AMOUNT_1H.name: timedelta(hours=1),
    PRECIPITATION_AMOUNT_24H.name: timedelta(hours=24),
}
"""Over how long a value is summed, up to its valid time, by the name of the quantity."""
REFLECTIVITY = Variable(
    "reflectivity", "radar reflectivity", "dBZ", (-100.0, 100.0), "equivalent_reflectivity_factor"
)
PRECIPITATION_FLAG = Variable(  # MRMS, table of PrecipFlag
    "precipitation_flag",
    "kind of precipitation at the surface",
    "1",
    (0.0, 255.0),
    classes=(
        (0, "no_precipitation"),
        (1, "warm_stratiform_rain"),
        (3, "snow"),
        (6, "convective_rain"),
        (7, "rain_mixed_with_hail"),
        (10, "cold_stratiform_rain"),
        (91, "tropical_stratiform_rain"),
        (96, "tropical_convective_rain"),
    ),
)
CLOUD_TYPE = Variable("cloud_type", "cloud type of the NWC SAF", "1", (0.0, 255.0))  # classes: by version
RADIANCE = Variable(
    "radiance",
    "radiance at the top of the atmosphere",
    "W m-2 sr-1 um-1",
    (-100.0, 2000.0),
    "toa_outgoing_radiance_per_unit_wavelength",
)
REFLECTANCE = Variable(
    "reflectance",
    "reflectance factor at the top of the atmosphere",
    "1",
    (-1.0, 2.0),
    "toa_bidirectional_reflectance",
)
BRIGHTNESS_TEMPERATURE = Variable(
    "brightness_temperature",
    "brightness temperature at the top of the atmosphere",
    "K",
    (50.0, 450.0),
    "toa_brightness_temperature",
)
SATELLITE_COUNTS = Variable("satellite_counts", "satellite image in counts of no unit", "1", (-1e6, 1e6))
FLASH_EXTENT_DENSITY = Variable(
    "flash_extent_density", "lightning flashes that touched a cell", "1", (0.0, 1e6)
)
ELEVATION = Variable(
    "elevation", "height of the surface above sea level", "m", (-12000.0, 9000.0), "surface_altitude"
)
LAND_FRACTION = Variable(
    "land_fraction", "share of a cell that is land", "1", (0.0, 1.0), "land_area_fraction"
)
RADIANCE_PER_WAVENUMBER = Variable(  # as infrared channels of GOES-R state theirs
    "radiance_per_wavenumber",
    "radiance at the top of the atmosphere, per wavenumber",
    "mW m-2 sr-1 (cm-1)-1",
    (-100.0, 2000.0),
    "toa_outgoing_radiance_per_unit_wavenumber",
)
FLASH_RATE = Variable(
    "lightning_flash_rate",
    "lightning flashes per area and time",
    "km-2 min-1",
    (0.0, 1e5),
    "frequency_of_lightning_flashes_per_unit_area",
)
GROUP_RATE = Variable(
    "lightning_group_rate", "groups of lightning pulses per area and time", "km-2 min-1", (0.0, 1e6)
)
RADAR_QUALITY = Variable("radar_quality", "quality of the radar rainfall, mean of a day", "%", (0.0, 100.0))
