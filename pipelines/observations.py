"""`Observations`: what forecasts are made from, learned from and verified against, wherever it is stored."""

from datetime import datetime, timedelta
from typing import Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pipelines.cf import Variable
from pipelines.grid import Grid


class Observations(Protocol):
    """Frames of one quantity on a regular time axis and one grid, for reading.

    NaN is "not observed", 0 is "dry". What is read stays as it was when it was opened.
    """

    @property
    def path(self) -> str:
        """Folder, file or URL."""
        ...

    @property
    def snapshot(self) -> str:
        """Names what is read: the same frames have the same name."""
        ...

    @property
    def grid(self) -> Grid:
        """Where the cells lie."""
        ...

    @property
    def variable(self) -> Variable:
        """What is observed."""
        ...

    @property
    def cadence(self) -> timedelta:
        """From one step of the time axis to the next."""
        ...

    @property
    def times(self) -> list[datetime]:
        """Every step of the time axis (UTC), with a frame or without."""
        ...

    @property
    def observed(self) -> NDArray[np.bool_]:
        """For every step of the time axis, whether there is a frame."""
        ...

    def block(
        self, first: datetime, count: int, window: tuple[int, int, int, int] | None = None, step: int = 1
    ) -> NDArray[np.float32]:
        """Fields (count, y, x) at `first`, `first` + `step` * cadence, ... in the variable's units.

        NaN where not observed, and at times outside the axis. `window` is (y0, x0, ny, nx) in cells.

        Raises:
            ValueError: if `first` falls between two steps, or the window reaches outside the grid.
        """
        ...

    def between(self, start: datetime, end: datetime) -> xr.Dataset:
        """The CF dataset of the steps within [start, end], read when it is used."""
        ...
