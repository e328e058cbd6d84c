"""The cascade of S-PROG: how rain of each size goes on, as its own last frames tell.

Large lumps of rain last and small ones do not, and what a lump did between the last frames it goes on doing
for a while. Rain in decibel is parted into levels of rising size; each follows an autoregression of second
order along the motion, whose coefficients are those of the last three frames around a place (Seed 2003,
J. Appl. Meteor. 42, 381-388; Bowler, Pierce & Seed 2006, Q. J. R. Met. Soc. 132, 2127-2155, section 2).
Here the levels are differences of means over neighbourhoods, of what was observed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metnet.prior import BLOCK, COARSE, FEWEST, FINE, SIDES, box_mean, risen

WET, DRY = 0.1, -15.0  # mm/h, below which rain counts as so many dB (mm/h)
WIDE = 4 * BLOCK  # cells: side of the blocks that coefficients are told for
PER_BLOCK = WIDE // BLOCK
AREA = 33  # such blocks along a side of the area whose frames tell them
LONGEST = 40  # steps of an autoregression; what is asked for later stands still
PERFECT = 0.9999  # the highest correlation
NOTHING = 1e-2  # dB squared: variance of what tells next to nothing
LEAST = 1e-6  # share of an area: less than a cell of it
LASTING, LONGER = 0.45, 1.5  # minutes that a lump of a cell usually lasts, and how that grows with its side
ALONE, UNEVEN = 5.0, 0.5  # minutes: a step where there is one frame; and by which three may be uneven
SHARP = len(FINE)  # levels that are kept at full resolution, the others in blocks
LARGEST = (*SIDES[1:], WIDE * AREA)  # cells: sides of the largest lumps of each level
LEVELS = len(LARGEST)
CLOSE = 3  # blocks along a side of the area whose rain tells how far off its own forecast may be


def decibel(rate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """10 log10 of rain in mm/h, `DRY` where there is less than `WET`; 0 where it was not observed."""
    wet = 10 * rate.clamp(min=WET).log10()
    return torch.where(rate >= WET * (1 - 1e-3), wet, DRY).where(~rate.isnan(), 0.0)


def decibel_blocks(rate: Float[Tensor, "n Y X"]) -> Float[Tensor, "n rows columns"]:
    """The mean of `decibel` in blocks; NaN of those of which no more than half was observed."""
    seen = F.avg_pool2d((~rate.isnan()).to(rate.dtype), BLOCK)
    return (F.avg_pool2d(decibel(rate), BLOCK) / seen).where(seen > 0.5, torch.nan)


@dataclass(frozen=True)
class Levels:
    """Rain in dB as differences of means over wider and wider neighbourhoods, of what was observed."""

    sharp: tuple[Float[Tensor, "n Y X"], ...]
    blurred: tuple[Float[Tensor, "n rows columns"], ...]  # in blocks
    mean: Float[Tensor, "n rows columns"]  # of a wide area, in blocks

    @classmethod
    def of(cls, rate: Float[Tensor, "n Y X"]) -> "Levels":
        """The levels of rain in mm/h, on a grid whose sides are multiples of 4.

        What was not observed counts as the next wider mean has it, and far from all that was as dry.
        """
        pair = torch.stack([decibel(rate), (~rate.isnan()).to(rate.dtype)], dim=1)
        blocks = F.avg_pool2d(pair, BLOCK)
        around = risen(areas(blocks, PER_BLOCK, AREA), PER_BLOCK, blocks.shape[2:])
        wide = [_mean(around, torch.full_like(around[:, :1], DRY))]
        for side in COARSE[::-1]:
            wide.insert(0, _mean(box_mean(blocks, side), wide[0]))
        sharp = [risen(wide[0])]
        for side in FINE[::-1]:
            sharp.insert(0, _mean(box_mean(pair, side), sharp[0]))
        parted = [[(narrow - wider)[:, 0] for narrow, wider in pairwise(means)] for means in (sharp, wide)]
        return cls(tuple(parted[0]), tuple(parted[1]), wide[-1][:, 0])

    def each(self) -> Iterator[Tensor]:
        """All levels, the narrowest first."""
        yield from (*self.sharp, *self.blurred)


@dataclass(frozen=True)
class Lags:
    """How the levels of frames hang together from one to the next, in wide areas around each block."""

    near: Float[Tensor, "batch level rows columns"]  # correlation of the newest frame and the one before
    far: Float[Tensor, "batch level rows columns"]  # and the one before that, or as near tells it
    spread: Float[Tensor, "batch level rows columns"]  # standard deviation of the newest frame, dB
    close: Float[Tensor, "batch level rows columns"]  # the same of the blocks around alone
    gap: Float[Tensor, "batch"]  # minutes that near is over

    @classmethod
    def of(cls, frames: Float[Tensor, "batch frame Y X"], age: Float[Tensor, "batch frame"]) -> "Lags":
        """Those of frames (mm/h) carried to one time, the newest first, and their ages (minutes).

        Of fewer than three frames the oldest stands for those that lack; it tells no more by that.
        """
        order = [min(step, frames.shape[1] - 1) for step in range(3)]
        three, ages = frames[:, order], age[:, order]
        fields = [Levels.of(frame) for frame in three.unbind(dim=1)]
        seen = (~three.isnan()).to(frames.dtype)
        gap = ages[:, 1] - ages[:, 0]
        even = (gap > 0) & ((ages[:, 2] - ages[:, 0] - 2 * gap).abs() < UNEVEN)
        known = torch.stack([gap > 0, even], dim=1)[:, :, None, None] * seen[:, :1] * seen[:, 1:]
        gap = torch.where(gap > 0, gap, ALONE)
        told = []
        for largest, newest, before, oldest in zip(LARGEST, *(field.each() for field in fields), strict=True):
            usual = torch.exp(-gap / (LASTING * largest**LONGER))[:, None, None]
            near = _correlation(newest, before, known[:, 0], usual)
            far = _correlation(newest, oldest, known[:, 1], near**2)
            told.append((near, far, *(_spread(newest, seen[:, 0], area) for area in (AREA, CLOSE))))
        near, far, spread, close = (torch.stack(part, dim=1) for part in zip(*told, strict=True))
        # the least for which what swings dies down
        least = (3 * near**2 - 2 + 2 * (1 - near**2) ** 1.5) / (near**2).clamp(min=1e-4)
        return cls(near, torch.maximum(far, least), spread, close, gap)

    def after(
        self, minutes: Float[Tensor, "batch lead"]
    ) -> Float[Tensor, "batch lead coefficient rows columns"]:
        """How much of both frames goes into each level of the forecast, and its spreads.

        For each lead time, in minutes after the newest frame: of the newest frame at each level, then of the
        one before it, then the standard deviation (dB) of what the levels leave open, by the rain of the wide
        area and by that close by.
        """
        steps = (minutes / self.gap[:, None]).clamp(0.0, LONGEST - 1e-3)
        rest = 1 - self.near**2
        one, two = self.near * (1 - self.far) / rest, (self.far - self.near**2) / rest  # Yule-Walker
        now, then = _recurred(one, two, steps).unbind(dim=2)
        kept = now**2 + then**2 + 2 * now * then * self.near[:, None]
        left = [
            (spread[:, None] ** 2 * (1 - kept).clamp(0, 1)).sum(dim=2, keepdim=True).sqrt()
            for spread in (self.spread, self.close)
        ]
        return torch.cat([now, then, *left], dim=2)


class Continued(NamedTuple):
    """What rain goes on to, in dB of mm/h."""

    rain: Float[Tensor, "sample Y X"]
    spread: Float[Tensor, "sample Y X"]  # standard deviation of what is left open, as in the wide area
    close: Float[Tensor, "sample Y X"]  # the same, as in the blocks around


def continued(
    newest: Float[Tensor, "sample Y X"],
    before: Float[Tensor, "sample Y X"],
    coefficients: Float[Tensor, "sample coefficient rows columns"],
) -> Continued:
    """The rain that the levels of two carried frames (mm/h) go on to, and its spreads, all in dB."""
    both = Levels.of(newest), Levels.of(torch.where(before.isnan(), newest, before))
    now, then, left = torch.split(coefficients, [LEVELS, LEVELS, 2], dim=1)
    shape = both[0].mean.shape[1:]
    blurred = both[0].mean
    for parts, frame in zip((now, then), both, strict=True):
        weights = risen(parts[:, SHARP:], PER_BLOCK, shape).unbind(dim=1)
        for weight, level in zip(weights, frame.blurred, strict=True):
            blurred = torch.addcmul(blurred, weight, level)
    told = torch.cat([risen(left, PER_BLOCK, shape), blurred[:, None]], dim=1)
    spread, close, total = risen(told).unbind(dim=1)
    for parts, frame in zip((now, then), both, strict=True):
        weights = risen(parts[:, :SHARP], WIDE, newest.shape[1:]).unbind(dim=1)
        for weight, level in zip(weights, frame.sharp, strict=True):
            total = torch.addcmul(total, weight, level)
    return Continued(total, spread, close)


def _correlation(
    one: Float[Tensor, "n y x"],
    other: Float[Tensor, "n y x"],
    seen: Float[Tensor, "n Y X"],
    usual: Float[Tensor, "n #rows #columns"],
) -> Float[Tensor, "n rows columns"]:
    """That of two frames of a level in wide areas; the usual one, where little was seen or is going on."""
    side = seen.shape[1] // one.shape[1]
    share = F.avg_pool2d(seen[:, None], side)
    products = torch.stack([one * other, one**2, other**2, torch.ones_like(one)], dim=1) * share
    both, own, then, known = areas(products, WIDE // side, AREA).unbind(dim=1)
    told = (both + NOTHING * usual) / ((own * then).sqrt() + NOTHING)
    return torch.where(known >= FEWEST, told, usual).clamp(-PERFECT, PERFECT)


def _spread(
    level: Float[Tensor, "n y x"], seen: Float[Tensor, "n Y X"], area: int
) -> Float[Tensor, "n rows columns"]:
    """The standard deviation of a level in areas of so many blocks along a side (dB)."""
    side = seen.shape[1] // level.shape[1]
    share = F.avg_pool2d(seen[:, None], side)
    squares = torch.cat([level[:, None] ** 2 * share, share], dim=1)
    square, count = areas(squares, WIDE // side, area).unbind(dim=1)
    return (square / count.clamp(min=LEAST)).sqrt()


def _recurred(
    one: Float[Tensor, "batch level rows columns"],
    two: Float[Tensor, "batch level rows columns"],
    steps: Float[Tensor, "batch lead"],
) -> Float[Tensor, "batch lead 2 level rows columns"]:
    """The weights of both frames after so many steps, linear between whole ones."""
    here = torch.stack([torch.ones_like(one), torch.zeros_like(one)], dim=1)
    last = here.flip(1)
    told = [here]
    for _ in range(LONGEST):
        here, last = one[:, None] * here + two[:, None] * last, here
        told.append(here)
    every = torch.stack(told, dim=1)
    whole = steps.floor()
    each = torch.arange(len(steps), device=steps.device)[:, None]
    low, high = every[each, whole.long()], every[each, whole.long() + 1]
    return torch.lerp(low, high, (steps - whole)[..., None, None, None, None])


def _mean(pair: Float[Tensor, "n 2 y x"], wider: Float[Tensor, "n 1 y x"]) -> Float[Tensor, "n 1 y x"]:
    """The mean over what was observed; that of little leans on the next wider one."""
    total, share = pair[:, :1], pair[:, 1:]
    lacking = (FEWEST - share).clamp(min=0)
    return (total + lacking * wider) / (share + lacking)


def areas(
    field: Float[Tensor, "batch channel y x"], side: int, count: int
) -> Float[Tensor, "batch channel rows columns"]:
    """Means over those of `count` x `count` blocks of `side` x `side` values that lie on the grid."""
    told = blocks(field, side)
    for kernel in ((count, 1), (1, count)):  # one after the other: a square takes `count` / 2 times as long
        margin = (kernel[0] // 2, kernel[1] // 2)
        told = F.avg_pool2d(told, kernel, stride=1, padding=margin, count_include_pad=False)
    return told


def blocks(
    field: Float[Tensor, "batch channel y x"], side: int
) -> Float[Tensor, "batch channel rows columns"]:
    """Means over `side` x `side` values, where those beyond the grid count as 0."""
    down, right = (-size % side for size in field.shape[2:])
    return F.avg_pool2d(F.pad(field, (0, right, 0, down)), side)
