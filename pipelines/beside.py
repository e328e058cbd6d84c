"""`Beside`: what a network sees beside its radar frames, and where in a cube it lies."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property, lru_cache, singledispatch

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metnet.metnet1 import MetNet1
from metnet.metnet2 import MetNet2
from metnet.model import MetNet
from pipelines.cube import Cube, groups
from pipelines.grid import Grid
from pipelines.observations import Observations
from pipelines.repository import Repository
from pipelines.sample_store import SampleStore
from pipelines.static import StaticFields

Fields = NDArray[np.float32]
Window = tuple[int, int, int, int]  # first row, first column, rows, columns


@dataclass(frozen=True)
class Seen:
    """How much of each source a network was made to see."""

    channels: int = 0  # of the satellite
    images: int = 0  # of each channel
    fields: int = 0  # that never change
    place: bool = False
    surroundings: int = 1  # cells along a side of a mean
    motion: bool = False


@singledispatch
def seen(network: object) -> Seen:
    """What a network was made to see; of a forecaster that is none, radar alone."""
    return Seen()


@seen.register
def _(network: MetNet) -> Seen:
    inputs = network.scaling
    return Seen(
        channels=0 if inputs.satellite is None else inputs.satellite.channels // 2,
        images=inputs.images,
        fields=0 if inputs.static is None else inputs.static.channels // 2,
        place=inputs.place is not None,
        surroundings=1 if network.surroundings is None else network.surroundings.factor,
        motion=network.prior is not None,
    )


@seen.register
def _(network: MetNet1) -> Seen:
    return Seen(network.satellite.channels // 2, network.frames, fields=1, place=True)


@seen.register
def _(network: MetNet2) -> Seen:
    return Seen(network.satellite.channels // 2, network.images, fields=1, place=True)


@dataclass(frozen=True)
class Beside:
    """What stands beside the radar frames of a batch.

    Args:
        satellite: groups of the cube, one for each channel of the network, in its order; all of one cadence.
        images: how many images of each.
        static: fields of the group "static", in the network's order.
        place: longitude and latitude of each cell.
        surroundings: side in cells of the means that the wide surroundings are made of; 1: no surroundings.
        reach: how many times as wide and high as the sample the surroundings are.
        motion: the motion of the rain, in samples; for a forecast, the forecaster works it out.
    """

    satellite: Sequence[str] = ()
    images: int = 0
    static: Sequence[str] = ()
    place: bool = False
    surroundings: int = 1
    reach: float = 2.0
    motion: bool = True

    def __post_init__(self) -> None:
        """Refuses surroundings that do not surround.

        Raises:
            ValueError: saying so.
        """
        if self.surroundings < 1 or not 1 <= self.reach < math.inf:
            raise ValueError(
                f"surroundings={self.surroundings}, reach={self.reach}: expected means over at least 1 cell, "
                "and surroundings that are at least as wide as the sample"
            )

    @classmethod
    def of(
        cls, network: object, satellite: Sequence[str] = (), static: Sequence[str] = (), reach: float = 2.0
    ) -> "Beside":
        """What a network was made to see, by the names it has in the cube.

        Raises:
            ValueError: if there are not as many names as the network has channels or fields.
        """
        wanted = seen(network)
        for key, names, count, kind in (
            ("satellite", satellite, wanted.channels, "groups of the cube, one a channel"),
            ("static", static, wanted.fields, "fields of the cube's group static"),
        ):
            if len(names) != count:
                raise ValueError(
                    f"{key}={list(names)}: this network was made to see {count}; expected the names of as "
                    f"many {kind}, in the order of the model's own list"
                )
        return cls(
            tuple(satellite),
            wanted.images,
            tuple(static),
            wanted.place,
            wanted.surroundings,
            reach,
            wanted.motion,
        )


class Sides:
    """What stands beside the radar of one cube, opened when it is first read."""

    def __init__(self, cube: Observations, beside: Beside):
        self.cube, self.beside = cube, beside

    def __reduce__(self) -> tuple[type["Sides"], tuple[Observations, Beside]]:
        """Pickles what it was made of; the copy opens it anew."""
        return Sides, (self.cube, self.beside)

    @property
    def lacking(self) -> list[str]:
        """The satellite groups and static fields that the cube does not have."""
        has = {*self._satellite, *self._static}
        return [name for name in (*self.beside.satellite, *self.beside.static) if name not in has]

    def read(self, init_time: datetime, frames: int, window: Window) -> dict[str, Tensor]:
        """The parts of a `Batch` of one sample, by name; a source that the cube does not have is NaN.

        Args:
            init_time: the newest that may be known.
            frames: how many radar frames there are; those of the surroundings are as many.
            window: of the cube's grid.
        """
        parts: dict[str, Fields] = {}
        if self.beside.satellite:
            parts["satellite"], parts["satellite_age"] = self._images(init_time, window)
        if self.beside.static:
            parts["static"] = np.stack([self._field(name, window) for name in self.beside.static])
        if self.beside.place:
            y, x, rows, columns = window
            parts["place"] = _lonlat(self.cube.grid)[:, y : y + rows, x : x + columns]
        if self.beside.surroundings > 1:
            parts["surroundings"] = self._surroundings(init_time, frames, window)
        return {name: torch.from_numpy(np.array(part))[None] for name, part in parts.items()}

    def _images(self, init_time: datetime, window: Window) -> tuple[Fields, Fields]:
        """The newest images (image, band, y, x) that there can be at a time, and their ages in minutes."""
        count, shape = self.beside.images, (self.beside.images, *window[2:])
        one = next(iter(self._satellite.values()), self.cube)
        start, cadence = one.times[0], one.cadence
        newest = start + (init_time - start) // cadence * cadence
        bands = [
            self._satellite[name].block(newest - (count - 1) * cadence, count, window)
            if name in self._satellite
            else np.full(shape, np.nan, np.float32)
            for name in self.beside.satellite
        ]
        back = [init_time - newest + step * cadence for step in range(count - 1, -1, -1)]
        ages = np.array([time / timedelta(minutes=1) for time in back], np.float32)
        return np.stack(bands, axis=1), ages

    def _field(self, name: str, window: Window) -> Fields:
        """A field (y, x) that never changes."""
        y, x, rows, columns = window
        if name not in self._static:
            return np.full((rows, columns), np.nan, np.float32)
        return self._static[name][y : y + rows, x : x + columns]

    def _surroundings(self, init_time: datetime, frames: int, window: Window) -> Fields:
        """Means (time, y, x) around a window, of the cells that were observed; NaN where none was.

        Their middle is the window's, or half a cell beside it where an even `surroundings` meets an odd side.
        """
        factor, cube = self.beside.surroundings, self.cube
        firsts, counts = zip(*(self._wide(first, size) for first, size in _pairs(window)), strict=True)
        lows = [max(0, first) for first in firsts]
        highs = [
            min(whole, first + count * factor)
            for whole, first, count in zip(cube.grid.shape, firsts, counts, strict=True)
        ]
        inside = cube.block(
            init_time - (frames - 1) * cube.cadence,
            frames,
            (lows[0], lows[1], highs[0] - lows[0], highs[1] - lows[1]),
        )
        whole = np.full((frames, counts[0] * factor, counts[1] * factor), np.nan, np.float32)
        y, x = (
            slice(low - first, high - first) for low, first, high in zip(lows, firsts, highs, strict=True)
        )
        whole[:, y, x] = inside
        return _means(whole, factor)

    def _wide(self, first: int, size: int) -> tuple[int, int]:
        """Along one axis: the first cell of the surroundings, and how many means they hold."""
        factor = self.beside.surroundings
        count = math.ceil(self.beside.reach * size / factor)
        count += (count * factor - size) % 2 * (factor % 2)  # so that both have the same middle
        return first - (count * factor - size) // 2, count

    @cached_property
    def _satellite(self) -> dict[str, Observations]:
        """The groups that the cube has, by name.

        Raises:
            ValueError: if they are not of one time axis, but for its length.
        """
        opened = {name: group for name in self.beside.satellite if (group := _group(self.cube, name))}
        first = next(iter(opened.values()), None)
        for name, group in opened.items():
            assert first is not None
            if group.cadence != first.cadence or (group.times[0] - first.times[0]) % first.cadence:
                raise ValueError(
                    f"{self.cube.path}: {name} has images at other times than {next(iter(opened))}; expected "
                    "one cadence and the same minutes for all satellite channels of a network"
                )
        return opened

    @cached_property
    def _static(self) -> dict[str, Fields]:
        """The fields that the cube has, by name."""
        inner = _inner(self.cube)
        if not self.beside.static or not isinstance(inner, Cube):
            return {}
        try:
            there = StaticFields(inner.path, inner.snapshot)
        except ValueError:  # it has none
            return {}
        return {name: there.field(name) for name in self.beside.static if name in there.variables}


def check_sources(parts: Sequence[Sides]) -> None:
    """Looks whether each source of a network is in one cube at least.

    Raises:
        ValueError: naming those that are in none: a word that is spelt otherwise, most likely.
    """
    lacking = set.intersection(*(set(part.lacking) for part in parts)) if parts else set()
    if lacking:
        paths = ", ".join(part.cube.path for part in parts)
        raise ValueError(
            f"{', '.join(sorted(lacking))}: no such satellite group or static field in {paths}; "
            "metnet inspect lists what a cube has"
        )


def _inner(cube: Observations) -> Observations:
    """The cube that a store was made from."""
    return cube.cube if isinstance(cube, SampleStore) else cube


def _group(cube: Observations, name: str) -> Observations | None:
    """Another group of a cube, as quick to read as the cube is; None if there is none of that name."""
    inner = _inner(cube)
    if not isinstance(inner, Cube) or name not in groups(Repository.open(inner.path), inner.snapshot):
        return None
    group = Cube(inner.path, inner.snapshot, name)
    return cube.beside(group, name) if isinstance(cube, SampleStore) else group


def _pairs(window: Window) -> tuple[tuple[int, int], tuple[int, int]]:
    """First cell and size along y, and along x."""
    return (window[0], window[2]), (window[1], window[3])


def _means(series: Fields, factor: int) -> Fields:
    """Of every field over factor x factor cells."""
    rows, columns = (side // factor for side in series.shape[1:])

    def smaller(field: Fields) -> Fields:
        return cv2.resize(field, (columns, rows), interpolation=cv2.INTER_AREA).astype(np.float32)

    share = np.stack([smaller((~np.isnan(field)).astype(np.float32)) for field in series])
    total = np.stack([smaller(np.nan_to_num(field)) for field in series])
    return np.divide(total, share, out=np.full_like(total, np.nan), where=share > 0)


@lru_cache(maxsize=8)
def _lonlat(grid: Grid) -> Fields:
    """Longitude and latitude (2, y, x) of all cells of a grid, degrees; NaN where its CRS has no place."""
    lonlat = np.stack(grid.lonlat()).astype(np.float32)
    return np.where(np.isfinite(lonlat), lonlat, np.float32(np.nan))
