"""`AdvectionPrior`: the extrapolated rain, widened by its neighbourhood, as a distribution over rain bins.

The further ahead, the less a cell's own extrapolated rate tells and the more its surroundings do (the
neighbourhood method of Theis et al. 2005, Meteorol. Appl. 12, 257-268, on a Lagrangian persistence forecast).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Real, UInt8
from torch import Tensor, nn

from metnet.rain import RainBins
from metnet.scaling import scaled_rain

FINE = (1, 5)  # sides of neighbourhoods in cells
COARSE = (3, 7, 15, 31)  # sides in blocks of 4 x 4 cells
BLOCK = 4
FEWEST = 0.02  # of a neighbourhood's cells; the mean of fewer is drawn towards 0
FEW = 0.1  # how much an unobserved cell of the widest neighbourhood tells of climatology, by an observed one
SIDES = (*FINE, *(side * BLOCK for side in COARSE))  # cells
NEAR = SIDES[:-1]  # those that `means` are of: a network that sees farther learns events by heart
WIDENING = 0.35  # cells a minute: how fast the likeliest neighbourhood grows, before anything is learned
SPREAD = 0.7  # of the logarithm of the sides that count at one lead time
REFERENCE = 20.0  # minutes at which the slopes of the weights turn
NORMAL_CELL = 1000.0  # metres at which the widening is `WIDENING`
PIXELS_A_STEP = 10_000  # of a step of `fit`
KEEP = 1e-4  # how strongly `fit` holds on to the start, where pixels tell nothing


class AdvectionPrior(nn.Module):
    """A mixture of neighbourhoods of different size, and of climatology, weighted by class and lead time.

    A neighbourhood's cells that are unobserved, or outside the grid, count as the next wider neighbourhood;
    those of the widest as the rest of it and, the fewer were observed, as climatology. The weights start as
    a plausible widening; `fit` finds the best, for each class and size a plane in the logarithms of lead
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
        ahead: Float[Tensor, "batch frame lead"],
        cell_size: Float[Tensor, "batch"],
        frame: UInt8[Tensor, "batch lead Y X"] | None = None,
    ) -> Float[Tensor, "batch lead bin Y X"]:
        """Log-probabilities of the classes around a field that was carried to each lead time (mm/h).

        `ahead` tells by how many minutes each frame counts as carried ahead, `frame` which of them each value
        is of: the first, if none is given. The sides of the grid must be multiples of 4.
        """
        batch, lead = carried.shape[:2]
        frame = torch.zeros_like(carried, dtype=torch.uint8) if frame is None else frame
        usual = self.climatology.softmax(dim=0)[:, None, None]
        fine, wide = _neighbourhoods(*_classes(self.bins, carried), usual)
        sizes = cell_size.repeat_interleave(lead)
        source = frame.flatten(0, 1)
        total = torch.zeros(())
        for index, minutes in enumerate(ahead.unbind(dim=1)):
            weights = self.weights(minutes.flatten(), sizes)
            if index == 0:
                total = _mixed(weights, fine, wide, usual)
            else:  # few cells: those that the newer frames did not see
                there = (source == index).nonzero().unbind(dim=1)
                n, y, x = there
                total[n, :, y, x] = _mixed_at(weights, fine, wide, usual, there)
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
        count = len(pixels)
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
        near = pixels.near + pixels.unknown[..., None] * usual
        total = weights[..., -1] * usual + torch.einsum("nkp,npk->nk", weights[..., :-1], near)
        return (total / total.sum(dim=1, keepdim=True)).log()


