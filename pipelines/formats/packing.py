"""`Packing`: how stored numbers become physical ones (CF-1.11 section 8.1 and 2.5.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.formats.arrays import Array

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Packing:
    """Scale, offset and what is missing, of one array."""

    scale: float  # of a stored number, in the array's unit
    offset: float  # in the array's unit
    factor: float  # from the array's unit to another
    missing: tuple[float, ...]  # stored numbers
    least: float  # of what is not missing, as stored
    most: float
    unsigned: bool  # though the type that it is stored in is signed (NetCDF users' guide: _Unsigned)

    @classmethod
    def of(
        cls,
        array: Array,
        missing: Sequence[float] = (),
        factor: float = 1.0,
        fill_is_missing: bool = True,
    ) -> "Packing":
        """As an array's attributes say, and some more numbers that are missing.

        `fill_is_missing` is about the format's own fill value, where no attribute names one.

        Raises:
            ValueError: if they are no numbers.
        """
        told = array.attributes
        fills = [*_numbers(told, "_FillValue"), *_numbers(told, "missing_value")]
        if "_FillValue" not in told and array.fill is not None and fill_is_missing:
            fills.append(array.fill)
        scale, offset = (_numbers(told, name) for name in ("scale_factor", "add_offset"))
        low, high = (_numbers(told, name) for name in ("valid_min", "valid_max"))
        both = _numbers(told, "valid_range")
        if len(both) not in (0, 2) or max(map(len, (scale, offset, low, high))) > 1:
            raise ValueError("its scale_factor, add_offset, valid_min, valid_max or valid_range is no number")
        return cls(
            scale=scale[0] if scale else 1.0,
            offset=offset[0] if offset else 0.0,
            factor=factor,
            missing=tuple(value for value in (*fills, *missing) if not np.isnan(value)),
            least=max((*low, *both[:1]), default=-np.inf),
            most=min((*high, *both[1:]), default=np.inf),
            unsigned=str(told.get("_Unsigned", "false")).lower() == "true",
        )

    def unpacked(self, stored: NDArray[Any]) -> Values:
        """The physical values; NaN where missing. Numbers of up to 16 bits go by a table.

        Raises:
            ValueError: if they are no numbers.
        """
        if stored.dtype.kind not in "iufb":
            raise ValueError(f"holds {stored.dtype}, expected numbers")
        if stored.dtype.kind == "b":
            stored = stored.astype(np.uint8)
        if self.unsigned and stored.dtype.kind == "i":
            stored = stored.view(f"u{stored.dtype.itemsize}")
        bits = 8 * stored.dtype.itemsize
        if stored.dtype.kind == "f" or bits > 16 or stored.size < 2**bits:
            return self._computed(stored)
        places = stored.view(f"u{stored.dtype.itemsize}")
        codes = np.arange(2**bits, dtype=places.dtype).view(stored.dtype)
        table: Values = self._computed(codes)
        return table[places]

    def _computed(self, stored: NDArray[Any]) -> Values:
        if (self.scale, self.offset, self.factor) == (1.0, 0.0, 1.0):
            values = stored.astype(np.float32)
        else:
            exact = (stored * np.float64(self.scale) + self.offset) * self.factor
            values = exact.astype(np.float32)
        for value in self._missing(stored.dtype):
            values[stored == value] = np.nan
        least, most = (self._turned(value, stored.dtype) for value in (self.least, self.most))
        if least > -np.inf:
            values[stored < least] = np.nan
        if most < np.inf:
            values[stored > most] = np.nan
        return values

    def _turned(self, value: float, dtype: np.dtype[Any]) -> float:
        """A bound that is told as a signed number although the stored ones are not."""
        turns = self.unsigned and np.isfinite(value) and value < 0
        return value % 2.0 ** (8 * dtype.itemsize) if turns else value

    def _missing(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The missing numbers in the type of the stored ones, so that they compare equal to the last bit."""
        if dtype.kind == "f":
            return np.array(self.missing, dtype)
        bits = 8 * dtype.itemsize
        whole = [int(value) % 2**bits for value in self.missing if value == int(value)]
        return np.array(whole, np.uint64).astype(f"u{dtype.itemsize}").view(dtype)


def _numbers(attributes: Any, name: str) -> list[float]:
    if name not in attributes:
        return []
    try:
        return [float(value) for value in np.atleast_1d(attributes[name])]
    except (TypeError, ValueError) as error:
        raise ValueError(f"its attribute {name} is {attributes[name]!r}, expected a number") from error
