"""`chances`: how likely each class of rain is where the cascade goes on, as endless members would have it.

An ensemble of STEPS (Bowler, Pierce & Seed 2006, Q. J. R. Met. Soc. 132, 2127-2155) adds noise to what the
cascade goes on to, and then gives each member the rates of the newest frame, in the order of its own values.
The share of its members that exceed a rate needs none of them: it is the chance that a normal distribution
around the forecast exceeds that value which, over the whole area, is exceeded as often as the rate is in the
newest frame. Unlike an ensemble of STEPS, it knows that the area that it rains on goes on growing or
shrinking for a while as it did (`growth`); and as its perturbed motions do, it carries rain elsewhere where
the motion is in doubt (`displaced`). It has no weights that could know an event by heart; how fast the
spread grows (`DOUBLED`), how long growth lasts, how much of it and of the doubt counts, and how much all of
this counts (`metnet.local.POOL`) were chosen by hand (docs/experiments.md, "What the chances earn").
"""

import math
from itertools import accumulate, chain

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metnet.cascade import AREA, WIDE, Continued, areas, blocks
from metnet.prior import BLOCK, COARSE, box_mean, risen

DOUBLED = 120.0  # minutes in which what motion and cascade do not know of doubles the spread
LEAST = 0.05  # dB: spread
EVERY = 2  # of so many rows and columns one is counted
LOWEST, STEP, COUNT = -24.0, 2.0, 48  # dB: values whose frequency is told
FEW = 0.01  # of an area: so many cells' frequencies are half believed
UNSEEN = 1e-3  # what a cell that was not observed counts by one that was, where none was
NEVER = 1e-7  # a share
GROWS = 0.1, 1.0  # mm/h: rain of the first rate grows in area as it did, of the second and more it does not
LASTS = 60.0  # minutes that what grows or shrinks goes on, falling off exponentially
SURE = 0.2  # share of an area: of so much rain half of the growth is believed
MOST = 0.3  # by which the logarithm of a frequency changes
ERRS = 0.75  # of what motion is in doubt it errs by, along each axis
SHARED = 0.1  # of an area: as much must be seen in both frames that tell its growth
HARDLY = 1e-3  # share of an area, added to what has grown


@torch.no_grad()
def chances(
    onward: Continued,
    newest: Float[Tensor, "sample Y X"],
    minutes: Float[Tensor, "sample Y X"],
    reached: Float[Tensor, "sample edge"],
    grown: Float[Tensor, "sample 1 rows columns"],
) -> Float[Tensor, "sample bin Y X"]:
    """The probability of each class; of what was not observed, as the cascade has it.

    Args:
        onward: what `newest` goes on to.
        newest: mm/h, carried to the lead time; NaN = not observed.
        minutes: by which it counts as carried ahead, at each pixel.
        reached: mm/h from which on the sensor tells each class (`metnet.quantisation`).
        grown: what is added to the logarithm of how often it rains in wide areas, as `grown_by` tells it.
    """
    spread = (onward.close * (1 + minutes / DOUBLED)).clamp(min=LEAST)
    narrow = 1 / (math.sqrt(2) * spread)
    values = _values(onward.rain, narrow, newest, reached, grown)
    above = risen(values, WIDE, newest.shape[1:])  # and from here on in its place, for it may be large
    above = above.sub_(onward.rain[:, None]).mul_(-narrow[:, None]).erf_().add_(1).mul_(0.5)
    between = (above[:, :-1] - above[:, 1:]).clamp_(min=0)  # rounding must not make one negative
    return torch.cat([1 - above[:, :1], between, above[:, -1:]], dim=1)


@torch.no_grad()
def displaced(onward: Continued, cells: Float[Tensor, "sample Y X"]) -> Continued:
    """What rain goes on to where its motion is in doubt by so many cells: mean and spread of what may come.

    What may come lies around, as far as `ERRS` times the doubt (standard deviation, along x and along y): in
    a square of that variance, or where none has it in some of the next smaller and some of the next larger.
    `Continued.spread` stays as it is. The sides of the grid must be multiples of 4.
    """
    rain = torch.stack([onward.rain, onward.rain**2], dim=1)
    small = F.avg_pool2d(torch.cat([rain, torch.ones_like(rain[:, :1])], dim=1), BLOCK)
    sums = [box_mean(small, side) for side in COARSE]
    around, *wider = (part[:, :2] / part[:, 2:] for part in sums)  # what lies outside the grid is left out
    variance = ((ERRS * cells) ** 2)[:, None]
    least, *squares = (((side * BLOCK) ** 2 - 1) / 12 for side in COARSE)
    coarse = F.avg_pool2d(variance, BLOCK)
    for mean, low, high in zip(wider, (least, *squares), squares, strict=False):
        around = torch.lerp(around, mean, ((coarse - low) / (high - low)).clamp(0, 1))
    mean, square = torch.lerp(rain, risen(around), (variance / least).clamp(max=1)).unbind(dim=1)
    close = (onward.close**2 + (square - mean**2).clamp(min=0)).sqrt()
    return Continued(mean, onward.spread, close)