@dataclass(frozen=True)
class Pixels:
    """Single pixels: what lies around each in the carried field, and what fell there."""

    near: Float[Tensor, "pixel side bin"]  # share of the neighbourhood that each class has
    unknown: Float[Tensor, "pixel side"]  # share of the neighbourhood that counts as climatology
    lead_time: Float[Tensor, "pixel"]  # minutes by which the value counts as carried ahead
    cell_size: Float[Tensor, "pixel"]  # metres
    fell: Int[Tensor, "pixel"]  # the class that was observed
    told: Float[Tensor, "pixel feature"]  # what else is known there
    likely: Float[Tensor, "pixel class"]  # and how likely each class is by `metnet.chances`
    reached: Float[Tensor, "pixel edge"]  # mm/h from which on each class is told (`metnet.quantisation`)

    def __len__(self) -> int:
        """How many pixels."""
        return len(self.fell)

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
    ahead: Float[Tensor, "batch frame lead"],
    cell_size: Float[Tensor, "batch"],
    target: Float[Tensor, "batch lead Y X"],
    count: int,
    generator: torch.Generator,
    frame: UInt8[Tensor, "batch lead Y X"] | None = None,
    told: Float[Tensor, "sample feature Y X"] | None = None,
    likely: Float[Tensor, "sample bin Y X"] | None = None,
    reached: Float[Tensor, "sample edge"] | None = None,
) -> Pixels:
    """Some of the observed pixels of a target, `count` of each sample and lead time, drawn with repetition.

    `ahead` and `frame` are those of `AdvectionPrior.forward`, `told` is what else is known there, `likely`
    what `metnet.chances` says, and `reached` what `metnet.quantisation` does. The sides of the grid must be
    multiples of 4.
    """
    frame = torch.zeros_like(carried, dtype=torch.uint8) if frame is None else frame
    onehot, seen = _classes(bins, carried)
    fell = rearrange(bins.classify(target), "batch lead y x -> (batch lead) (y x)")
    unknown = F.one_hot(torch.tensor(len(bins))).to(onehot)[:, None, None]  # a share by itself, the last
    fine, wide = _neighbourhoods(F.pad(onehot, (0, 0, 0, 0, 0, 1)), seen, unknown)
    near = rearrange([*fine, *(risen(part) for part in wide)], "side n channel y x -> n (y x) side channel")
    sizes = cell_size.repeat_interleave(carried.shape[1])
    minutes = minutes_of(ahead, frame).flatten(2).flatten(0, 1)
    nothing = fell.new_zeros(*fell.shape, 0, dtype=near.dtype)
    known, said = (nothing if part is None else part.flatten(2).mT for part in (told, likely))
    edges = nothing[:, 0] if reached is None else reached
    parts = []
    for sample, observed in enumerate(fell):
        there = torch.nonzero(observed >= 0)[:, 0]
        if len(there):
            some = there[torch.randint(0, len(there), (count,), generator=generator)]
            around = near[sample, some]
            place = (minutes[sample, some], sizes[sample].expand(count), observed[some])
            beside = (known[sample, some], said[sample, some], edges[sample].expand(count, -1))
            parts.append(Pixels(around[..., :-1], around[..., -1], *place, *beside))
    if not parts:
        empty = torch.zeros(0, len(SIDES), len(bins)), torch.zeros(0, len(SIDES))
        none = torch.zeros(0, dtype=torch.int64)
        return Pixels(*empty, torch.zeros(0), torch.zeros(0), none, known[0, :0], said[0, :0], edges[:0])
    return Pixels.joined(parts)


def minutes_of(
    ahead: Float[Tensor, "batch frame lead"], frame: UInt8[Tensor, "batch lead Y X"]
) -> Float[Tensor, "batch lead Y X"]:
    """By how many minutes the value of each pixel counts as carried ahead, by the frame that it is of."""
    batch, lead = (torch.arange(size, device=ahead.device) for size in frame.shape[:2])
    return ahead[batch[:, None, None, None], frame.long(), lead[:, None, None]]


