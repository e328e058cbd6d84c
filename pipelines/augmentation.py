"""`Augmentation`: training samples changed in ways that leave them about as likely as what was observed.

A few events of a few hours are all there is, and a network learns by heart which of them grew and which died.
Turned around in time what grew dies; stronger, sampled at another cadence or on coarser cells, a
shower is one that might have come elsewhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metnet.batch import Batch
from pipelines.beside import Beside
from pipelines.observations import Observations

STRIDE = 2  # steps of the cadence between the frames of a sample at another cadence
LONGEST_CADENCE = 6.0  # minutes, of cubes whose frames may lie STRIDE steps apart: 15 is what networks send
SIDE = 2  # cells along a side of a coarse one
LARGEST_CELL = 1100.0  # metres, of cells that may be made coarse: composites have 0.5 to 2 km
FEWEST = 0.5  # of a coarse cell, the least share that must be observed
WIDEST_GAIN = 2.0  # of the logarithm of all rates: a factor of 7 either way
Window = tuple[int, int, int, int]  # first row, first column, rows, columns


@dataclass(frozen=True)
class Change:
    """What is done to one sample; by default nothing."""

    backwards: bool = False  # its frames are those that followed, its targets what came before
    stride: int = 1  # steps of the cadence from one frame to the next
    side: int = 1  # cells along a side of those that become one
    gain: float = 1.0  # all rates are multiplied by this

    def __call__(self, batch: Batch, rain: tuple[int, ...] = ()) -> Batch:
        """A batch as it was read from the cube, in the order of the cube's time, as the sample it becomes.

        Ages and lead times stay where time runs backwards; where frames are left out, those that stay keep
        their ages. Motion is to be worked out of what comes of it.

        `rain`: those bands of `satellite` that are other radars'.
        """
        if self.backwards:
            batch = _changed(batch, ("radar", "surroundings", "target"), lambda series: series.flip(1))
        if self.stride > 1:
            batch = _changed(
                batch, ("radar", "surroundings", "age"), lambda series: series[:, :: self.stride].contiguous()
            )
        if self.side > 1:
            batch = _coarse(batch, self.side)
        if self.gain != 1:
            batch = _amplified(batch, self.gain, rain)
        return batch

    def __str__(self) -> str:
        """For a person who looks for the sample in the cube; nothing where it is as it was observed."""
        told = (
            (self.backwards, "backwards in time"),
            (self.stride > 1, f"of every {self.stride} frames one"),
            (self.side > 1, f"means over {self.side} x {self.side} cells"),
            (self.gain != 1, f"rates times {self.gain:.3g}"),
        )
        return ", ".join(text for done, text in told if done)


AS_OBSERVED = Change()


@dataclass(frozen=True)
class Augmentation:
    """How often training samples are changed, each change by itself; 0: never.

    Where a cube or a network does not allow a change (see `Leeway.refused`), its samples are as they were
    observed.
    """

    reverse: float = 0.0  # share of the samples that run backwards in time
    gain: float = 0.0  # standard deviation of the natural logarithm of a factor on all rates of a sample
    stride: float = 0.0  # share of the samples of which only every second frame is seen
    coarsen: float = 0.0  # share of the samples that are means over 2 x 2 cells, of twice the area's side

    def __post_init__(self) -> None:
        """Refuses what is no share, and factors that no rain has.

        Raises:
            ValueError: naming it.
        """
        for name in ("reverse", "stride", "coarsen"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(f"augmentation.{name}={share}: expected a share of the samples, from 0 to 1")
        if not 0 <= self.gain <= WIDEST_GAIN:
            raise ValueError(
                f"augmentation.gain={self.gain}: expected the spread of the logarithm of the rates, from 0 "
                f"to {WIDEST_GAIN:g}; 0.35 makes them up to twice or half as strong"
            )

    def draw(self, random: np.random.Generator) -> Change:
        """The changes of one sample; of the same chance, each the same whatever the others' shares."""
        reverse, stride, coarsen = random.random(3)
        gain = math.exp(self.gain * random.standard_normal())
        return Change(
            bool(reverse < self.reverse),
            STRIDE if stride < self.stride else 1,
            SIDE if coarsen < self.coarsen else 1,
            gain,
        )


NOTHING_CHANGED = Augmentation()


