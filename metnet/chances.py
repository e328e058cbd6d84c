"""`chances`: how likely each class of rain is where the cascade goes on, as endless members would have it.

An ensemble of STEPS (Bowler, Pierce & Seed 2006, Q. J. R. Met. Soc. 132, 2127-2155) adds noise to what the
cascade goes on to, and then gives each member the rates of the newest frame, in the order of its own values.
The share of its members that exceed a rate needs none of them: it is the chance that a normal distribution
around the forecast exceeds that value which, over the whole area, is exceeded as often as the rate is in the
newest frame. It has no weights that could know an event by heart; how fast the spread grows (`DOUBLED`) and
how much it counts (`metnet.local.POOL`) were chosen by hand (docs/benchmarks.md, "What the chances earn").
"""

import math
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from metnet.cascade import AREA, WIDE, Continued, areas, blocks
from metnet.prior import risen
from metnet.rain import RainBins

DOUBLED = 120.0  # minutes in which what motion and cascade do not know of doubles the spread
LEAST = 0.05  # dB: spread
EVERY = 2  # of so many rows and columns one is counted
LOWEST, STEP, COUNT = -24.0, 2.0, 48  # dB: values whose frequency is told
FEW = 0.01  # of an area: so many cells' frequencies are half believed
UNSEEN = 1e-3  # what a cell that was not observed counts by one that was, where none was
NEVER = 1e-7  # a share


@torch.no_grad()
def chances(
    onward: Continued,
    newest: Float[Tensor, "sample Y X"],
    minutes: Float[Tensor, "sample Y X"],
    bins: RainBins,
) -> Float[Tensor, "sample bin Y X"]:
    """The probability of each class; of what was not observed, as the cascade has it.

    Args:
        onward: what `newest` goes on to.
        newest: mm/h, carried to the lead time; NaN = not observed.
        minutes: by which it counts as carried ahead, at each pixel.
        bins: the classes.
    """
    spread = (onward.close * (1 + minutes / DOUBLED)).clamp(min=LEAST)
    narrow = 1 / (math.sqrt(2) * spread)
    values = _values(onward.rain, narrow, newest, bins)
    above = risen(values, WIDE, newest.shape[1:])  # and from here on in its place, for it may be large
    above = above.sub_(onward.rain[:, None]).mul_(-narrow[:, None]).erf_().add_(1).mul_(0.5)
    between = (above[:, :-1] - above[:, 1:]).clamp_(min=0)  # rounding must not make one negative
    return torch.cat([1 - above[:, :1], between, above[:, -1:]], dim=1)


def _values(
    rain: Float[Tensor, "sample Y X"],
    narrow: Float[Tensor, "sample Y X"],
    newest: Float[Tensor, "sample Y X"],
    bins: RainBins,
) -> Float[Tensor, "sample edge rows columns"]:
    """The value (dB) that is exceeded as often as each class is reached, in the area around each block.

    Of an area in which little was observed, the class' own edge.
    """
    few = (slice(None), slice(None, None, EVERY), slice(None, None, EVERY))
    some, frame = rain[few], newest[few]
    edges = torch.tensor(bins.edges).to(rain)
    seen = (~frame.isnan()).to(rain.dtype)
    # rates that lie on an edge have reached it, however they were rounded
    reached = (frame[:, None] >= edges[:, None, None] * (1 - 1e-6)).to(rain.dtype)
    counts = seen + UNSEEN
    steps = [LOWEST + STEP * number for number in range(COUNT)]
    above = ((0.5 + 0.5 * torch.erf((some - step) * narrow[few])) * counts for step in steps)
    fields = chain((seen, counts), reached.unbind(dim=1), above)  # in blocks as soon as each is there
    told = torch.cat([blocks(field[:, None], WIDE // EVERY) for field in fields], dim=1)
    known, all_of_it, often, expected = torch.split(areas(told, 1, AREA), [1, 1, len(edges), COUNT], dim=1)
    curve = (expected / all_of_it).clamp(min=NEVER).log()  # falls from step to step
    usual = _at(curve, (10 * edges.log10() - LOWEST) / STEP)
    wanted = (often + FEW * usual.exp()) / (known + FEW)
    return LOWEST + STEP * _place(curve, wanted.clamp(min=NEVER).log())


def _at(curve: Float[Tensor, "n step y x"], places: Float[Tensor, "place"]) -> Float[Tensor, "n place y x"]:
    """The values of a curve at some places along its steps, linear between them."""
    low = places.floor().clamp(0, curve.shape[1] - 2).long()
    return torch.lerp(curve[:, low], curve[:, low + 1], (places - low)[:, None, None])


def _place(
    curve: Float[Tensor, "n step y x"], values: Float[Tensor, "n value y x"]
) -> Float[Tensor, "n value y x"]:
    """Where along its steps a curve that falls has come down to some values; an end, for those beyond it."""
    above = torch.stack([(curve > value[:, None]).sum(dim=1) for value in values.unbind(dim=1)], dim=1)
    after = above.clamp(1, curve.shape[1] - 1)
    high, low = curve.gather(1, after - 1), curve.gather(1, after)
    part = ((high - values) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return after - 1 + part