def _neighbourhoods(
    onehot: Float[Tensor, "n share Y X"], seen: Float[Tensor, "n 1 Y X"], usual: Float[Tensor, "share 1 1"]
) -> tuple[list[Float[Tensor, "n share Y X"]], list[Float[Tensor, "n share rows columns"]]]:
    """The share of each class in the neighbourhoods of rising side, where what is unknown counts as usual.

    First the fine ones, then the coarse ones in blocks. All shares of a cell add up to 1.
    """
    blocks, observed = F.avg_pool2d(onehot, BLOCK), F.avg_pool2d(seen, BLOCK)
    widest = box_mean(observed, COARSE[-1])
    unseen = FEW * (1 - widest)
    wide = [(box_mean(blocks, COARSE[-1]) + unseen * usual) / (widest + unseen)]
    for side in COARSE[-2::-1]:
        wide.insert(0, _filled(box_mean(blocks, side), box_mean(observed, side), wide[0]))
    fine = [risen(wide[0])]
    for side in FINE[::-1]:
        fine.insert(0, _filled(_share(onehot, side), _share(seen, side), fine[0]))
    return fine[:-1], wide


def _filled(
    shares: Float[Tensor, "n share Y X"],
    observed: Float[Tensor, "n 1 Y X"],
    wider: Float[Tensor, "n share Y X"],
) -> Float[Tensor, "n share Y X"]:
    """The shares, completed by the next wider neighbourhood's where not all was observed."""
    return torch.addcmul(shares, 1 - observed, wider)


def _mixed(
    weights: Float[Tensor, "n bin part"],
    fine: Sequence[Float[Tensor, "n bin Y X"]],
    wide: Sequence[Float[Tensor, "n bin rows columns"]],
    usual: Float[Tensor, "bin 1 1"],
) -> Float[Tensor, "n bin Y X"]:
    """The weighted sum of all neighbourhoods, and of climatology."""
    by_part = weights[..., None, None].unbind(dim=2)
    total = by_part[-1] * usual
    for weight, near in zip(by_part, fine, strict=False):
        total = torch.addcmul(total, weight, near)
    coarse = torch.zeros_like(wide[0])
    for weight, near in zip(by_part[len(fine) :], wide, strict=False):
        coarse = torch.addcmul(coarse, weight, near)
    return total + risen(coarse)


def _mixed_at(
    weights: Float[Tensor, "n bin part"],
    fine: Sequence[Float[Tensor, "n bin Y X"]],
    wide: Sequence[Float[Tensor, "n bin rows columns"]],
    usual: Float[Tensor, "bin 1 1"],
    places: Sequence[Int[Tensor, "cell"]],
) -> Float[Tensor, "cell bin"]:
    """What `_mixed` gives at some cells: their sample, row and column."""
    n, y, x = places
    by_part = weights.unbind(dim=2)
    total = by_part[-1][n] * usual[:, 0, 0]
    for weight, near in zip(by_part, fine, strict=False):
        total = total + weight[n] * near[n, :, y, x]
    rows, columns = wide[0].shape[2:]
    for (row, at_row), (column, at_column) in product(_between(y, rows), _between(x, columns)):
        share = (at_row * at_column)[:, None]
        for weight, near in zip(by_part[len(fine) :], wide, strict=False):
            total = total + weight[n] * share * near[n, :, row, column]
    return total


def _between(
    cell: Int[Tensor, "cell"], count: int
) -> list[tuple[Int[Tensor, "cell"], Float[Tensor, "cell"]]]:
    """The two of `count` blocks whose middles a cell lies between, and how much it takes of each."""
    place = ((cell + 0.5) / BLOCK - 0.5).clamp(0, count - 1)
    low = place.floor().long()
    return [(low, 1 - (place - low)), ((low + 1).clamp(max=count - 1), place - low)]


