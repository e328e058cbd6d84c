"""`Local`: what a pixel's own surroundings in the carried frames tell beyond the prior, pixel by pixel.

A prior of neighbourhoods knows how wide to look at each lead time, not whether rain grows here, flickers from
frame to frame, or ends; and its classes stand where neighbours have them, never between. So some of each
pixel's probability is given to a few smooth distributions, whose place, spread and share a small perceptron
tells from such numbers (a mixture density network: Bishop 1994, Aston NCRG/94/004). It is fitted on single
pixels drawn from everywhere: it learns in a minute what convolutions over whole maps learn in hours, and has
too few weights to know an event by heart.
"""

import copy
import math
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from metnet.cascade import Continued, areas, decibel
from metnet.pointwise import Pointwise
from metnet.prior import BLOCK, FEWEST, NEAR, REFERENCE, AdvectionPrior, Pixels, means, risen
from metnet.rain import RainBins
from metnet.scaling import scaled_rain, unscaled_rain

PARTS = 2  # smooth distributions beside the prior
CLOSE = 3  # neighbourhoods whose rates the middle of a part may be a mean of
FARTHEST_SHIFT = 3.0  # of a middle, in the logarithm, off the mean of these rates
USUAL_WIDTH = -1.0  # logarithm of a part's width, before anything is learned
WIDTHS = (-3.0, 1.0)  # about the same; much wider ones have no mean
LEAST_RATE = 0.05  # mm/h, added to a rate before its logarithm is taken
SHUT = -12.0  # logit of a part's share, before anything is learned
AJAR = -3.0  # and where a fit begins
POOL = (-0.57, 0.885)  # of `chances`: logit of the share after 20 minutes, and slope by their logarithm
SEEN, LATER = 5, -4  # places in what is told: behind the rates, is it observed; log(minutes ahead / 20)
IMPOSSIBLE = 1e-9  # a probability that differences of others may miss
WET = 0.03  # scaled: 0.13 mm/h
RATES = (0.1, 0.5, 2.0, 5.0, 15.0)  # mm/h at which the prior's exceedance is told
LIKELIEST = 9.0  # of a logit of the prior that is told
FARTHEST = 8.0  # standard deviations; what lies farther counts as this far
AREA = 9  # blocks of 16 cells along a side of the area whose pace is told
UNKNOWN_PACE = 1.5  # where no rain tells it: a widening over 3 cells
DROPPED = 0.2  # share of the hidden numbers dropped in fitting
CELLS_AT_ONCE = 2**15  # bands of this size stay in a processor's cache
PIXELS_A_STEP = 8192
FOLLOWED = 0.02  # of each step, by the averaged weights
WEIGHT_DECAY = 0.1


def described(frames: int) -> int:
    """How many numbers `describe` tells of a pixel, of so many carried frames."""
    return 6 * len(NEAR) - 1 + 2 + (frames - 1) + 7 + 4


def known_rates(frames: int) -> int:
    """How many of them, the first, are scaled rates at or near the pixel."""
    return 2 * CLOSE + frames - 1 + 2


