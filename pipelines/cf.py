"""`Variable`: our names for quantities, with their CF names, units and ranges (CF-1.11).

The only table of names. A standard name is from the CF Standard Name Table, or None where it has none.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One physical quantity as it stands in a cube or a forecast."""

    name: str
    long_name: str
    units: str
    valid_range: tuple[float, float]
    standard_name: str | None = None

    def attributes(self) -> dict[str, str | list[float]]:
        """The CF attributes of an array that holds this quantity."""
        named = {} if self.standard_name is None else {"standard_name": self.standard_name}
        return {**named, "long_name": self.long_name, "units": self.units}


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