@torch.no_grad()
def growth(
    frames: Float[Tensor, "batch frame Y X"], age: Float[Tensor, "batch frame"]
) -> Float[Tensor, "batch 1 rows columns"]:
    """How fast the area that it rains on grew, in wide areas around each block: of its logarithm, a minute.

    Of frames carried to one time, the newest first; from the oldest that shows enough of an area in common
    with the newest. 0 where none does. The less of an area is wet, the less of its growth is believed.
    """
    few = (slice(None), slice(None, None, EVERY), slice(None, None, EVERY))
    newest, *others = (frame[few] for frame in frames.unbind(dim=1))
    told = areas(torch.zeros_like(newest[:, None]), WIDE // EVERY, AREA)
    for frame, old in zip(others, age[:, 1:].unbind(dim=1), strict=True):  # an older one in place of a newer
        both = ~(newest.isnan() | frame.isnan())
        wet = ((rain >= GROWS[0] * (1 - 1e-6)) & both for rain in (newest, frame))
        fields = torch.stack([both, *wet], dim=1).to(frames.dtype)
        shared, now, then = torch.split(areas(fields, WIDE // EVERY, AREA), 1, dim=1)
        now, then = (often / shared.clamp(min=SHARED) for often in (now, then))
        gap = (old - age[:, 0])[:, None, None, None]
        rate = ((now + HARDLY) / (then + HARDLY)).log() / gap.clamp(min=1) * now / (now + SURE)
        told = torch.where((shared >= SHARED) & (gap > 0), rate, told)
    return told


def grown_by(
    growth: Float[Tensor, "batch 1 rows columns"], minutes: Float[Tensor, "batch lead"]
) -> Float[Tensor, "sample 1 rows columns"]:
    """What the growth comes to after some minutes: in logarithms, and at most `MOST`."""
    told = growth[:, None] * lasting(minutes)[:, :, None, None, None]
    return told.flatten(0, 1).clamp(-MOST, MOST)


def lasting(minutes: Float[Tensor, "batch lead"]) -> Float[Tensor, "batch lead"]:
    """As many minutes of what lasts as come to what goes on for so many, ever less of it."""
    return LASTS * (1 - torch.exp(-minutes / LASTS))


def _values(
    rain: Float[Tensor, "sample Y X"],
    narrow: Float[Tensor, "sample Y X"],
    newest: Float[Tensor, "sample Y X"],
    reached: Float[Tensor, "sample edge"],
    grown: Float[Tensor, "sample 1 rows columns"],
) -> Float[Tensor, "sample edge rows columns"]:
    """The value (dB) that is exceeded as often as each class will be reached, in the area around each block.

    Of an area in which little was observed, the class' own edge.
    """
    few = (slice(None), slice(None, None, EVERY), slice(None, None, EVERY))
    some, frame = rain[few], newest[few]
    edges = reached[:, :, None, None]
    seen = (~frame.isnan()).to(rain.dtype)
    # rates that lie on an edge have reached it, however they were rounded
    there = (frame[:, None] >= edges * (1 - 1e-6)).to(rain.dtype)
    counts = seen + UNSEEN
    steps = [LOWEST + STEP * number for number in range(COUNT)]
    above = ((0.5 + 0.5 * torch.erf((some - step) * narrow[few])) * counts for step in steps)
    fields = chain((seen, counts), there.unbind(dim=1), above)  # in blocks as soon as each is there
    told = torch.cat([blocks(field[:, None], WIDE // EVERY) for field in fields], dim=1)
    known, all_of_it, often, expected = torch.split(
        areas(told, 1, AREA), [1, 1, reached.shape[1], COUNT], dim=1
    )
    curve = (expected / all_of_it).clamp(min=NEVER).log()  # falls from step to step
    usual = _at(curve, (10 * edges.log10() - LOWEST) / STEP)
    least, most = (math.log10(rate) for rate in GROWS)
    share = ((most - edges.log10()) / (most - least)).clamp(0, 1)
    often = torch.minimum(often * (share * grown).exp(), known)
    wanted = (often + FEW * usual.exp()) / (known + FEW)
    # what shrinks at low rates must not become rarer than what is heavier
    falling = torch.stack(list(accumulate(wanted.unbind(dim=1), torch.minimum)), dim=1)
    return LOWEST + STEP * _place(curve, falling.clamp(min=NEVER).log())


def _at(
    curve: Float[Tensor, "n step y x"], places: Float[Tensor, "n place 1 1"]
) -> Float[Tensor, "n place y x"]:
    """The values of a curve at some places along its steps, linear between them."""
    low = places.floor().clamp(0, curve.shape[1] - 2).long()
    here, next_one = (curve.take_along_dim(index, dim=1) for index in (low, low + 1))
    return torch.lerp(here, next_one, places - low)


def _place(
    curve: Float[Tensor, "n step y x"], values: Float[Tensor, "n value y x"]
) -> Float[Tensor, "n value y x"]:
    """Where along its steps a curve that falls has come down to some values; an end, for those beyond it."""
    above = torch.stack([(curve > value[:, None]).sum(dim=1) for value in values.unbind(dim=1)], dim=1)
    after = above.clamp(1, curve.shape[1] - 1)
    high, low = curve.gather(1, after - 1), curve.gather(1, after)
    part = ((high - values) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return after - 1 + part
