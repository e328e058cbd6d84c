"""`Samples`: which (time, place) of a cube make a `Batch`: chosen by rain, split by time without a leak."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import product

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from metnet.batch import Batch
from pipelines.augmentation import AS_OBSERVED, NOTHING_CHANGED, SIDE, Augmentation, Change, Leeway, widened
from pipelines.beside import Beside, Sides, check_sources
from pipelines.drop_out import DropOut
from pipelines.frame import whole_steps
from pipelines.grid import Grid
from pipelines.observations import Observations
from pipelines.past import RADAR_ALONE, cut
from pipelines.rain_index import RainIndex
from pipelines.sample_store import SampleStore
from pipelines.trained import with_motion

ENDLESS = 2**62  # samples: as many as anybody draws
SMALLEST_CROP = 8  # cells
LONGEST = 0.6  # of a cube's time, that a lead time may take where there are several cubes
PREFETCHED = 2  # batches that a worker has ready: they bound the memory that waits
OUTLINE = 33  # places along a side of a grid, by which two grids are found to overlap
NOTHING_DROPPED = DropOut()
Window = tuple[int, int, int, int]  # first row, first column, rows, columns


@dataclass(frozen=True)
class Span:
    """How much time one sample covers, in steps of the cube's cadence."""

    frames: int  # past frames, the one at init_time included
    leads: tuple[int, ...]  # steps after init_time, rising
    back: int = 0  # steps before init_time that other radars' frames reach, where those are more

    @classmethod
    def of(cls, cadence: timedelta, frames: int, lead_times: Sequence[float]) -> "Span":
        """The span of `frames` past frames and of lead times in minutes.

        Raises:
            ValueError: if a lead time is no whole number of steps, or they do not rise from above 0.
        """
        leads = []
        for lead in lead_times:
            if (steps := whole_steps(lead, cadence)) is None:
                raise ValueError(
                    f"lead_times: {lead:g} minutes is no multiple of the cube's cadence, "
                    f"{cadence.total_seconds() / 60:g} minutes, above 0"
                )
            leads.append(steps)
        if not leads or leads != sorted(set(leads)):
            raise ValueError(f"lead_times={list(lead_times)}: expected minutes that rise, at least one")
        return cls(frames, tuple(leads))

    @classmethod
    def of_those(cls, cube: Observations, frames: int, lead_times: Sequence[float]) -> "Span":
        """As `of`, with those of the lead times that are multiples of the cadence and fit into the cube.

        A short event has no long lead times; one takes no more than `LONGEST` of the cube's time.

        Raises:
            ValueError: if there is none.
        """
        longest = LONGEST * (len(cube.times) - 1)  # steps
        fitting = [lead for lead in lead_times if 0 < (whole_steps(lead, cube.cadence) or 0) <= longest]
        return cls.of(cube.cadence, frames, fitting or lead_times)

    @property
    def reach(self) -> int:
        """From the oldest frame of any radar to the init time."""
        return max(self.frames - 1, self.back)

    @property
    def steps(self) -> int:
        """From the oldest frame of any radar to the last target."""
        return self.reach + self.leads[-1]


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
        ValueError: if there is no init time at all, or `share` is not in [0, 0.5[.
    """
    if not 0 <= share < 0.5:
        raise ValueError(f"validation={share}: expected a share of the init times from 0 to below 0.5")
    first, last = span.frames - 1, len(observed) - 1 - span.leads[-1]
    usable = [
        i for i in range(first, last + 1) if observed[i] and any(observed[i + lead] for lead in span.leads)
    ]
    if not usable:
        raise ValueError(
            f"the cube has {int(observed.sum())} frames on a time axis of {len(observed)}: "
            f"a sample needs {span.frames + span.leads[-1]} in a row ({span.frames} past frames, the one at "
            f"init_time included, and {span.leads[-1]} up to the longest lead time); ingest a longer time, "
            "or ask for fewer model.frames or shorter lead_times"
        )
    inits = np.array(usable, dtype=np.int64)
    validation = inits[len(inits) - math.ceil(share * len(inits)) :]
    if len(validation):
        training = inits[inits + span.steps < validation[0]]
        if len(training) > len(validation):
            return Split(training, validation)
    return Split(inits, inits[:0])


@dataclass(frozen=True)
class _Drawn:
    """Where and when a sample is, and what it becomes."""

    init_time: datetime
    window: Window  # of the cube's grid
    change: Change
    random: np.random.Generator  # the chance that is left for all else


class Samples(Dataset[Batch]):
    """Batches of one sample each; the same `seed` and index always give the same sample.

    Crops are drawn by the rain in the newest frame, and read when they are asked for: from a `SampleStore` in
    a few milliseconds. Can be pickled; share it with other processes by spawning, not forking.

    Args:
        cube: where the frames are.
        inits: init times to draw from, as indices on the cube's time axis.
        span: past frames and lead times.
        crop: side of a sample in cells; a grid that is smaller is taken whole along that side.
        count: how many samples there are.
        seed: of the choice of time and place.
        augment: also turn and mirror the fields at random.
        beside: what the network sees beside the radar.
        drop_out: how likely frames, radars and sources are missing.
        augmentation: how often samples are changed; they hold no frame that none of the others may hold.
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
        beside: Beside = RADAR_ALONE,
        drop_out: DropOut = NOTHING_DROPPED,
        augmentation: Augmentation = NOTHING_CHANGED,
    ):
        if crop < SMALLEST_CROP:
            raise ValueError(f"crop={crop}: expected at least {SMALLEST_CROP} cells")
        self.cube, self.inits, self.span, self.crop = cube, inits, span, crop
        self.size = min(crop, cube.grid.y_size), min(crop, cube.grid.x_size)
        self.count, self.seed, self.augment = count, seed, augment
        self.sides, self.drop_out = Sides(cube, beside), drop_out
        self.leeway = Leeway(
            augmentation, cube, inits, span.frames, span.reach, span.leads, self.size, beside
        )
        self._start = cube.times[0]
        minutes = cube.cadence.total_seconds() / 60
        self.lead_times = [step * minutes for step in span.leads]  # minutes

    def __len__(self) -> int:
        """How many samples there are."""
        return self.count

    def __getitem__(self, index: int) -> Batch:
        """Sample number `index`.

        Raises:
            IndexError: beyond the count.
        """
        drawn, beside = self._drawn(index), self.sides.beside
        sample = drawn.change(self._read(drawn), self._rain_bands)
        if self.augment:
            sample = _turned(sample, drawn.random)
        sample = self.drop_out(sample, drawn.random, beside.surroundings, beside.ages)
        return with_motion(sample) if beside.motion else sample

    def told(self, index: int) -> str:
        """Where and when sample number `index` is."""
        drawn = self._drawn(index)
        y, x, rows, columns = drawn.window
        change = f", {drawn.change}" if drawn.change != AS_OBSERVED else ""
        return (
            f"cube {self.cube.path}, init time {drawn.init_time:%Y-%m-%dT%H:%MZ}, "
            f"rows {y}-{y + rows - 1}, columns {x}-{x + columns - 1}{change}"
        )

    def of_crop(self, crop: int) -> "Samples":
        """Samples of another side, and all else the same, as far as the grid allows their changes."""
        return Samples(
            self.cube,
            self.inits,
            self.span,
            crop,
            self.count,
            self.seed,
            self.augment,
            self.sides.beside,
            self.drop_out,
            self.leeway.asked,
        )

    def _drawn(self, index: int) -> _Drawn:
        """Of a sample, all that is left to chance but how it is turned and what is dropped.

        Its changes are drawn by a chance of their own, so that a sample without one is what it is without
        augmentation. It is drawn by the rain in the newest frame that will be seen, as every sample is.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        random = np.random.default_rng((self.seed, index))
        chance = random.spawn(1)[0]
        change = self.leeway.applied.draw(chance)
        inits = self.leeway.turning if change.backwards else self.inits
        number, y, x = (self._turning_index if change.backwards else self.index).draw(random)
        init = int(inits[number])
        if change.stride > 1 and not self.leeway.fits(init, change):
            change = replace(change, stride=1)
        window = widened((y, x, *self.size), change.side, self.cube.grid.shape, chance)
        return _Drawn(self._start + init * self.cube.cadence, window, change, random)

    def _read(self, drawn: _Drawn) -> Batch:
        """What a sample is made of, as it was observed, in the order of the cube's time."""
        cadence, change, leads = self.cube.cadence, drawn.change, np.array(self.span.leads)
        frames = 1 + change.stride * (self.span.frames - 1)
        last = drawn.init_time + (frames - 1) * cadence if change.backwards else drawn.init_time
        sides = self._wide_sides if change.side > 1 else self.sides
        sample = cut(sides, last, frames, self.lead_times, drawn.window)
        steps = -leads[::-1] if change.backwards else leads
        first = drawn.init_time + int(steps[0]) * cadence
        target = self.cube.block(first, int(steps[-1] - steps[0]) + 1, drawn.window)[steps - steps[0]]
        return replace(
            sample,
            init_time=torch.tensor([round(drawn.init_time.timestamp())]),
            target=torch.from_numpy(target)[None],
        )

    @cached_property
    def index(self) -> RainIndex:
        """Where it rains at the init times; of a store it is there already, else one pass over the frames."""
        return self._index_of(self.inits)

    @cached_property
    def _turning_index(self) -> RainIndex:
        """The same at the init times of samples that run backwards."""
        return self._index_of(self.leeway.turning)

    def _index_of(self, inits: NDArray[np.int64]) -> RainIndex:
        if isinstance(self.cube, SampleStore):
            return replace(self.cube.rain_index(self.crop), frames=inits)
        return RainIndex.of(self.cube, self.crop, inits)

    @cached_property
    def _wide_sides(self) -> Sides:
        """What stands beside the radar of a sample of coarse cells: surroundings of as many coarse cells."""
        beside = self.sides.beside
        wide = SIDE * beside.surroundings if beside.surroundings > 1 else 1
        return Sides(self.cube, replace(beside, surroundings=wide))

    @cached_property
    def _rain_bands(self) -> tuple[int, ...]:
        """Which of the bands beside the radar are other radars."""
        beside = self.sides.beside
        return tuple(band for band, name in enumerate(beside.satellite) if name in beside.rain)

    @property
    def touched(self) -> NDArray[np.int64]:
        """When (s since 1970) the frames are that a sample may hold, as input or as target; rising."""
        offsets = np.array([*range(-self.span.reach, 1), *self.span.leads])
        steps = np.unique(self.inits[:, None] + offsets)
        if self.leeway.applied.reverse or self.leeway.applied.stride:
            steps = np.flatnonzero(self.leeway.learned)
        return round(self._start.timestamp()) + steps * round(self.cube.cadence.total_seconds())


class Mixed(Dataset[Batch]):
    """The samples of several cubes, each batch of one of them; endless.

    The same `seed` and index always give the same sample. Every cube is drawn from as often as any other, so
    that a long event does not drown a short one.

    Args:
        parts: the samples of each cube.
        batch_size: samples of a batch, which follow each other from a multiple of it.
        seed: of the choice.

    Raises:
        ValueError: if there is no cube, or a source that is in none of them.
    """

    def __init__(self, parts: Sequence[Samples], batch_size: int, seed: int = 0):
        if not parts or batch_size < 1:
            raise ValueError(f"{len(parts)} cubes, batch_size={batch_size}: expected at least 1 of each")
        check_sources([part.sides for part in parts])
        self.parts, self.batch_size, self.seed = parts, batch_size, seed

    def __len__(self) -> int:
        """How many samples there are."""
        return ENDLESS

    def __getitem__(self, index: int) -> Batch:
        """Sample number `index`."""
        return self._part(index)[index]

    def told(self, index: int) -> str:
        """Where and when sample number `index` is."""
        return self._part(index).told(index)

    def _part(self, index: int) -> Samples:
        """The samples that all numbers of a batch are of."""
        random = np.random.default_rng((self.seed, index // self.batch_size))
        return self.parts[int(random.integers(len(self.parts)))]


def collate(samples: Sequence[Batch]) -> Batch:
    """One batch of samples that share their lead times, their sizes and their sources.

    Raises:
        ValueError: if they do not: they are of cubes that no batch can mix.
    """
    first = samples[0]
    if any(not torch.equal(sample.lead_time, first.lead_time) for sample in samples):
        told = sorted({tuple(sample.lead_time.tolist()) for sample in samples})
        raise ValueError(
            f"samples of other lead times in one batch: {told[0]} and {told[1]} min; take all samples of a "
            "batch from one cube, as Mixed does for numbers from one multiple of batch_size to the next"
        )
    joined = {
        field.name: torch.cat([getattr(sample, field.name) for sample in samples])
        for field in fields(Batch)
        if field.name != "lead_time" and isinstance(getattr(first, field.name), Tensor)
    }
    return replace(first, **joined)


def loader(
    samples: Dataset[Batch], batch_size: int, numbers: Sequence[int] | None = None, workers: int = 0
) -> DataLoader[Batch]:
    """Loads batches of samples, by their numbers (which may be worked out as they are asked for) or in order.

    Workers are spawned, since a cube does not survive a fork; each has one thread, and at most `PREFETCHED`
    batches ready. For a GPU the batches lie in pinned memory, from where they are copied while it computes.
    """
    return DataLoader(
        samples,
        batch_size,
        sampler=numbers,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        prefetch_factor=PREFETCHED if workers else None,
        worker_init_fn=_alone_on_its_core if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def check_apart(training: Sequence[Samples], validating: Sequence[Samples]) -> None:
    """Looks whether anything is validated on that is also learned from.

    That is so where samples of both may hold frames of one area less than a cadence apart, in the same cube
    or in two.

    Raises:
        ValueError: naming the cubes and the first such time.
    """
    for learned, kept in product(training, validating):
        cadence = max(learned.cube.cadence, kept.cube.cadence)
        shared = _near(learned.touched, kept.touched, cadence)
        if shared is None or not _overlap(learned.cube.grid, kept.cube.grid):
            continue
        cubes = " and ".join(dict.fromkeys((learned.cube.path, kept.cube.path)))
        raise ValueError(
            f"{cubes}: what is learned from and what is validated on hold the same rain, first at "
            f"{shared:%Y-%m-%dT%H:%M:%SZ}; validate on other events, or keep them apart with start= and end="
        )


def _near(some: NDArray[np.int64], others: NDArray[np.int64], within: timedelta) -> datetime | None:
    """The first of some times (s since 1970, rising) that is nearer to one of the others than this."""
    after = np.searchsorted(others, some)
    gaps = [np.abs(some - others[(after + back).clip(0, len(others) - 1)]) for back in (-1, 0)]
    close = np.flatnonzero(np.minimum(*gaps) < within.total_seconds())
    return datetime.fromtimestamp(int(some[close[0]]), UTC) if len(close) else None


def _overlap(one: Grid, other: Grid) -> bool:
    """Whether a place of one grid lies in the other."""
    return any(_reaches(*pair) for pair in ((one, other), (other, one)))


def _reaches(one: Grid, other: Grid) -> bool:
    """Whether any of the places that stand for a grid lies in another."""
    rows, columns = (np.linspace(0, size - 1, min(size, OUTLINE)).astype(int) for size in one.shape)
    lon, lat = (field[np.ix_(rows, columns)] for field in one.lonlat())
    y, x = other.cells(lon, lat)
    inside = (y > -0.5) & (y < other.y_size - 0.5) & (x > -0.5) & (x < other.x_size - 0.5)
    return bool(inside.any())


def _turned(sample: Batch, random: np.random.Generator) -> Batch:
    """All maps turned and mirrored alike; what is not square is turned by half a circle at most.

    A sample has no motion yet: a vector would have to be turned too.
    """
    square = sample.radar.shape[2] == sample.radar.shape[3]
    turns = int(random.integers(4)) if square else 2 * int(random.integers(2))
    mirrored = bool(random.integers(2))
    maps = {
        field.name: value
        for field in fields(Batch)
        if isinstance(value := getattr(sample, field.name), Tensor) and value.ndim >= 4
    }
    turned = {name: torch.rot90(value, turns, (-2, -1)) for name, value in maps.items()}
    return replace(
        sample,
        **{name: (value.flip(-1) if mirrored else value).contiguous() for name, value in turned.items()},
    )


def _alone_on_its_core(worker: int) -> None:
    """Keeps a worker from taking the other workers' cores."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
