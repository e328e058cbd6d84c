"""`Samples`: which (time, place) of a cube make a `Batch`: chosen by rain, split by time without a leak."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from metnet.batch import Batch
from pipelines.motion import FRAMES, motion
from pipelines.observations import Observations

IN_MEMORY = 2**30  # bytes; a cube up to this size is read once and kept
DRY_WEIGHT = 0.02  # of a place without rain, beside at most 1 for a place full of it
ENDLESS = 2**62  # samples: as many as anybody draws
Fields = NDArray[np.float32]


@dataclass(frozen=True)
class Span:
    """How much time one sample covers, in steps of the cube's cadence."""

    frames: int  # past frames, the one at init_time included
    leads: tuple[int, ...]  # steps after init_time, rising

    @classmethod
    def of(cls, cadence: timedelta, frames: int, lead_times: Sequence[float]) -> "Span":
        """The span of `frames` past frames and of lead times in minutes.

        Raises:
            ValueError: if a lead time is no whole number of steps, or they do not rise from above 0.
        """
        minutes = cadence.total_seconds() / 60
        for lead in lead_times:
            whole = 0 < lead < math.inf and math.isclose(lead / minutes, round(lead / minutes), abs_tol=1e-6)
            if not whole:
                raise ValueError(
                    f"lead_times: {lead:g} minutes is no multiple of the cube's cadence, {minutes:g} minutes"
                )
        leads = tuple(round(lead / minutes) for lead in lead_times)
        if not leads or list(leads) != sorted(set(leads)):
            raise ValueError(f"lead_times={list(lead_times)}: expected minutes that rise, at least one")
        return cls(frames, leads)

    @classmethod
    def of_those(cls, cadence: timedelta, frames: int, lead_times: Sequence[float]) -> "Span":
        """As `of`, with those of the lead times that are multiples of the cadence.

        Raises:
            ValueError: if none is.
        """
        fitting = [lead for lead in lead_times if not math.fmod(lead * 60, cadence.total_seconds())]
        return cls.of(cadence, frames, fitting or lead_times)

    @property
    def steps(self) -> int:
        """From the oldest frame to the last target."""
        return self.frames - 1 + self.leads[-1]


@dataclass(frozen=True)
class Split:
    """Init times (indices on the cube's time axis) to learn from and to validate on."""

    training: NDArray[np.int64]
    validation: NDArray[np.int64]  # empty where the cube is too short

    def later(self, steps: int) -> "Split":
        """The same split of an axis that begins `steps` earlier."""
        return Split(self.training + steps, self.validation + steps)


def split(observed: NDArray[np.bool_], span: Span, share: float) -> Split:
    """The last `share` of the init times is for validation, the rest for training.

    An init time counts if it was observed, and so was one of its targets at least. Between the last init time
    of training and the first of validation lies more than the span of a sample, so that no frame is in both.
    Where that would leave less for training than for validation, all is for training.

    Raises:
        ValueError: if there is no init time at all, or `share` is not in [0, 0.5].
    """
    if not 0 <= share <= 0.5:
        raise ValueError(f"validation={share}: expected a share of the init times from 0 to 0.5")
    first, last = span.frames - 1, len(observed) - 1 - span.leads[-1]
    usable = [
        i for i in range(first, last + 1) if observed[i] and any(observed[i + lead] for lead in span.leads)
    ]
    if not usable:
        raise ValueError(
            f"the cube has {int(observed.sum())} frames on a time axis of {len(observed)}: "
            f"a sample needs {span.steps + 1} in a row ({span.frames} past frames, the one at init_time "
            f"included, and {span.leads[-1]} up to the longest lead time); ingest a longer time, or ask for "
            "fewer model.frames or shorter lead_times"
        )
    inits = np.array(usable, dtype=np.int64)
    validation = inits[len(inits) - math.ceil(share * len(inits)) :]
    if len(validation):
        training = inits[inits + span.steps < validation[0]]
        if len(training) > len(validation):
            return Split(training, validation)
    return Split(inits, inits[:0])


