"""`AdvectionPrior`: the extrapolated rain, widened by its neighbourhood, as a distribution over rain bins.

The further ahead, the less a cell's own extrapolated rate tells and the more its surroundings do (the
neighbourhood method of Theis et al. 2005, Meteorol. Appl. 12, 257-268, on a Lagrangian persistence forecast).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from metnet.rain import RainBins

FINE = (1, 5)  # sides of neighbourhoods in cells
COARSE = (3, 7, 15)  # sides in blocks of 4 x 4 cells
BLOCK = 4
SIDES = (*FINE, *(side * BLOCK for side in COARSE))  # cells
WIDENING = 0.35  # cells a minute: how fast the likeliest neighbourhood grows, before anything is learned
SPREAD = 0.7  # of the logarithm of the sides that count at one lead time
REFERENCE = 20.0  # minutes at which the slopes of the weights turn


class AdvectionPrior(nn.Module):
    """A mixture of neighbourhoods of different size, and of climatology, weighted by class and lead time.

    A neighbourhood's cells that are unobserved, or outside the grid, count as climatology. The weights start
    as a plausible widening; learning fits them, for each class and size a line in the logarithm of the lead
    time.
    """

    def __init__(self, bins: RainBins, climatology: list[float]):
        super().__init__()
        self.bins = bins
        parts = len(SIDES) + 1  # the last is climatology
        self.level = nn.Parameter(torch.zeros(len(bins), parts))
        self.slope = nn.Parameter(torch.zeros(len(bins), parts))
        self.climatology = nn.Parameter(torch.tensor(climatology).log())

    def forward(
        self, carried: Float[Tensor, "batch lead Y X"], lead_time: Float[Tensor, "lead"]
    ) -> Float[Tensor, "batch lead bin Y X"]:
        """Log-probabilities of the classes around a field that was carried to each lead time (mm/h, minutes).

        The sides of the grid must be multiples of 4.
        """
        batch = len(carried)
        weights = self.weights(lead_time).repeat(batch, 1, 1)[..., None, None]
        usual = self.climatology.softmax(dim=0)[:, None, None]
        classes = rearrange(self.bins.classify(carried), "batch lead y x -> (batch lead) y x")
        seen = (classes >= 0).to(carried.dtype)[:, None]
        onehot = rearrange(F.one_hot(classes.clamp(min=0), len(self.bins)), "n y x bin -> n bin y x")
        onehot = onehot.to(carried.dtype) * seen
        total = weights[:, :, -1] * usual
        for part, side in enumerate(FINE):
            near = _mean(onehot, side) + (1 - _mean(seen, side)) * usual
            total = total + weights[:, :, part] * near
        blocks, blocks_seen = F.avg_pool2d(onehot, BLOCK), F.avg_pool2d(seen, BLOCK)
        wide = torch.zeros_like(blocks)
        for part, side in enumerate(COARSE, start=len(FINE)):
            near = _mean(blocks, side) + (1 - _mean(blocks_seen, side)) * usual
            wide = wide + weights[:, :, part] * near
        total = total + F.interpolate(wide, scale_factor=BLOCK, mode="bilinear", align_corners=False)
        logarithm = (total / total.sum(dim=1, keepdim=True)).log()
        return rearrange(logarithm, "(batch lead) bin y x -> batch lead bin y x", batch=batch)

    def weights(self, lead_time: Float[Tensor, "lead"]) -> Float[Tensor, "lead bin part"]:
        """How much each neighbourhood, and climatology last, counts for each class; they add up to 1."""
        sides = torch.tensor(SIDES).to(lead_time)
        width = 1 + WIDENING * lead_time
        off = (sides.log() - width.log()[:, None]) / SPREAD
        start = torch.cat([-(off**2) / 2, (-5 + lead_time / 30)[:, None]], dim=1)
        later = (lead_time / REFERENCE).log()[:, None, None]
        return (start[:, None] + self.level + self.slope * later).softmax(dim=-1)


def _mean(field: Float[Tensor, "n channel Y X"], side: int) -> Float[Tensor, "n channel Y X"]:
    """The mean over `side` x `side` cells, where those outside the grid count as 0."""
    return field if side == 1 else F.avg_pool2d(field, side, stride=1, padding=side // 2)


def neighbourhoods(
    carried: Float[Tensor, "n Y X"],
) -> Float[Tensor, "n channel Y X"]:
    """What a network is shown of a carried field: scaled rate and observed share, for every neighbourhood."""
    seen = (~carried.isnan()).to(carried.dtype)[:, None]
    value = torch.tanh(torch.log1p(carried.nan_to_num(nan=0.0).clamp(min=0)) / 4)[:, None]
    both = torch.cat([value, seen], dim=1)
    blocks = F.avg_pool2d(both, BLOCK)
    wide = torch.cat([_mean(blocks, side) for side in COARSE], dim=1)
    wide = F.interpolate(wide, scale_factor=BLOCK, mode="bilinear", align_corners=False)
    return torch.cat([*(_mean(both, side) for side in FINE), wide], dim=1)