class Local(nn.Module):
    """Gives some of the prior's probability to other rates; next to none, before anything is learned.

    What it says is pooled with `metnet.chances.chances`, of which nothing is learned; by how much, is not
    learned either.

    Args:
        bins: the classes of rain.
        frames: how many carried frames are told of.
        hidden: width of the one hidden layer.
    """

    centre: Tensor
    spread: Tensor
    pool: Tensor

    def __init__(self, bins: RainBins, frames: int, hidden: int):
        super().__init__()
        self.classes = [_class_from(bins, rate) for rate in RATES]
        self.rates = known_rates(frames)
        inputs = described(frames) + len(RATES)
        self.register_buffer("centre", torch.zeros(inputs))
        self.register_buffer("spread", torch.ones(inputs))
        self.first = Pointwise(inputs, hidden)
        self.last = Pointwise(hidden, PARTS * (3 + self.rates))
        self.register_buffer("pool", torch.zeros(2))
        self._begin(SHUT)

    def forward(
        self,
        told: Float[Tensor, "sample feature Y X"],
        prior: Float[Tensor, "sample bin Y X"],
        likely: Float[Tensor, "sample bin Y X"],
        reached: Float[Tensor, "sample edge"],
    ) -> Float[Tensor, "sample bin Y X"]:
        """Log-probabilities of the classes, from what `describe` tells, those of the prior, and `chances`.

        `reached` are the rates (mm/h) from which on the sensor tells each class (`metnet.quantisation`).
        """
        rows = max(1, CELLS_AT_ONCE // (len(told) * told.shape[3]))
        parts = (torch.split(part, rows, dim=2) for part in (told, prior, likely))
        bands = ((here, said.exp(), some) for here, said, some in zip(*parts, strict=True))
        edges = reached[:, :, None, None]
        mixed = [self._mixed(self._hidden(here, said), here, said, some, edges) for here, said, some in bands]
        return torch.cat(mixed, dim=2)

    def fit(
        self, pixels: Pixels, prior: AdvectionPrior, steps: int, rate: float = 3e-3, seed: int = 0
    ) -> None:
        """Learns what makes the rain that fell at some pixels likelier than the prior has it.

        Raises:
            ValueError: if there are no pixels.
        """
        if not len(pixels):
            raise ValueError("no observed pixel to fit on")
        said = _said(prior, pixels)
        self._begin(AJAR)
        with torch.no_grad():
            inputs = self._inputs(_as_map(pixels.told), _as_map(said.exp()))
            self.centre.copy_(inputs.mean(dim=(0, 2, 3)))
            self.spread.copy_(inputs.std(dim=(0, 2, 3), correction=0).clamp(min=0.02))
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(self.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
        average = copy.deepcopy(self)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (0.005 + 0.5 * (1 + math.cos(math.pi * step / steps)))
            some = torch.randint(0, len(pixels), (PIXELS_A_STEP,), generator=generator)
            loss = self._cost(pixels.some(some), said[some], generator)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            with torch.no_grad():
                for kept, newest in zip(average.parameters(), self.parameters(), strict=True):
                    kept.lerp_(newest, max(FOLLOWED, 1 / (1 + step)))
        self.load_state_dict(average.state_dict())
        self.pool.copy_(torch.tensor(POOL))

    @torch.no_grad()
    def gain(self, pixels: Pixels, prior: AdvectionPrior) -> float:
        """By how much it makes what fell at some pixels likelier than the prior alone (nats a pixel)."""
        said = _said(prior, pixels)
        with_it = self._cost(pixels, said)
        return (F.nll_loss(said, pixels.fell) - with_it).item()

    def _cost(
        self,
        pixels: Pixels,
        said: Float[Tensor, "pixel bin"],
        dropping: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """The mean of -log P of what fell; of hidden numbers that are dropped, the others take the place."""
        told, likely, reached = (_as_map(part) for part in (pixels.told, pixels.likely, pixels.reached))
        maps = told, _as_map(said.exp()), likely, reached
        hidden = self._hidden(*maps[:2])
        if dropping is not None:
            kept = torch.rand(hidden.shape, generator=dropping) >= DROPPED
            hidden = hidden * kept / (1 - DROPPED)
        return F.nll_loss(self._mixed(hidden, *maps)[0, :, :, 0].T, pixels.fell)

    def _begin(self, share: float) -> None:
        """All parts alike, with such a logit of their share, around the mean of what is known."""
        with torch.no_grad():
            for weight in self.last.parameters():
                weight.zero_()
            self.last.get_parameter("bias")[2 * PARTS : 3 * PARTS] = share
            self.pool.copy_(torch.tensor([SHUT, 0.0]))

    def _hidden(
        self, told: Float[Tensor, "sample feature Y X"], prior: Float[Tensor, "sample bin Y X"]
    ) -> Float[Tensor, "sample hidden Y X"]:
        """The hidden layer; here and below `prior` are probabilities, no longer their logarithms."""
        inputs = self._inputs(told, prior).sub_(self.centre[:, None, None]).div_(self.spread[:, None, None])
        return F.gelu(self.first(inputs.clamp_(-FARTHEST, FARTHEST)))

    def _mixed(
        self,
        hidden: Float[Tensor, "sample hidden Y X"],
        told: Float[Tensor, "sample feature Y X"],
        prior: Float[Tensor, "sample bin Y X"],
        likely: Float[Tensor, "sample bin Y X"],
        reached: Float[Tensor, "sample edge #Y #X"],
    ) -> Float[Tensor, "sample bin Y X"]:
        """Log-probabilities of the prior, the parts and `chances` together.

        A part is a logistic distribution of log(rate + `LEAST_RATE`), with all below the first edge dry. Its
        middle is a weighted mean of the known rates, times a factor.
        """
        numbers = self.last(hidden)
        numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
        shift, width, share, weight = torch.split(numbers, [PARTS, PARTS, PARTS, PARTS * self.rates], dim=1)
        weights = rearrange(weight, "n (part rate) y x -> n part rate y x", part=PARTS).softmax(dim=2)
        middle = (weights * told[:, None, : self.rates]).sum(dim=2)
        place = (unscaled_rain(middle) + LEAST_RATE).log() + FARTHEST_SHIFT * (shift / FARTHEST_SHIFT).tanh()
        narrow = (-USUAL_WIDTH - width.clamp(*WIDTHS)).exp()  # one over the width
        shares = torch.cat([torch.zeros_like(share[:, :1]), share], dim=1).softmax(dim=1)
        edges = (reached + LEAST_RATE).log()
        above = torch.zeros_like(edges)
        for one in (slice(part, part + 1) for part in range(PARTS)):
            exceeded = torch.sigmoid((place[:, one] - edges) * narrow[:, one])
            above = torch.addcmul(above, exceeded, shares[:, 1:][:, one])
        whole = shares[:, 1:].sum(dim=1, keepdim=True)
        given = torch.cat([whole - above[:, :1], above[:, :-1] - above[:, 1:], above[:, -1:]], dim=1)
        learned = shares[:, :1] * prior + given.clamp(min=IMPOSSIBLE)
        level, slope = self.pool
        seen, later = told[:, self.rates + SEEN].unsqueeze(1), told[:, LATER].unsqueeze(1)
        return torch.lerp(learned, likely, seen * torch.sigmoid(level + slope * later)).log()

    def _inputs(
        self, told: Float[Tensor, "sample feature Y X"], prior: Float[Tensor, "sample bin Y X"]
    ) -> Float[Tensor, "sample input Y X"]:
        """What is told, and the logits of exceeding some rates by the prior."""
        said = prior.detach()
        ends = pairwise([*self.classes, said.shape[1]])
        between = torch.stack([said[:, low:high].sum(dim=1) for low, high in ends], dim=1)
        above = between.flip(1).cumsum(dim=1).flip(1)
        least = 1 / (1 + math.exp(LIKELIEST))
        return torch.cat([told, above.clamp(least, 1 - least).logit()], dim=1)


@torch.no_grad()
def _said(prior: AdvectionPrior, pixels: Pixels) -> Float[Tensor, "pixel bin"]:
    """Log-probabilities of the prior, some pixels at a time."""
    return torch.cat([prior.at(pixels.some(part)) for part in torch.split(torch.arange(len(pixels)), 2**16)])


def _as_map(pixels: Float[Tensor, "pixel channel"]) -> Float[Tensor, "1 channel pixel 1"]:
    """Single pixels as a map one pixel wide."""
    return pixels.T[None, :, :, None]


def _class_from(bins: RainBins, rate: float) -> int:
    """The class that begins nearest to a rate (mm/h)."""
    distances = [abs(math.log(edge / rate)) for edge in bins.edges]
    return 1 + distances.index(min(distances))


@torch.no_grad()
def describe(
    carried: Float[Tensor, "batch frame lead Y X"],
    ahead: Float[Tensor, "batch lead Y X"],
    age: Float[Tensor, "batch frame"],
    paces: Float[Tensor, "batch 2 Y X"],
    onward: Continued,
) -> Float[Tensor, "sample feature Y X"]:
    """What is known around each pixel at each lead time, of frames that were carried there; never NaN.

    For every neighbourhood of `NEAR` the mean of the scaled rate and its spread, the mean over the frames and
    how they differ, the trend from the oldest to the newest, and how much was observed; and what the cascade
    goes on to. The first are the rates at the pixel and close to it. Not the size of a cell, nor how fast the
    rain moves: where few events are learned from, such numbers name the event.

    Args:
        carried: mm/h, the newest first, in which an older frame fills what a newer one did not see.
        ahead: minutes that the first of them was carried, at each pixel.
        age: minutes, of the frames.
        paces: as `pace` tells them.
        onward: what the cascade goes on to, of each sample and lead time.
    """
    leads = carried.shape[2]
    frames = rearrange(carried, "batch frame lead y x -> (batch lead) frame y x")
    seen = (~frames.isnan()).to(frames.dtype)
    value = scaled_rain(frames) * seen
    count = seen.sum(dim=1, keepdim=True)
    mean = value.sum(dim=1, keepdim=True) / count.clamp(min=1)
    change = ((value**2).sum(dim=1, keepdim=True) / count.clamp(min=1) - mean**2).clamp(min=0).sqrt()
    ever = (count > 0).to(frames.dtype)
    wet = (value.amax(dim=1, keepdim=True) > WET).to(frames.dtype)
    both = seen[:, :1] * seen[:, -1:]
    trend = (value[:, :1] - value[:, -1:]) * both
    newest = value[:, :1]
    fields = torch.cat([seen[:, :1], newest, newest**2, ever, mean, change, wet, both, trend], dim=1)
    rates = [value[:, 1:], _highest(newest)]
    rates.append(scaled_rain(10 ** (onward.rain.clamp(-20, 22) / 10))[:, None])
    told = [count / frames.shape[1], *(part[:, None] / 10 for part in onward)]
    told.append((onward.rain - decibel(frames[:, 0]))[:, None] * seen[:, :1] / 10)
    for index, near in enumerate(means(fields)):
        share, rate, square, known, average, differ, rainy, shared, tend = torch.split(near, 1, dim=1)
        rate = rate / share.clamp(min=FEWEST)
        (rates if index < CLOSE else told).extend([rate, average / known.clamp(min=FEWEST)])
        told += [share, differ / known.clamp(min=FEWEST), tend / shared.clamp(min=FEWEST)]
        if index > 0:
            told.append((square / share.clamp(min=FEWEST) - rate**2).clamp(min=0).sqrt())
        if index >= len(NEAR) - 2:
            told.append(differ / (rainy + 0.05))
    told.append((rearrange(ahead, "batch lead y x -> (batch lead) 1 y x") / REFERENCE).log())
    rows, columns = frames.shape[2:]
    old = repeat(torch.log1p(age.mean(dim=1) / 5), "batch -> batch 1 y x", y=rows, x=columns)
    told.append(repeat(torch.cat([paces, old], dim=1), "batch c y x -> (batch lead) c y x", lead=leads))
    return torch.cat([*rates, *told], dim=1)


def _highest(field: Float[Tensor, "n 1 Y X"]) -> Float[Tensor, "n 1 Y X"]:
    """The highest value of the 5 x 5 cells around; pooling takes ten times as long on a CPU."""
    around = F.pad(field, (2, 2, 2, 2), value=-torch.inf)
    for dim in (2, 3):
        size = around.shape[dim] - 4
        around = reduce(torch.maximum, (around.narrow(dim, shift, size) for shift in range(5)))
    return around


@torch.no_grad()
def pace(frames: Float[Tensor, "batch frame Y X"]) -> Float[Tensor, "batch 2 Y X"]:
    """How fast the rain changes: as much as a widening over how many cells would change it (log2).

    Of frames carried to the init time, the newest first: what has changed since the frame before, and since
    the oldest, in areas of some 150 cells. Whoever widens a forecast as fast widens it rightly here.
    """
    seen = (~frames.isnan()).to(frames.dtype)
    value = scaled_rain(frames) * seen
    newest, here = value[:, :1], seen[:, :1]
    near = [rate / share.clamp(min=FEWEST) for rate, share in _pairs(means(torch.cat([newest, here], dim=1)))]
    told = []
    for older in (1, -1) if frames.shape[1] > 1 else (0, 0):
        past, there = value[:, older].unsqueeze(1), here * seen[:, older].unsqueeze(1)
        wet = ((newest > WET) | (past > WET)) * there
        costs = [(newest - other) ** 2 * wet for other in (past, *near[1:])]
        rain, changed, *widened = torch.split(
            areas(torch.cat([wet, *costs], dim=1), 4 * BLOCK, AREA), 1, dim=1
        )
        told.append(_width(changed, widened, rain))
    return risen(torch.cat(told, dim=1), 4 * BLOCK, frames.shape[2:])


def _pairs(fields: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(field[:, :1], field[:, 1:]) for field in fields]


def _width(changed: Tensor, widened: Sequence[Tensor], rain: Tensor) -> Tensor:
    """The logarithm (base 2) of the side at which a widening costs as much as was changed."""
    told = torch.full_like(changed, math.log2(NEAR[-1]))
    costs = [torch.zeros_like(changed), *widened]
    steps = list(pairwise(zip(NEAR, costs, strict=True)))
    for (narrow, less), (wide, more) in reversed(steps):
        part = ((changed - less) / (more - less).clamp(min=1e-9)).clamp(0, 1)
        between = math.log2(narrow) + part * math.log2(wide / narrow)
        told = torch.where(changed <= more, between, told)
    return torch.where(rain > 1e-3, told, torch.full_like(told, UNKNOWN_PACE))
