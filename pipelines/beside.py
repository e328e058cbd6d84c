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

from metnet.axial_head import Coherent
from metnet.metnet1 import MetNet1
from metnet.metnet2 import MetNet2
from metnet.model import MetNet
from pipelines.cf import RAINFALL_RATE
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

    rain: tuple[bool, ...] = ()  # of each satellite channel, whether it is another radar's rain
    images: tuple[int, ...] = ()  # of each source: of all channels, if they are one, or of each by itself
    fields: int = 0  # that never change
    place: bool = False
    surroundings: int = 1  # cells along a side of a mean
    motion: bool = False
    ages: bool = True  # of its frames, told with them


@singledispatch
def seen(network: object) -> Seen:
    """What a network was made to see; of a forecaster that is none, radar alone."""
    return Seen()


@seen.register
def _(network: MetNet) -> Seen:
    inputs = network.scaling
    return Seen(
        rain=() if inputs.satellite is None else inputs.satellite.rain,
        images=inputs.images,
        fields=0 if inputs.static is None else inputs.static.channels // 2,
        place=inputs.place is not None,
        surroundings=1 if network.surroundings is None else network.surroundings.factor,
        motion=network.prior is not None,
    )


@seen.register
def _(network: Coherent) -> Seen:
    return seen(network.network)


@seen.register
def _(network: MetNet1) -> Seen:
    return Seen(network.satellite.rain, (network.frames,), fields=1, place=True, ages=False)


@seen.register
def _(network: MetNet2) -> Seen:
    return Seen(network.satellite.rain, (network.images,), fields=1, place=True, ages=False)


@dataclass(frozen=True)
class Beside:
    """What stands beside the radar frames of a batch.

    Args:
        satellite: groups of the cube, one for each channel of the network, in its order: satellite channels,
            other radars.
        images: how many images of each source: one number where all groups are one source, of one cadence; a
            number for each group where each is a source by itself.
        static: fields of the group "static", in the network's order.
        place: longitude and latitude of each cell.
        surroundings: side in cells of the means that the wide surroundings are made of; 1: no surroundings.
        reach: how many times as wide and high as the sample the surroundings are.
        motion: the motion of the rain, in samples; for a forecast, the forecaster works it out.
        rain: those of `satellite` that hold rain, in mm/h.
        ages: whether the network makes anything of how old frames are.
    """

    satellite: Sequence[str] = ()
    images: Sequence[int] = ()
    static: Sequence[str] = ()
    place: bool = False
    surroundings: int = 1
    reach: float = 2.0
    motion: bool = True
    rain: Sequence[str] = ()
    ages: bool = True

    def __post_init__(self) -> None:
        """Refuses surroundings that do not surround, and images of what is not named.

        Raises:
            ValueError: saying so.
        """
        if len(self.images) not in {min(1, len(self.satellite)), len(self.satellite)}:
            raise ValueError(
                f"images={list(self.images)}: expected one number for all of {list(self.satellite)}, or a "
                "number for each"
            )
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
            ("satellite", satellite, len(wanted.rain), "groups of the cube, one a channel"),
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
            tuple(name for name, is_rain in zip(satellite, wanted.rain, strict=True) if is_rain),
            wanted.ages,
        )

    @property
    def sources(self) -> list[range]:
        """Which of the groups make each source, as their numbers."""
        bands = range(len(self.satellite))
        return [bands] if len(self.images) == 1 else [bands[band : band + 1] for band in bands]


