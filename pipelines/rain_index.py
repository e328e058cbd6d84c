"""`RainIndex`: how much it rains in each window of each frame of a cube, by which samples are drawn."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines import checked
from pipelines.observations import Observations
from pipelines.progress import track

DRY_WEIGHT = 0.02  # of a place without rain, beside at most 1 for a place full of it
Corners = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """Overlapping windows of one size that cover a grid, a quarter of a window apart at most."""

    rows: Corners  # first row of each window
    columns: Corners
    size: tuple[int, int]  # cells

    @classmethod
    def of(cls, grid: tuple[int, int], crop: int) -> "Windows":
        """Square ones; a grid that is smaller is taken whole along that side."""
        size = min(crop, grid[0]), min(crop, grid[1])
        return cls(_corners(grid[0], size[0]), _corners(grid[1], size[1]), size)

    @property
    def shape(self) -> tuple[int, int]:
        """How many there are from north to south, and from west to east."""
        return len(self.rows), len(self.columns)

    def weights(self, rain: NDArray[np.float32]) -> NDArray[np.float32]:
        """How much each counts in a frame (mm/h): mean of 1 - exp(-rate) plus a little; 0 if unobserved."""
        observed = ~np.isnan(rain)
        wet = np.where(observed, -np.expm1(-np.nan_to_num(rain)), 0.0)
        rain_sum, seen = (self._sums(field) for field in (wet, observed))
        return np.where(seen > 0, DRY_WEIGHT + rain_sum / math.prod(self.size), 0.0).astype(np.float32)

    def near(self, random: np.random.Generator, row: int, column: int) -> tuple[int, int]:
        """The first cell of a window near one, halfway to its neighbours at most: every cell can be one."""
        return _jittered(random, self.rows, row), _jittered(random, self.columns, column)

    def _sums(self, field: NDArray[np.generic]) -> NDArray[np.float64]:
        """Sums over the windows by a summed-area table."""
        table = np.zeros((field.shape[0] + 1, field.shape[1] + 1))
        np.cumsum(np.cumsum(field, axis=0, dtype=np.float64), axis=1, out=table[1:, 1:])
        height, width = self.size
        north, south = table[self.rows], table[self.rows + height]
        east, west = self.columns + width, self.columns
        return south[:, east] - south[:, west] - north[:, east] + north[:, west]


@dataclass(frozen=True, eq=False)
class RainIndex:
    """The weights of the windows of some frames: what a sample is drawn by.

    That choice looks only at what a forecaster sees too, so it does not bias the probabilities that are
    learned.
    """

    windows: Windows
    weights: NDArray[np.float32]  # (frame, row of windows, column of windows)
    frames: NDArray[np.int64]  # those of them that are drawn from
    path: Path | None = None  # of the weights, where they are mapped and not in memory

    @classmethod
    def of(cls, cube: Observations, crop: int, steps: NDArray[np.int64]) -> "RainIndex":
        """Of the frames at some steps of a cube's time axis, worked out in one pass over them."""
        windows = Windows.of(cube.grid.shape, crop)
        start, each = cube.times[0], track(steps, "where it rains", total=len(steps))
        weights = [windows.weights(cube.block(start + int(step) * cube.cadence, 1)[0]) for step in each]
        return cls(windows, np.stack(weights), np.arange(len(steps)))

    @classmethod
    def load(cls, windows: Windows, path: Path, frames: NDArray[np.int64]) -> "RainIndex":
        """Of weights in a file.

        Raises:
            ValueError: if the file is damaged.
        """
        return cls(windows, checked.load(path), frames, path)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles the place of weights that lie in a file, and not the weights."""
        if self.path is None:
            return RainIndex, (self.windows, self.weights, self.frames)
        return RainIndex.load, (self.windows, self.path, self.frames)

    @property
    def empty(self) -> bool:
        """Whether nothing was observed in any frame."""
        return not self._cumulated[-1] > 0

    def draw(self, random: np.random.Generator) -> tuple[int, int, int]:
        """Which of the frames, and the first row and column of a window in it, each as likely as its weight.

        Raises:
            ValueError: if nothing was observed in any frame.
        """
        if self.empty:
            raise ValueError("no frame of the cube has an observed pixel: there is nothing to learn from")
        chance = random.random() * self._cumulated[-1]
        frame = _found(self._cumulated, chance)
        inside = np.cumsum(self.weights[self.frames[frame]], dtype=np.float64)
        before = float(self._cumulated[frame - 1]) if frame else 0.0
        row, column = divmod(_found(inside, chance - before), self.windows.shape[1])
        return frame, *self.windows.near(random, row, column)

    @cached_property
    def _cumulated(self) -> NDArray[np.float64]:
        """Running sum of the weights of whole frames."""
        return np.cumsum([self.weights[frame].sum(dtype=np.float64) for frame in self.frames])


def _corners(whole: int, part: int) -> Corners:
    """First cells of overlapping parts that cover the whole, a quarter of a part apart at most."""
    count = 1 + math.ceil((whole - part) / max(1, part // 4))
    return np.linspace(0, whole - part, count).astype(np.int64)


def _jittered(random: np.random.Generator, corners: Corners, n: int) -> int:
    low = (corners[max(n - 1, 0)] + corners[n]) // 2
    high = (corners[n] + corners[min(n + 1, len(corners) - 1)]) // 2
    return int(random.integers(low, high, endpoint=True))


def _found(cumulated: NDArray[np.float64], chance: float) -> int:
    """The first place whose running sum is above a chance; where rounding leaves none, the last."""
    last = int(np.searchsorted(cumulated, cumulated[-1], side="left"))
    return min(int(np.searchsorted(cumulated, chance, side="right")), last)