class Leeway:
    """Which changes the samples of a cube can have: no more than its time, its grid and the network allow.

    No sample holds a frame outside of the time that samples without changes span, so a split in time holds
    for all.

    Args:
        asked: how often they are wanted.
        cube: where the frames are.
        inits: init times to draw from, as indices on the cube's time axis.
        frames: past frames of a sample, the one at its init time included.
        reach: steps from the oldest frame of any radar to the init time.
        leads: steps after the init time, rising.
        size: rows and columns of a sample.
        beside: what the network sees beside the radar.
    """

    def __init__(
        self,
        asked: Augmentation,
        cube: Observations,
        inits: NDArray[np.int64],
        frames: int,
        reach: int,
        leads: tuple[int, ...],
        size: tuple[int, int],
        beside: Beside,
    ):
        self.asked, self.cube, self.inits, self.size, self.beside = asked, cube, inits, size, beside
        self.frames, self.reach, self.leads = frames, reach, leads

    @cached_property
    def applied(self) -> Augmentation:
        """What is asked for, without what cannot be."""
        return replace(self.asked, **dict.fromkeys(self.refused, 0.0))

    @property
    def refused(self) -> dict[str, str]:
        """Those changes that are asked for and cannot be, each with the reason."""
        reasons = {
            "reverse": self._irreversible,
            "stride": self._too_far_apart,
            "coarsen": self._too_coarse,
        }
        asked = {name: reason() for name, reason in reasons.items() if getattr(self.asked, name)}
        return {name: reason for name, reason in asked.items() if reason}

    @cached_property
    def turning(self) -> NDArray[np.int64]:
        """Init times of samples that run backwards; they count as those of others do (see `split`)."""
        observed, leads, backwards = self.cube.observed, np.array(self.leads), Change(backwards=True)
        usable = [
            init
            for init in np.flatnonzero(observed)
            if self.fits(int(init), backwards) and observed[init - leads].any()
        ]
        return np.array(usable, dtype=np.int64)

    def fits(self, init: int, change: Change) -> bool:
        """Whether all that a sample would hold lies in the time that is learned from."""
        past, ahead = max(self.reach, change.stride * (self.frames - 1)), self.leads[-1]
        first, last = (init - ahead, init + past) if change.backwards else (init - past, init + ahead)
        return first >= 0 and last < len(self.learned) and bool(self.learned[first : last + 1].all())

    @cached_property
    def learned(self) -> NDArray[np.bool_]:
        """For every step of the cube's time axis, whether a sample without changes spans it."""
        spanned = np.unique(self.inits[:, None] + np.arange(-self.reach, self.leads[-1] + 1))
        return np.isin(np.arange(len(self.cube.times)), spanned)

    def _irreversible(self) -> str:
        """Clouds come before their rain and the sun goes west; relief does not tell before from after."""
        if self.beside.satellite or self.beside.place:
            return "the network sees other sources or the sun, which do not run backwards"
        return "" if len(self.turning) else "the time that is learned from is too short"

    def _too_far_apart(self) -> str:
        minutes = self.cube.cadence.total_seconds() / 60
        if minutes > LONGEST_CADENCE:
            return f"the cadence is {minutes:g} minutes, above {LONGEST_CADENCE:g}"
        if any(self.fits(int(init), Change(stride=STRIDE)) for init in self.inits):
            return ""
        return "the time that is learned from is too short"

    def _too_coarse(self) -> str:
        """A longitude has no mean at 180 degrees, and a class of cloud none at all."""
        grid, wide = self.cube.grid, self.beside.surroundings
        if self.beside.place or set(self.beside.satellite) - set(self.beside.rain):
            return "the network sees places or satellites, of which there are no means"
        if wide > 1 and wide % 2:
            return f"surroundings={wide} is odd, and coarse ones would not have the middle of the sample"
        if grid.cell_size > LARGEST_CELL:
            return f"the cells are {grid.cell_size:.0f} m wide, above {LARGEST_CELL:g}"
        if any(SIDE * part > whole for part, whole in zip(self.size, grid.shape, strict=True)):
            return f"a grid of {grid.y_size} x {grid.x_size} cells is less than {SIDE} samples wide"
        return ""


def widened(window: Window, side: int, whole: tuple[int, int], random: np.random.Generator) -> Window:
    """A window `side` times as high and wide around one, anywhere in a grid of `whole` rows and columns."""
    firsts = [
        int(random.integers(max(0, first - (side - 1) * size), min(first, end - side * size), endpoint=True))
        for first, size, end in zip(window[:2], window[2:], whole, strict=True)
    ]
    return firsts[0], firsts[1], side * window[2], side * window[3]


def _coarse(batch: Batch, side: int) -> Batch:
    """All maps at means over side x side cells; `surroundings` are read at the coarser cells."""
    coarse = _changed(batch, ("radar", "target", "static", "satellite"), lambda maps: _means(maps, side))
    return replace(coarse, cell_size=side * batch.cell_size)


def _means(maps: Tensor, side: int) -> Tensor:
    """Over blocks of the last two dimensions, of what was observed; NaN where that is less than `FEWEST`."""
    seen = _sums((~maps.isnan()).float(), side)
    return (_sums(maps.nan_to_num(), side) / seen).where(seen >= FEWEST * side**2, torch.nan)


def _sums(maps: Tensor, side: int) -> Tensor:
    """Over the same blocks."""
    return sum((maps[..., y::side, x::side] for y in range(side) for x in range(side)), torch.zeros(()))


def _amplified(batch: Batch, gain: float, rain: tuple[int, ...]) -> Batch:
    """All rates times a factor."""
    stronger = _changed(batch, ("radar", "surroundings", "target"), lambda rates: gain * rates)
    if batch.satellite is None or not rain:
        return stronger
    factors = torch.ones(batch.satellite.shape[2])
    factors[list(rain)] = gain
    return replace(stronger, satellite=factors[:, None, None] * batch.satellite)


def _changed(batch: Batch, names: Sequence[str], change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with the same done to those of its fields that are there."""
    there = {name: value for name in names if (value := getattr(batch, name)) is not None}
    return replace(batch, **{name: change(value) for name, value in there.items()})