class Samples(Dataset[Batch]):
    """Batches of one sample each; the same `seed` and index always give the same sample.

    Crops are drawn by the rain in the newest frame. That choice looks only at what a forecaster sees too, so
    it does not bias the probabilities that are learned.

    Args:
        cube: where the frames are.
        inits: init times to draw from, as indices on the cube's time axis.
        span: past frames and lead times.
        crop: side of a sample in cells; a grid that is smaller is taken whole along that side.
        count: how many samples there are.
        seed: of the choice of time and place.
        augment: also turn and mirror the fields at random.
    """

    def __init__(
        self,
        cube: Observations,
        inits: NDArray[np.int64],
        span: Span,
        crop: int,
        count: int = ENDLESS,
        seed: int = 0,
        augment: bool = False,
    ):
        if crop < 8:
            raise ValueError(f"crop={crop}: expected at least 8 cells")
        self.cube, self.inits, self.span = cube, inits, span
        self.size = min(crop, cube.grid.y_size), min(crop, cube.grid.x_size)
        self.count, self.seed, self.augment = count, seed, augment
        self._start = cube.times[0]
        self._held = held(cube)
        self._corners = [
            _corners(whole, part) for whole, part in zip(cube.grid.shape, self.size, strict=True)
        ]

    def __len__(self) -> int:
        """How many samples there are."""
        return self.count

    def __getitem__(self, index: int) -> Batch:
        """Sample number `index`.

        Raises:
            IndexError: beyond the count.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        random = np.random.default_rng((self.seed, index))
        init, y, x = self._draw(random)
        steps = np.arange(-(self.span.frames - 1), 1), np.array(self.span.leads)
        window = (y, x, *self.size)
        radar, target = (self._read(init + offsets, window) for offsets in steps)
        if self.augment:
            radar, target = _turned(random, radar, target)
        minutes = self.cube.cadence.total_seconds() / 60
        age = -steps[0] * minutes
        time = self._start + int(init) * self.cube.cadence
        return Batch(
            radar=torch.from_numpy(radar)[None],
            age=torch.from_numpy(age).float()[None],
            init_time=torch.tensor([round(time.timestamp())]),
            lead_time=torch.from_numpy(steps[1] * minutes).float(),
            cell_size=torch.tensor([self.cube.grid.cell_size], dtype=torch.float32),
            motion=torch.from_numpy(motion(radar[-FRAMES:], age[-FRAMES:].tolist()))[None],
            target=torch.from_numpy(target)[None],
        )

    def _read(self, times: NDArray[np.int64], window: tuple[int, int, int, int]) -> Fields:
        """(time, y, x) of a window, mm/h; NaN where nothing was written."""
        y, x, rows, columns = window
        if self._held is not None:
            return self._held[times, y : y + rows, x : x + columns]
        first, count = int(times[0]), int(times[-1] - times[0]) + 1
        block = self.cube.block(self._start + first * self.cube.cadence, count, window)
        return block[times - first]

    def _draw(self, random: np.random.Generator) -> tuple[int, int, int]:
        """Init time and north-west corner of a sample."""
        chance = random.random() * self._cumulated[-1]
        place = min(int(np.searchsorted(self._cumulated, chance, side="right")), len(self._cumulated) - 1)
        ys, xs = self._corners
        n, y, x = np.unravel_index(place, (len(self.inits), len(ys), len(xs)))
        return int(self.inits[n]), _jittered(random, ys, int(y)), _jittered(random, xs, int(x))

    @cached_property
    def _cumulated(self) -> NDArray[np.float64]:
        """Running sum of the weights of all (init time, corner)s; one pass over the frames."""
        weights = [
            _window_weights(
                self._read(np.array([i]), (0, 0, *self.cube.grid.shape))[0], self._corners, self.size
            )
            for i in self.inits
        ]
        total = np.cumsum(np.stack(weights))
        if total[-1] == 0:
            raise ValueError("no frame of the cube has an observed pixel: there is nothing to learn from")
        return total


class Mixed(Dataset[Batch]):
    """The samples of several cubes, each batch of one of them; endless.

    The same `seed` and index always give the same sample. Every cube is drawn from as often as any other, so
    that a long event does not drown a short one.

    Args:
        parts: the samples of each cube.
        batch_size: samples of a batch, which follow each other from a multiple of it.
        seed: of the choice.
    """

    def __init__(self, parts: Sequence[Samples], batch_size: int, seed: int = 0):
        if not parts or batch_size < 1:
            raise ValueError(f"{len(parts)} cubes, batch_size={batch_size}: expected at least 1 of each")
        self.parts, self.batch_size, self.seed = parts, batch_size, seed

    def __len__(self) -> int:
        """How many samples there are."""
        return ENDLESS

    def __getitem__(self, index: int) -> Batch:
        """Sample number `index`."""
        random = np.random.default_rng((self.seed, index // self.batch_size))
        return self.parts[int(random.integers(len(self.parts)))][index]


def collate(samples: Sequence[Batch]) -> Batch:
    """One batch of samples that share their lead times."""
    joined = {
        field.name: torch.cat([getattr(sample, field.name) for sample in samples])
        for field in fields(Batch)
        if field.name != "lead_time" and isinstance(getattr(samples[0], field.name), Tensor)
    }
    return replace(samples[0], **joined)


def held(cube: Observations) -> Fields | None:
    """All fields (time, y, x) of a cube that is small enough to keep in memory, else None."""
    count = len(cube.times)
    if 4 * count * math.prod(cube.grid.shape) > IN_MEMORY:
        return None
    return cube.block(cube.times[0], count)


def _corners(whole: int, part: int) -> NDArray[np.int64]:
    """First cells of overlapping parts that cover the whole, a quarter of a part apart at most."""
    count = 1 + math.ceil((whole - part) / max(1, part // 4))
    return np.linspace(0, whole - part, count).astype(np.int64)


def _jittered(random: np.random.Generator, corners: NDArray[np.int64], n: int) -> int:
    """A first cell near corner `n`, halfway to its neighbours at most, so that every cell can be one."""
    low = (corners[max(n - 1, 0)] + corners[n]) // 2
    high = (corners[n] + corners[min(n + 1, len(corners) - 1)]) // 2
    return int(random.integers(low, high, endpoint=True))


def _window_weights(
    rain: Fields, corners: Sequence[NDArray[np.int64]], size: tuple[int, int]
) -> NDArray[np.float64]:
    """How much each window counts: the mean of 1 - exp(-rate) plus a little; 0 where nothing was observed."""
    observed = ~np.isnan(rain)
    wet = np.where(observed, -np.expm1(-np.nan_to_num(rain)), 0.0)
    rain_sum, seen = (_window_sums(field, corners, size) for field in (wet, observed))
    return np.where(seen > 0, DRY_WEIGHT + rain_sum / math.prod(size), 0.0)


def _window_sums(
    field: NDArray[np.generic], corners: Sequence[NDArray[np.int64]], size: tuple[int, int]
) -> NDArray[np.float64]:
    """Sums over windows by a summed-area table."""
    table = np.zeros((field.shape[0] + 1, field.shape[1] + 1))
    np.cumsum(np.cumsum(field, axis=0, dtype=np.float64), axis=1, out=table[1:, 1:])
    (ys, xs), (rows, columns) = corners, size
    north, south = table[ys], table[ys + rows]
    return south[:, xs + columns] - south[:, xs] - north[:, xs + columns] + north[:, xs]


def _turned(random: np.random.Generator, radar: Fields, target: Fields) -> tuple[Fields, Fields]:
    """Both turned and mirrored alike; a field that is not square is turned by half a circle at most."""
    square = radar.shape[1] == radar.shape[2]
    turns = int(random.integers(4)) if square else 2 * int(random.integers(2))
    mirrored = bool(random.integers(2))

    def turn(fields: Fields) -> Fields:
        turned = np.rot90(fields, turns, axes=(1, 2))
        return (turned[:, :, ::-1] if mirrored else turned).copy()  # torch takes no steps backward

    return turn(radar), turn(target)
