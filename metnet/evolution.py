"""`evolution`: rain rises and dies where it passes, as it lately did there.

Carried along its motion, rain keeps its rate but for a source (Germann & Zawadzki 2002, Mon. Wea. Rev. 130,
2859-2873, section 2). The cascade lets what lumps of rain did between the last frames go on with the lumps;
but much of it does not go with them: hills, coasts and fronts, where rain forms or dies as it comes by, and
what a radar sees less of than of its surroundings, stay or lag behind. So what rain gained or lost between
the last frames is kept where it has come to, and what comes by there gains or loses as much, for a while.
Nothing of it is learned (docs/experiments.md, "Rain rises and dies where it passes").
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metnet.advection import KEPT, come_from, smooth_at
from metnet.cascade import decibel_blocks
from metnet.chances import lasting
from metnet.prior import BLOCK, box_mean, risen

NEAR = 3  # blocks along a side of the squares that a source is a mean of means over
SEEN = 0.15  # of these must be
SHORTEST = 10.0  # minutes, over which at least it must show, for what shows in less is half noise
GOES_ON = 0.25  # of what was gained a minute
MOST = 10.0  # dB by which it changes rain
STOPS = 5  # places along the way of rain where it is asked for


@torch.no_grad()
def evolution(
    frames: Float[Tensor, "batch frame Y X"], age: Float[Tensor, "batch frame"]
) -> Float[Tensor, "batch 1 y x"]:
    """What rain gained at each place since the oldest frame that shows it (dB a minute, in blocks).

    0 where nobody knows, and all over a grid that is one block wide.

    Args:
        frames: mm/h, carried to one time, the newest first; NaN = not observed. The sides of the grid must
            be multiples of 4.
        age: minutes, of each as it was seen.
    """
    newest, *others = (decibel_blocks(frame) for frame in frames.unbind(dim=1))
    gained = torch.full_like(newest, torch.nan)
    for older, old in zip(others, age[:, 1:].unbind(dim=1), strict=True):
        gap = (old - age[:, 0])[:, None, None]
        since = torch.where(gap > 0, (newest - older) / gap.clamp(min=SHORTEST), torch.nan)
        gained = torch.where(since.isnan(), gained, since)
    fields = torch.stack([gained.nan_to_num(), (~gained.isnan()).to(gained.dtype)], dim=1)
    total, share = torch.split(box_mean(box_mean(fields, NEAR), NEAR), 1, dim=1)
    return torch.where(share > SEEN, total / share, 0.0)


@torch.no_grad()
def evolved(
    evolution: Float[Tensor, "batch 1 y x"],
    motion: Float[Tensor, "batch 2 Y X"],
    minutes: Float[Tensor, "batch lead"],
) -> Float[Tensor, "sample Y X"]:
    """What rain has gained (dB) that comes to each cell in some minutes, by the mean of what is on its way.

    Its way is that of `carry_ahead`, and straight on beyond the hour. `chances` keeps frequencies of wide
    areas, so to it what is gained everywhere alike is nothing. The sides of the grid must be multiples of 4.

    Args:
        evolution: as `evolution` tells it.
        motion: cells a minute, along x to the east, along y to the south.
        minutes: since the newest frame.
    """
    rows = range(evolution.shape[2])
    shares = torch.linspace(0, 1, STOPS)[:, None, None, None].to(motion)
    coarse = F.avg_pool2d(motion, BLOCK) / BLOCK
    told = []
    for field, flow, times in zip(evolution, coarse, minutes, strict=True):
        for time in times:
            way = come_from(flow[None], time.clamp(max=KEPT), rows) * (time / KEPT).clamp(min=1)
            told.append(smooth_at(field.expand(STOPS, -1, -1, -1), shares * way, rows).mean(dim=0))
    gained = GOES_ON * lasting(minutes).flatten()[:, None, None, None] * torch.stack(told)
    return risen(gained.clamp(-MOST, MOST))[:, 0]
