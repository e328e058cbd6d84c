"""`Frame`: one quantity at one valid time on one grid, and where it came from."""

import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from pipelines.cf import Variable
from pipelines.grid import Grid

ALWAYS = datetime(1970, 1, 1, tzinfo=UTC)  # the valid time of what does not change


@dataclass(frozen=True, eq=False)
class Frame:
    """A field as it was observed; NaN is "not observed", 0 is "dry"."""

    variable: Variable
    valid_time: datetime  # UTC; the end of the interval where the quantity is a sum; `ALWAYS` if static
    cadence: timedelta | None  # from one frame of this source to the next; None: it never changes (static)
    grid: Grid
    values: NDArray[np.float32]  # (y, x), in the variable's units
    source: str  # the service and product, as a person would say it
    sha256: str  # of the file the frame was read from
    group: str = "radar"  # of a cube, where frames of this kind belong: "radar", "satellite", "static"
    flags: NDArray[np.uint8] | None = None  # (y, x), what looks wrong (pipelines.quality); None: not judged
    scale_factor: float | None = None  # all values are whole multiples of it; None: of nothing that is known

    def __post_init__(self) -> None:
        """Refuses what no reader may hand on.

        Raises:
            ValueError: for a time that is not UTC, another shape than the grid's, another type than
                float32, infinite numbers, numbers outside the variable's valid range, or a scale factor that
                is none.
        """
        if self.valid_time.utcoffset() != timedelta(0):
            raise ValueError(f"valid_time={self.valid_time}: expected a time in UTC")
        if self.cadence is not None and self.cadence <= timedelta(0):
            raise ValueError(f"cadence={self.cadence}: expected more than 0")
        if (self.cadence is None) != (self.valid_time == ALWAYS):
            raise ValueError(
                f"cadence={self.cadence}, valid_time={self.valid_time}: a static field has no cadence "
                f"and the time {ALWAYS}, every other frame a cadence and another time"
            )
        if self.values.shape != self.grid.shape:
            raise ValueError(f"values of shape {self.values.shape} on a grid of {self.grid.shape}")
        if self.values.dtype != np.float32:
            raise ValueError(f"values of type {self.values.dtype}: expected float32")
        if self.scale_factor is not None and not 0 < self.scale_factor < math.inf:
            raise ValueError(f"scale_factor={self.scale_factor}: expected a number above 0")
        low, high = self.variable.valid_range
        if np.fmin.reduce(self.values, axis=None) < low or np.fmax.reduce(self.values, axis=None) > high:
            outside = (self.values < low) | (self.values > high)  # false where NaN
            raise ValueError(
                f"{int(outside.sum())} of {outside.size} values of {self.variable.name} lie outside "
                f"{low:g}..{high:g} {self.variable.units}, such as {self.values[outside][0]:g}"
            )

    def window(self, y0: int, x0: int, y_size: int, x_size: int) -> "Frame":
        """The part of the field in a window of its grid (row 0 north)."""
        grid = self.grid.window(y0, x0, y_size, x_size)
        values = self.values[y0 : y0 + y_size, x0 : x0 + x_size].copy()  # lets go of the rest
        return replace(self, grid=grid, values=values)


def whole_steps(minutes: float, cadence: timedelta) -> int | None:
    """How many steps of a cadence so many minutes are; None: no whole number of them, from 1 on."""
    steps = minutes / (cadence.total_seconds() / 60)
    nearest = round(steps) if math.isfinite(steps) else 0
    return nearest if nearest > 0 and math.isclose(steps, nearest, abs_tol=1e-6) else None


def iso(time: datetime) -> str:
    """UTC as ISO 8601 with a Z, to the second."""
    return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def parse_time(text: str | datetime, key: str = "") -> datetime:
    """A UTC time from ISO 8601 text (`2019-06-10T00:30`, `20190610T003000Z`); no offset means UTC.

    Raises:
        ValueError: if it is not a time, naming the key that it was given by, if any.
    """
    if isinstance(text, datetime):
        return text.replace(tzinfo=UTC) if text.tzinfo is None else text.astimezone(UTC)
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError as error:
        given = f"{key}={text}" if key else repr(text)
        raise ValueError(f"{given} is not a time: expected ISO 8601 such as 2019-06-10T00:30Z") from error
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def parse_interval(
    start: str | datetime | None, end: str | datetime | None
) -> tuple[datetime | None, datetime | None]:
    """The times of the keys `start` and `end`; None where none is given.

    Raises:
        ValueError: if one is no time, or the end comes before the start.
    """
    first, last = (
        None if text is None else parse_time(text, key) for key, text in (("start", start), ("end", end))
    )
    if first is not None and last is not None and last < first:
        raise ValueError(f"start={start}, end={end}: expected a start that is not after the end")
    return first, last