def _classes(
    bins: RainBins, carried: Float[Tensor, "batch lead Y X"]
) -> tuple[Float[Tensor, "sample bin Y X"], Float[Tensor, "sample 1 Y X"]]:
    """One where a cell has a class, and where it was observed."""
    # many rates lie just on an edge, and rounding must not decide their class; the edges give way, since an
    # optimizer of graphs takes a factor so near to 1 on the rates for 1
    below = replace(bins, edges=tuple(edge * (1 - 1e-6) for edge in bins.edges))
    classes = rearrange(below.classify(carried), "batch lead y x -> (batch lead) 1 y x")
    seen = (classes >= 0).to(carried.dtype)
    nothing = seen.new_zeros(len(seen), len(bins), *seen.shape[2:])
    return nothing.scatter_(1, classes.clamp(min=0), seen), seen


def box_mean(field: Float[Tensor, "n channel Y X"], side: int) -> Float[Tensor, "n channel Y X"]:
    """The mean over `side` x `side` cells, where those outside the grid count as 0."""
    return field if side == 1 else _sums(_sums(field, side, -1), side, -2) * (1 / side**2)


def _share(ones: Float[Tensor, "n channel Y X"], side: int) -> Float[Tensor, "n channel Y X"]:
    """As `box_mean` of a few ones and noughts, in a third of the time: as bytes, where these can be added."""
    if side == 1 or torch.compiler.is_exporting():  # older ONNX Runtimes cannot
        return box_mean(ones, side)
    return _sums(_sums(ones.to(torch.uint8), side, -1), side, -2).to(ones.dtype) * (1 / side**2)


def _sums(field: Real[Tensor, "n channel Y X"], side: int, dim: int) -> Real[Tensor, "n channel Y X"]:
    """Sums over `side` cells along a dimension; pooling over squares takes four times as long on a CPU."""
    margin = (side // 2, side // 2)
    framed = F.pad(field, margin if dim == -1 else (0, 0, *margin))
    first, second, *others = (framed.narrow(dim, shift, field.shape[dim]) for shift in range(side))
    total = first + second
    for other in others:
        total += other
    return total


def risen(
    blocks: Float[Tensor, "n channel rows columns"], factor: int = BLOCK, shape: torch.Size | None = None
) -> Float[Tensor, "n channel Y X"]:
    """Blocks at a resolution that is so many times as fine, cut to a shape."""
    fine = F.interpolate(blocks, scale_factor=factor, mode="bilinear", align_corners=False)
    return fine if shape is None else fine[..., : shape[0], : shape[1]]


def neighbourhoods(
    carried: Float[Tensor, "n Y X"],
) -> Float[Tensor, "n channel Y X"]:
    """What a network is shown of a carried field: scaled rate and observed share, for each of `NEAR`."""
    seen = (~carried.isnan()).to(carried.dtype)[:, None]
    return torch.cat(means(torch.cat([scaled_rain(carried)[:, None], seen], dim=1)), dim=1)


def means(fields: Float[Tensor, "n channel Y X"]) -> list[Float[Tensor, "n channel Y X"]]:
    """The mean of each field over the neighbourhoods of `NEAR`, where cells outside the grid count as 0."""
    blocks = F.avg_pool2d(fields, BLOCK)
    wide = [risen(box_mean(blocks, side)) for side in COARSE[:-1]]
    fine = [_square_mean(fields, side) for side in FINE]
    return [*fine, *wide]


def _square_mean(field: Float[Tensor, "n channel Y X"], side: int) -> Float[Tensor, "n channel Y X"]:
    """As `box_mean`, cell after cell of each square.

    Where rain is even, its spread is the rounding of these sums, which trained weights have seen: those of
    `avg_pool2d`, bit for bit, which takes twice as long on a CPU.
    """
    if side == 1:
        return field
    margin, (rows, columns) = side // 2, field.shape[2:]
    framed = F.pad(field, (margin,) * 4)
    shifts = product(range(side), repeat=2)
    first, second, *others = (framed[..., y : y + rows, x : x + columns] for y, x in shifts)
    total = first + second
    for other in others:
        total += other
    return total / side**2
