"""`AdvectionPrior`: the extrapolated rain, widened by its neighbourhood, as a distribution over rain bins.

The further ahead, the less a cell's own extrapolated rate tells and the more its surroundings do (the
neighbourhood method of Theis et al. 2005, Meteorol. Appl. 12, 257-268, on a Lagrangian persistence forecast).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from metnet.rain import RainBins

FINE = (1, 5)  # sides of neighbourhoods in cells
COARSE = (3, 7, 15)  # sides in blocks of 4 x 4 cells
BLOCK = 4
SIDES = (*FINE, *(side * BLOCK for side in COARSE))  # cells
WIDENING = 0.35  # cells a minute: how fast the likeliest neighbourhood grows, before anything is learned
SPREAD = 0.7  # of the logarithm of the sides that count at one lead time
REFERENCE = 20.0  # minutes at which the slopes of the weights turn
NORMAL_CELL = 1000.0  # metres at which the widening is `WIDENING`
PIXELS_A_STEP = 10_000  # of a step of `fit`
KEEP = 1e-4  # how strongly `fit` holds on to the start, where pixels tell nothing


class AdvectionPrior(nn.Module):
    """A mixture of neighbourhoods of different size, and of climatology, weighted by class and lead time.

    A neighbourhood's cells that are unobserved, or outside the grid, count as climatology. The weights start
    as a plausible widening; `fit` finds the best, for each class and size a plane in the logarithms of lead
    time and cell size.
    """

    def __init__(self, bins: RainBins, climatology: list[float]):
        super().__init__()
        self.bins = bins
        parts = len(SIDES) + 1  # the last is climatology
        self.level = nn.Parameter(torch.zeros(len(bins), parts))
        self.slope = nn.Parameter(torch.zeros(len(bins), parts))
        self.scale = nn.Parameter(torch.zeros(len(bins), parts))
        self.climatology = nn.Parameter(torch.tensor(climatology).log())

    def forward(
        self,
        carried: Float[Tensor, "batch lead Y X"],
        lead_time: Float[Tensor, "lead"],
        cell_size: Float[Tensor, "batch"],
    ) -> Float[Tensor, "batch lead bin Y X"]:
        """Log-probabilities of the classes around a field that was carried to each lead time (mm/h, minutes).

        The sides of the grid must be multiples of 4.
        """
        batch, lead = carried.shape[:2]
        each = self.weights(lead_time.repeat(batch), cell_size.repeat_interleave(lead))
        weights = each[..., None, None]
        usual = self.climatology.softmax(dim=0)[:, None, None]
        onehot, seen = _classes(self.bins, carried)
        total = weights[:, :, -1] * usual
        for part, side in enumerate(FINE):
            near = _mean(onehot, side) + (1 - _mean(seen, side)) * usual
            total = total + weights[:, :, part] * near
        blocks, blocks_seen = F.avg_pool2d(onehot, BLOCK), F.avg_pool2d(seen, BLOCK)
        wide = torch.zeros_like(blocks)
        for part, side in enumerate(COARSE, start=len(FINE)):
            near = _mean(blocks, side) + (1 - _mean(blocks_seen, side)) * usual
            wide = wide + weights[:, :, part] * near
        total = total + _risen(wide)
        logarithm = (total / total.sum(dim=1, keepdim=True)).log()
        return rearrange(logarithm, "(batch lead) bin y x -> batch lead bin y x", batch=batch)

    def weights(
        self, lead_time: Float[Tensor, "sample"], cell_size: Float[Tensor, "sample"]
    ) -> Float[Tensor, "sample bin part"]:
        """How much each neighbourhood, and climatology last, counts for each class; they add up to 1."""
        size = cell_size / NORMAL_CELL
        sides = torch.tensor(SIDES).to(lead_time)
        width = 1 + WIDENING * lead_time / size
        off = (sides.log() - width.log()[:, None]) / SPREAD
        start = torch.cat([-(off**2) / 2, (-5 + lead_time / 30)[:, None]], dim=1)
        later, coarser = ((ratio).log()[:, None, None] for ratio in (lead_time / REFERENCE, size))
        return (start[:, None] + self.level + self.slope * later + self.scale * coarser).softmax(dim=-1)

    def fit(self, pixels: "Pixels", steps: int = 150, rate: float = 0.05, seed: int = 0) -> float:
        """Finds the weights that make what fell at some pixels likeliest; the mean of -log P there (nats).

        Raises:
            ValueError: if there are no pixels.
        """
        count = len(pixels.fell)
        if not count:
            raise ValueError("no observed pixel to fit the prior on")
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(self.parameters(), lr=rate)
        shares = torch.bincount(pixels.fell, minlength=len(self.bins)) + 1.0
        with torch.no_grad():
            self.climatology.copy_((shares / shares.sum()).log())
        loss = torch.zeros(())
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (0.01 + 0.495 * (1 + math.cos(math.pi * step / steps)))
            some = torch.randint(0, count, (min(count, PIXELS_A_STEP),), generator=generator)
            loss = F.nll_loss(self.at(pixels.some(some)), pixels.fell[some])
            offset = sum((weight**2).sum() for weight in (self.level, self.slope, self.scale))
            optimizer.zero_grad()
            torch.autograd.backward(loss + KEEP * offset)
            optimizer.step()
        return loss.item()

    def at(self, pixels: "Pixels") -> Float[Tensor, "pixel bin"]:
        """Log-probabilities of the classes at single pixels."""
        weights = self.weights(pixels.lead_time, pixels.cell_size)
        usual = self.climatology.softmax(dim=0)
        near = pixels.near + (1 - pixels.seen)[..., None] * usual
        total = weights[..., -1] * usual + torch.einsum("nkp,npk->nk", weights[..., :-1], near)
        return (total / total.sum(dim=1, keepdim=True)).log()


@dataclass(frozen=True)
class Pixels:
    """Single pixels: what lies around each in the carried field, and what fell there."""

    near: Float[Tensor, "pixel side bin"]  # share of the neighbourhood that each class has
    seen: Float[Tensor, "pixel side"]  # share of the neighbourhood that was observed
    lead_time: Float[Tensor, "pixel"]  # minutes
    cell_size: Float[Tensor, "pixel"]  # metres
    fell: Int[Tensor, "pixel"]  # the class that was observed

    def some(self, places: Int[Tensor, "n"]) -> "Pixels":
        """The pixels at these places."""
        return Pixels(*(getattr(self, field.name)[places] for field in fields(Pixels)))

    @staticmethod
    def joined(parts: "Sequence[Pixels]") -> "Pixels":
        """All pixels of the parts."""
        return Pixels(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Pixels)))


@torch.no_grad()
def pixels(
    bins: RainBins,
    carried: Float[Tensor, "batch lead Y X"],
    lead_time: Float[Tensor, "lead"],
    cell_size: Float[Tensor, "batch"],
    target: Float[Tensor, "batch lead Y X"],
    count: int,
    generator: torch.Generator,
) -> Pixels:
    """Some of the observed pixels of a target, `count` of each sample and lead time, drawn with repetition.

    The sides of the grid must be multiples of 4.
    """
    onehot, seen = _classes(bins, carried)
    fell = rearrange(bins.classify(target), "batch lead y x -> (batch lead) (y x)")
    blocks = F.avg_pool2d(torch.cat([onehot, seen], dim=1), BLOCK)
    each = [_mean(torch.cat([onehot, seen], dim=1), side) for side in FINE]
    each += [_risen(_mean(blocks, side)) for side in COARSE]
    near = rearrange(each, "side n channel y x -> n (y x) side channel")
    leads, sizes = lead_time.repeat(len(carried)), cell_size.repeat_interleave(len(lead_time))
    parts = []
    for sample, observed in enumerate(fell):
        there = torch.nonzero(observed >= 0)[:, 0]
        if len(there):
            some = there[torch.randint(0, len(there), (count,), generator=generator)]
            around = near[sample, some]
            told = (leads[sample].expand(count), sizes[sample].expand(count))
            parts.append(Pixels(around[..., :-1], around[..., -1], *told, observed[some]))
    if not parts:
        empty = torch.zeros(0, len(SIDES), len(bins)), torch.zeros(0, len(SIDES))
        return Pixels(*empty, torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    return Pixels.joined(parts)


def _classes(
    bins: RainBins, carried: Float[Tensor, "batch lead Y X"]
) -> tuple[Float[Tensor, "sample bin Y X"], Float[Tensor, "sample 1 Y X"]]:
    """One where a cell has a class, and where it was observed."""
    classes = rearrange(bins.classify(carried), "batch lead y x -> (batch lead) y x")
    seen = (classes >= 0).to(carried.dtype)[:, None]
    onehot = rearrange(F.one_hot(classes.clamp(min=0), len(bins)), "n y x bin -> n bin y x")
    return onehot.to(carried.dtype) * seen, seen


def _mean(field: Float[Tensor, "n channel Y X"], side: int) -> Float[Tensor, "n channel Y X"]:
    """The mean over `side` x `side` cells, where those outside the grid count as 0."""
    return field if side == 1 else F.avg_pool2d(field, side, stride=1, padding=side // 2)


def _risen(blocks: Float[Tensor, "n channel rows columns"]) -> Float[Tensor, "n channel Y X"]:
    """Blocks at full resolution."""
    return F.interpolate(blocks, scale_factor=BLOCK, mode="bilinear", align_corners=False)


def neighbourhoods(
    carried: Float[Tensor, "n Y X"],
) -> Float[Tensor, "n channel Y X"]:
    """What a network is shown of a carried field: scaled rate and observed share, for every neighbourhood."""
    seen = (~carried.isnan()).to(carried.dtype)[:, None]
    value = torch.tanh(torch.log1p(carried.nan_to_num(nan=0.0).clamp(min=0)) / 4)[:, None]
    both = torch.cat([value, seen], dim=1)
    blocks = F.avg_pool2d(both, BLOCK)
    wide = _risen(torch.cat([_mean(blocks, side) for side in COARSE], dim=1))
    return torch.cat([*(_mean(both, side) for side in FINE), wide], dim=1)
