"""Cubes in memory, for tests of what is cut from them."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta

import numpy as np

from pipelines.grid import Grid
from tests.pipelines.training import FIVE, START


@dataclass
class Field:
    """A cube in memory whose pixels say where and when they are."""

    rain: np.ndarray
    cadence: timedelta = FIVE
    read: list = field(default_factory=list)
    path: str = "memory"
    west: float = 4e6
    start: datetime = START

    @property
    def grid(self):
        rows, columns = self.rain.shape[1:]
        return Grid("EPSG:3035", self.west, 1000.0, columns, 3e6, -1000.0, rows)

    @property
    def times(self):
        return [self.start + i * self.cadence for i in range(len(self.rain))]

    @property
    def observed(self):
        return ~np.isnan(self.rain).all(axis=(1, 2))

    def block(self, first, count, window=None, step=1):
        self.read.append((count, window))
        y, x, rows, columns = window or (0, 0, *self.rain.shape[1:])
        start = (first - self.start) // self.cadence
        return self.rain[start : start + count * step : step, y : y + rows, x : x + columns]


def telling(times=40, rows=40, columns=30):
    """rate = time + place / 10000, so a sample's numbers say what it was cut from."""
    place = np.arange(rows * columns).reshape(rows, columns) / 1e4
    return Field((np.arange(times)[:, None, None] + place + 1e-6).astype(np.float32))


def showers(times=30, rows=48, columns=48, speed=1.5):
    """A few blobs that drift east, on a field that is observed everywhere."""
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    fields = []
    for step in range(times):
        centres = ((12, 8), (30, 20), (20, 34))
        fields.append(
            sum(8 * np.exp(-((y - v) ** 2 + (x - u - speed * (step - 10)) ** 2) / 30) for v, u in centres)
        )
    return Field(np.stack(fields).astype(np.float32))
