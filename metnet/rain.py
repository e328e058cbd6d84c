"""`RainForecast`: a distribution of rain rate per lead time and pixel, however it is held.

`BinnedForecast` is what a network says (a probability for each class of `RainBins`);
`EnsembleForecast` is what members say (one member: a deterministic forecast);
`TabulatedForecast` is what a forecast store keeps (exceedances and quantiles).
All rates are mm/h. NaN is "no forecast", never "dry".
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Field = Float[Tensor, "batch lead y x"]

_PIXELS_AT_ONCE = 50_000  # sorting the points of a whole country at once would take several GB


@runtime_checkable  # the tests check types, protocols too, on every call
class RainForecast(Protocol):
    """A distribution of rain rate (mm/h) at every `batch lead y x`."""

    def probability_above(self, threshold: float) -> Field:
        """P(rate >= threshold), with the threshold in mm/h."""
        ...

    def quantile(self, level: float) -> Field:
        """The rate (mm/h) that is not exceeded with probability `level` in (0, 1)."""
        ...

    def mean(self) -> Field:
        """The expected rate (mm/h)."""
        ...

    def crps(self, observed: Field) -> Field:
        """The continuous ranked probability score (mm/h) of each pixel; NaN where unobserved.

        The integral of (F(r) - 1[observed <= r])^2 over r >= 0 (Gneiting & Raftery 2007, eq. 20).
        """
        ...


@dataclass(frozen=True)
class RainBins:
    """Classes of rain rate: [0, edges[0]) is dry (0 mm/h), then [edges[i], edges[i+1]), the last up to `top`.

    Within a wet class every rate is equally likely.
    """

    edges: Sequence[float | int]  # mm/h, rising; the lower edges of the wet classes; held as a tuple
    top: float | int  # mm/h; the upper edge of the last class, where rarer rain is counted too

    def __post_init__(self) -> None:
        """Refuses edges that do not rise from above 0 to `top`; a list, as YAML has it, becomes a tuple."""
        object.__setattr__(self, "edges", tuple(float(edge) for edge in self.edges))
        knots = [0.0, *self.edges, self.top]
        if not all(a < b < math.inf for a, b in pairwise(knots)):
            raise ValueError(
                f"edges={self.edges}, top={self.top}: expected rates in mm/h that rise from above 0"
            )

    @classmethod
    def preferred(cls) -> "RainBins":
        """Nineteen wet classes in 1-2-5 steps and finer, which hold the usual thresholds exactly."""
        edges = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 75, 100)
        return cls(edges=tuple(float(edge) for edge in edges), top=150.0)

    @classmethod
    def linear(cls, width: float = 0.2, count: int = 512) -> "RainBins":
        """MetNet's classes: 512 of 0.2 mm/h (Sonderby et al. 2020, arXiv:2003.12140)."""
        edges = tuple(round(width * i, 6) for i in range(1, count))
        return cls(edges=edges, top=round(width * count, 6))

    def __len__(self) -> int:
        """The number of classes, the dry one included."""
        return len(self.edges) + 1

    def classify(self, rate: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The class of each rate (mm/h); -1 where NaN."""
        edges = torch.tensor(self.edges, dtype=rate.dtype, device=rate.device)
        index = torch.bucketize(rate.contiguous(), edges, right=True)
        return torch.where(rate.isnan(), torch.full_like(index, -1), index)


@dataclass(frozen=True)
class BinnedForecast:
    """The probability of each class of `RainBins`."""

    probability: Float[Tensor, "batch lead bin y x"]  # sums to 1 over bin
    bins: RainBins

    def __post_init__(self) -> None:
        """Refuses probabilities of another number of classes."""
        if self.probability.shape[2] != len(self.bins):
            raise ValueError(
                f"probability has {self.probability.shape[2]} classes, bins has {len(self.bins)}"
            )

    def probability_above(self, threshold: float) -> Field:
        """P(rate >= threshold); linear within a class."""
        if threshold <= 0:
            return self.probability.sum(dim=2)
        knots = (0.0, *self.bins.edges, self.bins.top)
        place = bisect_right(knots, threshold) - 1  # the class that the threshold cuts
        if place == 0:  # within the dry class, whose rate is 0
            return self.probability[:, :, 1:].sum(dim=2)
        if place > len(self.bins.edges):
            return torch.zeros_like(self.probability[:, :, 0]) * self.probability[:, :, 0]  # NaN stays NaN
        above = (knots[place + 1] - threshold) / (knots[place + 1] - knots[place])
        return self.probability[:, :, place] * above + self.probability[:, :, place + 1 :].sum(dim=2)

    def quantile(self, level: float) -> Field:
        """The rate at which the cumulated probability reaches `level`."""
        cumulated = self._cumulated
        place = (cumulated < level).sum(dim=2, keepdim=True).clamp(max=len(self.bins) - 1)
        knots = torch.tensor((0.0, *self.bins.edges, self.bins.top)).to(cumulated)
        high = cumulated.gather(2, place)
        low = cumulated.gather(2, (place - 1).clamp(min=0))
        share = ((level - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        rate = knots[place] + (knots[place + 1] - knots[place]) * share
        dry = torch.where(high.isnan(), high, 0.0)
        return torch.where(place == 0, dry, rate)[:, :, 0]

    def mean(self) -> Field:
        """The expected rate: each class counts with its midpoint, dry with 0."""
        lower = torch.tensor((0.0, *self.bins.edges))
        upper = torch.tensor((0.0, *self.bins.edges[1:], self.bins.top))
        middle = ((lower + upper) / 2).to(self.probability)
        return torch.einsum("b l k y x, k -> b l y x", self.probability, middle)

    def crps(self, observed: Field) -> Field:
        """The score of the piecewise linear distribution function, in closed form."""
        return _crps(observed, *self._knots())

    @cached_property
    def _cumulated(self) -> Float[Tensor, "batch lead bin y x"]:
        return self.probability.cumsum(dim=2).clamp(max=1)

    def _knots(self) -> tuple[list[Tensor], list[Tensor]]:
        cumulated = self._cumulated.unbind(dim=2)
        rates = (0.0, *self.bins.edges, self.bins.top)
        # dry is exactly 0 mm/h: the distribution function is flat up to the first wet class
        return [torch.tensor(rate).to(cumulated[0]) for rate in rates], [cumulated[0], *cumulated]


@dataclass(frozen=True)
class EnsembleForecast:
    """Equally likely members; a single member is a deterministic forecast."""

    members: Float[Tensor, "batch member lead y x"]  # mm/h

    def probability_above(self, threshold: float) -> Field:
        """The share of members at or above the threshold; NaN where any member is."""
        share = (self.members >= threshold).to(self.members.dtype).mean(dim=1)
        return share.masked_fill(self.members.isnan().any(dim=1), torch.nan)

    def quantile(self, level: float) -> Field:
        """Linear between the sorted members (Hyndman & Fan 1996, type 7)."""
        ordered = self.members.sort(dim=1).values  # NaN last
        place = level * (ordered.shape[1] - 1)
        below = int(place)
        above = min(below + 1, ordered.shape[1] - 1)
        between = torch.lerp(ordered[:, below], ordered[:, above], place - below)
        return between.masked_fill(ordered[:, -1].isnan(), torch.nan)

    def mean(self) -> Field:
        """The mean over the members."""
        return self.members.mean(dim=1)

    def crps(self, observed: Field) -> Field:
        """E|X - y| - E|X - X'| / 2 over the members (Gneiting & Raftery 2007, eq. 21)."""
        return self._distance(observed) - self._spread()

    def fair_crps(self, observed: Field) -> Field:
        """What the score would be, on average, with endlessly many such members (Ferro 2014, eq. 6).

        A single member says nothing of that; its score stays what it is.
        """
        count = self.members.shape[1]
        return self._distance(observed) - self._spread() * (count / (count - 1) if count > 1 else 1)

    def _distance(self, observed: Field) -> Field:
        """E|X - y|."""
        return (self.members - observed[:, None]).abs().mean(dim=1)

    def _spread(self) -> Field:
        """E|X - X'| / 2 of two members drawn with repetition."""
        count = self.members.shape[1]
        ordered = self.members.sort(dim=1).values
        rank = torch.arange(1, count + 1, dtype=ordered.dtype, device=ordered.device)
        return torch.einsum("b m l y x, m -> b l y x", ordered, (2 * rank - count - 1) / count**2)


@dataclass(frozen=True)
class TabulatedForecast:
    """A distribution known at some thresholds and some levels, as a forecast store keeps it."""

    thresholds: tuple[float, ...]  # mm/h
    exceedance: Float[Tensor, "batch lead threshold y x"]  # P(rate >= threshold)
    levels: tuple[float, ...]
    quantiles: Float[Tensor, "batch lead level y x"]  # mm/h
    average: Field  # mm/h

    def probability_above(self, threshold: float) -> Field:
        """As stored; linear between the known points for other thresholds."""
        if threshold in self.thresholds:
            return self.exceedance[:, :, self.thresholds.index(threshold)]
        return 1 - _cdf_at(threshold, *self._knots())

    def quantile(self, level: float) -> Field:
        """As stored; linear between the known points for other levels."""
        if level in self.levels:
            return self.quantiles[:, :, self.levels.index(level)]
        return _quantile(level, *self._knots())

    def mean(self) -> Field:
        """The expected rate as stored."""
        return self.average

    def crps(self, observed: Field) -> Field:
        """The score of the known points joined by lines; what lies above the last one sits on it."""
        rows = max(1, _PIXELS_AT_ONCE * observed.shape[2] // max(1, observed.numel()))
        blocks = zip(
            torch.split(observed, rows, dim=2),
            torch.split(self.exceedance, rows, dim=3),
            torch.split(self.quantiles, rows, dim=3),
            strict=True,
        )
        return torch.cat([_crps(seen, *self._joined(*known)) for seen, *known in blocks], dim=2)

    def _knots(self) -> tuple[list[Tensor], list[Tensor]]:
        return self._joined(self.exceedance, self.quantiles)

    def _joined(self, exceedance: Tensor, quantiles: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """All known points of the distribution function: both kinds rise, so each is sorted alone."""
        thresholds = torch.tensor(self.thresholds).to(exceedance)
        levels = torch.tensor(self.levels).to(quantiles)
        shape = (1, 1, -1, 1, 1)
        rates = torch.cat([thresholds.view(shape).expand_as(exceedance), quantiles], dim=2)
        cdf = torch.cat([1 - exceedance, levels.view(shape).expand_as(quantiles)], dim=2)
        # sorting parts a NaN from the point it belongs to, so one unknown point makes all unknown
        unknown = (rates + cdf).isnan().any(dim=2, keepdim=True)
        rates, cdf = rates.sort(dim=2).values, cdf.sort(dim=2).values.masked_fill(unknown, torch.nan)
        zero = torch.zeros_like(rates[:, :, 0]).masked_fill(unknown[:, :, 0], torch.nan)
        return (
            [zero, *rates.unbind(dim=2), rates[:, :, -1]],
            [zero, *cdf.unbind(dim=2), zero + 1],
        )


def log_tails(
    logits: Float[Tensor, "batch lead bin y x"],
) -> tuple[Float[Tensor, "batch lead edge y x"], Float[Tensor, "batch lead edge y x"]]:
    """The logarithms of P(at or above) and P(below) each edge between classes; exact on both tails."""
    first, *others = logits.log_softmax(dim=2).unbind(dim=2)
    return _running(others[::-1]).flip(2), _running([first, *others[:-1]])


def _running(logarithms: Sequence[Tensor]) -> Tensor:
    """Logarithms of running sums; class by class, as `logcumsumexp` takes ten times as long on a CPU."""
    sums = [logarithms[0]]
    for logarithm in logarithms[1:]:
        sums.append(torch.logaddexp(sums[-1], logarithm))
    return torch.stack(sums, dim=2)


def tabulated(
    forecast: RainForecast, thresholds: Sequence[float], levels: Sequence[float]
) -> TabulatedForecast:
    """What a table of these thresholds (mm/h) and levels keeps of a forecast."""
    exceedance = torch.stack([forecast.probability_above(threshold) for threshold in thresholds], dim=2)
    quantiles = torch.stack([forecast.quantile(level) for level in levels], dim=2)
    return TabulatedForecast(tuple(thresholds), exceedance, tuple(levels), quantiles, forecast.mean())


def _cdf_at(threshold: float, rates: Sequence[Tensor], cdf: Sequence[Tensor]) -> Tensor:
    """P(rate < threshold) of a distribution function that is linear between its knots."""
    result = cdf[0]
    for a, b, low, high in zip(rates, rates[1:], cdf, cdf[1:], strict=False):
        share = ((threshold - a) / (b - a).clamp(min=1e-12)).clamp(0, 1)
        result = torch.where(threshold > a, low + (high - low) * share, result)
    return result


def _quantile(level: float, rates: Sequence[Tensor], cdf: Sequence[Tensor]) -> Tensor:
    """The rate at which a distribution function that is linear between its knots reaches `level`."""
    result = rates[0]
    for a, b, low, high in zip(rates, rates[1:], cdf, cdf[1:], strict=False):
        share = ((level - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        # "not at or below" rather than "above": where low is NaN there is no forecast, and no rate of 0
        result = torch.where(level <= low, result, a + (b - a) * share)
    return result


def _crps(observed: Tensor, rates: Sequence[Tensor], cdf: Sequence[Tensor]) -> Tensor:
    """The integral of (F(r) - 1[observed <= r])^2, piece by piece, each piece cut at the observation."""

    def squared(low: Tensor, high: Tensor, width: Tensor) -> Tensor:
        return (low * low + low * high + high * high) / 3 * width

    total = (observed - rates[-1]).clamp(min=0)
    for a, b, low, high in zip(rates, rates[1:], cdf, cdf[1:], strict=False):
        cut = torch.minimum(torch.maximum(observed, a), b)
        at_cut = low + (high - low) * (cut - a) / (b - a).clamp(min=1e-12)
        total = total + squared(low, at_cut, cut - a) + squared(1 - at_cut, 1 - high, b - cut)
    return total