def means_around(size: int, factor: int, reach: float) -> int:
    """How many means over `factor` cells make surroundings, along an axis of a sample of so many cells."""
    count = math.ceil(reach * size / factor)
    return count + (count * factor - size) % 2 * (factor % 2)  # so that both have the same middle


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

    @property
    def back(self) -> int:
        """Steps of the radar's time axis before an init time, within which all frames of other radars lie."""
        reaches = [
            count * group.cadence
            for bands, count in zip(self.beside.sources, self.beside.images, strict=True)
            for band in bands
            if (group := self._satellite.get(self.beside.satellite[band]))
            and group.variable.name == RAINFALL_RATE.name
        ]
        return math.ceil(max(reaches, default=timedelta(0)) / self.cube.cadence)

    def read(
        self,
        init_time: datetime,
        frames: int,
        window: Window,
        radar_age: timedelta = timedelta(0),
        stalest: timedelta = timedelta(0),
    ) -> dict[str, Tensor]:
        """The parts of a `Batch` of one sample, by name; a source that the cube does not have is NaN.

        Args:
            init_time: the newest that may be known.
            frames: how many radar frames there are; those of the surroundings are as many.
            window: of the cube's grid.
            radar_age: of the newest radar frame.
            stalest: how much older than it could be the newest image of a source may be, to stand last with
                its true age; where there is none so new, images that are not observed stand there.
        """
        parts: dict[str, Fields] = {}
        if self.beside.satellite:
            parts["satellite"], parts["satellite_age"] = self._images(init_time, window, stalest)
        if self.beside.static:
            parts["static"] = np.stack([self._field(name, window) for name in self.beside.static])
        if self.beside.place:
            y, x, rows, columns = window
            parts["place"] = _lonlat(self.cube.grid)[:, y : y + rows, x : x + columns]
        if self.beside.surroundings > 1:
            parts["surroundings"] = self._surroundings(init_time - radar_age, frames, window)
        return {name: torch.from_numpy(np.array(part))[None] for name, part in parts.items()}

    def _images(self, init_time: datetime, window: Window, stalest: timedelta) -> tuple[Fields, Fields]:
        """The newest images (image, band, y, x) at a time, and their ages (image, source) in minutes.

        A source with fewer images than another begins with images that are not observed.
        """
        names, longest = self.beside.satellite, max(self.beside.images)
        images = np.full((longest, len(names), *window[2:]), np.nan, np.float32)
        ages = np.empty((longest, len(self.beside.images)), np.float32)
        for source, (bands, count) in enumerate(zip(self.beside.sources, self.beside.images, strict=True)):
            there = {band: self._satellite[names[band]] for band in bands if names[band] in self._satellite}
            of_one_axis = list(there.values()) or [self.cube]
            newest, cadence = _newest(of_one_axis, init_time, stalest), of_one_axis[0].cadence
            back = [init_time - newest + step * cadence for step in reversed(range(longest))]
            ages[:, source] = [time / timedelta(minutes=1) for time in back]
            for band, group in there.items():
                images[-count:, band] = group.block(newest - (count - 1) * cadence, count, window)
        return images, ages

    def _field(self, name: str, window: Window) -> Fields:
        """A field (y, x) that never changes."""
        y, x, rows, columns = window
        if name not in self._static:
            return np.full((rows, columns), np.nan, np.float32)
        return self._static[name][y : y + rows, x : x + columns]

    def _surroundings(self, newest: datetime, frames: int, window: Window) -> Fields:
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
            newest - (frames - 1) * cube.cadence,
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
        count = means_around(size, factor, self.beside.reach)
        return first - (count * factor - size) // 2, count

    @cached_property
    def _satellite(self) -> dict[str, Observations]:
        """The groups that the cube has, by name.

        Raises:
            ValueError: if those of one source are not of one time axis, but for its length, or one that the
                network takes for rain holds something else.
        """
        opened = {name: group for name in self.beside.satellite if (group := _group(self.cube, name))}
        for bands in self.beside.sources:
            there = [name for band in bands if (name := self.beside.satellite[band]) in opened]
            for name in there[1:]:
                self._check_times(there[0], opened[there[0]], name, opened[name])
        for name in self.beside.rain:
            if name in opened:
                self._check_rain(name, opened[name])
        return opened

    def _check_times(self, first: str, one: Observations, name: str, other: Observations) -> None:
        if other.cadence != one.cadence or (other.times[0] - one.times[0]) % one.cadence:
            raise ValueError(
                f"{self.cube.path}: {name} has images at other times than {first}; expected one cadence and "
                "the same minutes for all groups of one source; a MetNet with a list as satellite_frames, a "
                "number for each group, takes each at a cadence of its own"
            )

    def _check_rain(self, name: str, group: Observations) -> None:
        held = group.variable
        if held.name != RAINFALL_RATE.name:
            raise ValueError(
                f"{self.cube.path}: {name} holds {held.name} ({held.units}), where this network was made to "
                f"see {RAINFALL_RATE.name} ({RAINFALL_RATE.units}); name the group of another radar, or give "
                "the channel's centre and spread in model.satellite"
            )

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
    """Another group of a cube, as quick to read as the cube is; None if none of that name holds a frame."""
    inner = _inner(cube)
    if not isinstance(inner, Cube) or name not in groups(Repository.open(inner.path), inner.snapshot):
        return None
    group = Cube(inner.path, inner.snapshot, name)
    if not group.times:
        return None
    return cube.beside(group, name) if isinstance(cube, SampleStore) else group


def _newest(groups: Sequence[Observations], init_time: datetime, stalest: timedelta) -> datetime:
    """When the newest image is of; where none is in time, or late by up to `stalest`, when it was due.

    The groups are of one time axis, but for its length.
    """
    one = groups[0]
    due = one.times[0] + (init_time - one.times[0]) // one.cadence * one.cadence
    late = range(stalest // one.cadence + 1)
    return next((time for time in (due - steps * one.cadence for steps in late) if _seen(groups, time)), due)


def _seen(groups: Sequence[Observations], time: datetime) -> bool:
    """Whether any of them has an image of that time."""
    steps = [(group, (time - group.times[0]) // group.cadence) for group in groups]
    return any(0 <= step < len(group.observed) and bool(group.observed[step]) for group, step in steps)


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
