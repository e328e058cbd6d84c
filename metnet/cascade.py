"""The cascade of S-PROG: how rain of each size goes on, as its own last frames tell.

Large lumps of rain last and small ones do not, and what a lump did between the last frames it goes on doing
for a while. Rain in decibel is parted into levels of rising size; each follows an autoregression of second
order along the motion, whose coefficients are those of the last three frames around a place (Seed 2003,
J. Appl. Meteor. 42, 381-388; Bowler, Pierce & Seed 2006, Q. J. R. Met. Soc. 132, 2127-2155, section 2).
Here the levels are differences of means over neighbourhoods, so that what is not observed stays out of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metnet.prior import BLOCK, COARSE, FEWEST, FINE, SIDES, box_mean

WET, DRY = 0.1, -15.0  # mm/h, below which rain counts as so many dB (mm/h)
WIDE = 4 * BLOCK  # cells: side of the blocks that coefficients are told for
PER_BLOCK = WIDE // BLOCK
AREA = 17  # such blocks along a side of the area whose frames tell them
LONGEST = 40  # steps of an autoregression; what is asked for later stands still
PERFECT = 0.9995  # the highest correlation, and that of what nothing is known of
NOTHING = 1e-3  # dB squared: variance of what does not change
SHORTEST, UNEVEN = 1.0, 0.5  # minutes: of a step, and by which three frames may be unevenly spaced
LEVELS = len(SIDES)
SHARP = len(FINE)  # levels that are kept at full resolution, the others in blocks
COEFFICIENTS = 2 * LEVELS + 1  # of a lead time: of both frames at each level, and the spread


def decibel(rate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """10 log10 of rain in mm/h, `DRY` where there is less than `WET`; 0 where it was not observed."""
    wet = 10 * rate.clamp(min=WET).log10()
    return torch.where(rate >= WET * (1 - 1e-3), wet, DRY).where(~rate.isnan(), 0.0)


@dataclass(frozen=True)
class Levels:
    """Rain in dB as differences of means over wider and wider neighbourhoods, of what was observed."""

    sharp: tuple[Float[Tensor, "n Y X"], ...]
    blurred: tuple[Float[Tensor, "n rows columns"], ...]  # in blocks
    mean: Float[Tensor, "n rows columns"]  # of a wide area, in blocks

    @classmethod
    def of(cls, rate: Float[Tensor, "n Y X"]) -> "Levels":
        """The levels of rain in mm/h, on a grid whose sides are multiples of 4."""
        seen = (~rate.isnan()).to(rate.dtype)
        pair = torch.stack([decibel(rate), seen], dim=1)
        blocks = F.avg_pool2d(pair, BLOCK)
        sharp = [_ratio(box_mean(pair, side)) for side in FINE]
        wide = [_ratio(box_mean(blocks, side)) for side in COARSE]
        mean = _ratio(_risen(_areas(blocks, PER_BLOCK), blocks.shape[2:], PER_BLOCK))
        steps = tuple(narrow - wider for narrow, wider in pairwise([*wide, mean]))
        sharp.append(_risen(wide[0][:, None], rate.shape[1:], BLOCK)[:, 0])
        return cls(tuple(narrow - wider for narrow, wider in pairwise(sharp)), steps, mean)

    def each(self) -> Iterator[Tensor]:
        """All levels, the narrowest first."""
        yield from (*self.sharp, *self.blurred)


@dataclass(frozen=True)
class Lags:
    """How the levels of frames hang together from one to the next, in wide areas around each block."""

    near: Float[Tensor, "batch level rows columns"]  # correlation of the newest frame and the one before
    far: Float[Tensor, "batch level rows columns"]  # and the one before that, or as near tells it
    spread: Float[Tensor, "batch level rows columns"]  # standard deviation of the newest frame, dB
    gap: Float[Tensor, "batch"]  # minutes from the frame before to the newest; 0: there is none

    @classmethod
    def of(cls, frames: Float[Tensor, "batch frame Y X"], age: Float[Tensor, "batch frame"]) -> "Lags":
        """Those of frames (mm/h) carried to one time, the newest first, and their ages (minutes)."""
        three, ages = _three(frames, age)
        apart = three.masked_fill(three.isnan().any(dim=1, keepdim=True), torch.nan)
        newest, before, oldest = (Levels.of(frame) for frame in apart.unbind(dim=1))
        share = (~apart[:, 0].isnan()).to(frames.dtype)
        told = [
            _lags(*level, share) for level in zip(newest.each(), before.each(), oldest.each(), strict=True)
        ]
        near, far, spread = (torch.stack(part, dim=1) for part in zip(*told, strict=True))
        gap = ages[:, 1] - ages[:, 0]
        even = (ages[:, 2] - ages[:, 0] - 2 * gap).abs() < UNEVEN
        far = torch.where(even[:, None, None, None], far, near**2)
        return cls(near, torch.maximum(far, 2 * near**2 - 1 + 1e-3).clamp(max=PERFECT), spread, gap)

    def after(
        self, minutes: Float[Tensor, "batch lead"]
    ) -> Float[Tensor, "batch lead coefficient rows columns"]:
        """How much of both frames goes into each level of the forecast, and its spread.

        For each lead time, in minutes after the newest frame: of the newest frame at each level, then of the
        one before it, then the standard deviation (dB) of what the levels leave open.
        """
        steps = (minutes / self.gap.clamp(min=SHORTEST)[:, None]).clamp(0.0, LONGEST - 1e-3)
        steps = steps * (self.gap > 0)[:, None]  # of one frame nothing goes on but the frame itself
        rest = 1 - self.near**2
        one, two = self.near * (1 - self.far) / rest, (self.far - self.near**2) / rest  # Yule-Walker
        now, then = _recurred(one, two, steps).unbind(dim=2)
        kept = now**2 + then**2 + 2 * now * then * self.near[:, None]
        left = (self.spread[:, None] ** 2 * (1 - kept).clamp(0, 1)).sum(dim=2, keepdim=True).sqrt()
        return torch.cat([now, then, left], dim=2)


def continued(
    newest: Float[Tensor, "sample Y X"],
    before: Float[Tensor, "sample Y X"],
    coefficients: Float[Tensor, "sample coefficient rows columns"],
) -> tuple[Float[Tensor, "sample Y X"], Float[Tensor, "sample Y X"]]:
    """The rain that the levels of two carried frames (mm/h) go on to, and its spread, both in dB."""
    both = Levels.of(newest), Levels.of(torch.where(before.isnan(), newest, before))
    now, then, left = torch.split(coefficients, [LEVELS, LEVELS, 1], dim=1)
    shape = both[0].mean.shape[1:]
    blurred = both[0].mean
    for parts, frame in zip((now, then), both, strict=True):
        weights = _risen(parts[:, SHARP:], shape, PER_BLOCK).unbind(dim=1)
        for weight, level in zip(weights, frame.blurred, strict=True):
            blurred = torch.addcmul(blurred, weight, level)
    told = torch.cat([_risen(left, shape, PER_BLOCK), blurred[:, None]], dim=1)
    spread, total = _risen(told, newest.shape[1:], BLOCK).unbind(dim=1)
    for parts, frame in zip((now, then), both, strict=True):
        weights = _risen(parts[:, :SHARP], newest.shape[1:], WIDE).unbind(dim=1)
        for weight, level in zip(weights, frame.sharp, strict=True):
            total = torch.addcmul(total, weight, level)
    return total, spread


def _three(
    frames: Float[Tensor, "batch frame Y X"], age: Float[Tensor, "batch frame"]
) -> tuple[Float[Tensor, "batch 3 Y X"], Float[Tensor, "batch 3"]]:
    """The three newest frames and their ages; for one in which nothing was observed stands the one before."""
    last = frames.shape[1] - 1
    fields, ages = [frames[:, 0]], [age[:, 0]]
    for step in (1, 2):
        field, minutes = frames[:, min(step, last)], age[:, min(step, last)]
        empty = field.isnan().flatten(1).all(dim=1)
        fields.append(torch.where(empty[:, None, None], fields[-1], field))
        ages.append(torch.where(empty, ages[-1], minutes))
    return torch.stack(fields, dim=1), torch.stack(ages, dim=1)


def _lags(
    newest: Float[Tensor, "n y x"],
    before: Float[Tensor, "n y x"],
    oldest: Float[Tensor, "n y x"],
    seen: Float[Tensor, "n Y X"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Both correlations and the spread of a level, in wide areas."""
    side = seen.shape[1] // newest.shape[1]
    share = F.avg_pool2d(seen[:, None], side)
    products = [newest * before, newest * oldest, newest**2, before**2, oldest**2]
    sums = _areas(torch.cat([torch.stack(products, dim=1) * share, share], dim=1), WIDE // side)
    near, far, own, other, last, count = sums.unbind(dim=1)
    known = torch.minimum(own, torch.minimum(other, last)) > NOTHING
    pairs = ((near, other, PERFECT), (far, last, PERFECT**2))
    first, second = (
        torch.where(known, both / (own * then + NOTHING**2).sqrt(), unknown).clamp(-PERFECT, PERFECT)
        for both, then, unknown in pairs
    )
    return first, second, (own / count.clamp(min=FEWEST)).sqrt()


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


def _ratio(pair: Float[Tensor, "n 2 y x"]) -> Float[Tensor, "n y x"]:
    """The mean over what was observed; of little it is drawn towards 0."""
    return pair[:, 0] / pair[:, 1].clamp(min=FEWEST)


def _areas(
    field: Float[Tensor, "batch channel y x"], side: int
) -> Float[Tensor, "batch channel rows columns"]:
    """Means over wide areas, of blocks of so many values; what lies outside counts as 0."""
    down, right = (-size % side for size in field.shape[2:])
    blocks = F.avg_pool2d(F.pad(field, (0, right, 0, down)), side)
    return F.avg_pool2d(blocks, AREA, stride=1, padding=AREA // 2)


def _risen(
    blocks: Float[Tensor, "batch channel rows columns"], shape: torch.Size, factor: int
) -> Float[Tensor, "batch channel y x"]:
    """Blocks at a resolution that is so many times as fine."""
    fine = F.interpolate(blocks, scale_factor=factor, mode="bilinear", align_corners=False)
    return fine[..., : shape[0], : shape[1]]
