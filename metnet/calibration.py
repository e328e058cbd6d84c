"""`Calibration`: probabilities made to agree with how often rain then came, by threshold and lead time.

The logit of exceeding each edge between the classes of rain is carried along a line (Platt 1999,
"Probabilistic outputs for support vector machines", here on a network's own logit), whose offset and slope
move with the logarithm of the lead time. It changes how sure a forecast is, not where it rains, and can be
undone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor

from metnet.rain import BinnedForecast, RainBins

REFERENCE = 20.0  # minutes at which offset and slope are their `level`
ALIKE = 20_000.0  # pixels of one event err together: so many of them tell as much as one
DOUBT = 0.3  # how far from leaving all as it is the numbers may lie before anything is seen
LEAST, MOST = 1e-6, 1 - 1e-6  # probabilities that a logit is taken of
CELLS_AT_ONCE = 2**14  # bands of this size stay in a processor's cache
STEPS = 40  # of the fit, which is nearly quadratic


@dataclass(frozen=True)
class Exceedances:
    """What was said at single pixels, and what fell there."""

    above: Float[Tensor, "pixel edge"]  # P(rate >= edge) for each edge between the classes
    lead_time: Float[Tensor, "pixel"]  # minutes
    fell: Int[Tensor, "pixel"]  # the class that was observed

    @staticmethod
    def joined(parts: "Sequence[Exceedances]") -> "Exceedances":
        """All pixels of the parts."""
        names = [field.name for field in fields(Exceedances)]
        return Exceedances(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def happened(self) -> Float[Tensor, "pixel edge"]:
        """1 where the rate reached the edge, else 0."""
        return (self.fell[:, None] > torch.arange(self.above.shape[1])).to(self.above)


@dataclass(frozen=True)
class Calibration:
    """For each edge between the classes, in rising order: logit q = c + shift + slope · (logit p - c).

    c is the edge's `centre`. At a lead time t the shift is `level[0] + drift[0] · s` and the logarithm of the
    slope `level[1] + drift[1] · s`, s = log(t / 20 min), held at the ends of the lead times it was fitted on.
    Where lines of neighbouring edges would cross, the higher edge is no likelier than the lower.
    """

    centre: tuple[float, ...]  # logit of how often each edge is reached, about which its line turns

    level: tuple[tuple[float, float], ...]  # of each edge: shift, logarithm of the slope
    drift: tuple[tuple[float, float], ...]  # for each factor of e in lead time
    lead_times: tuple[float, float]  # minutes, from and to

    def __call__(self, forecast: BinnedForecast, lead_time: Float[Tensor, "lead"]) -> BinnedForecast:
        """The calibrated forecast; `lead_time` in minutes."""
        return self.in_place(replace(forecast, probability=forecast.probability.clone()), lead_time)

    def in_place(self, forecast: BinnedForecast, lead_time: Float[Tensor, "lead"]) -> BinnedForecast:
        """The same in the memory of the forecast, which is not to be used any more; a few rows at once."""
        moved = [pair != ((0.0, 0.0), (0.0, 0.0)) for pair in zip(self.level, self.drift, strict=True)]
        if not any(moved):
            return forecast
        first = moved.index(True)  # classes below this edge stay as they are
        calibrated = forecast.probability
        batch, _, _, _, columns = calibrated.shape
        rows = max(1, CELLS_AT_ONCE // (batch * columns))
        for index, minutes in enumerate(lead_time):
            for band in torch.split(calibrated[:, index : index + 1, first:], rows, dim=3):
                band.copy_(self._moved(band, minutes, first))
        return BinnedForecast(calibrated, forecast.bins)

    def _moved(
        self, said: Float[Tensor, "batch lead bin y x"], lead_time: Float[Tensor, ""], first: int
    ) -> Float[Tensor, "batch lead bin y x"]:
        """The classes around the edges from `first` on, calibrated; together they are as likely as before."""
        offset, slope = self.line(lead_time[None])[:, first:].to(said)[..., None, None].unbind(dim=2)
        reached = torch.addcmul(offset, slope, above(said).clamp(LEAST, MOST).logit()).sigmoid()
        return _classes(_falling(torch.cat([said.sum(dim=2, keepdim=True), reached], dim=2)))

    def line(self, lead_time: Float[Tensor, "lead"]) -> Float[Tensor, "lead edge 2"]:
        """Offset and slope of each edge at each lead time (minutes): logit q = offset + slope · logit p."""
        level, drift, centre = (torch.tensor(part) for part in (self.level, self.drift, self.centre))
        later = (lead_time.cpu().clamp(*self.lead_times) / REFERENCE).log()[:, None, None]
        shift, logarithm = (level + drift * later).unbind(dim=2)
        slope = logarithm.exp()
        return torch.stack([centre + shift - slope * centre, slope], dim=2)

    @classmethod
    def fitted(cls, said: Exceedances, alike: float = ALIKE) -> "Calibration":
        """The lines that make what fell likeliest, edge by edge; without events they leave all as it is.

        `alike` pixels tell as much as one.

        Raises:
            ValueError: if there are no pixels.
        """
        count, edges = said.above.shape
        if not count:
            raise ValueError("no observed pixel to calibrate on")
        happened = said.happened().double()
        centre = ((happened.sum(dim=0) + 0.5) / (count + 1)).logit()
        logit = said.above.double().clamp(LEAST, MOST).logit() - centre
        later = (said.lead_time.double() / REFERENCE).log()[:, None]
        numbers = torch.zeros(4, edges, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([numbers], max_iter=STEPS, line_search_fn="strong_wolfe")

        def cost() -> Tensor:
            optimizer.zero_grad()
            slope = (numbers[1] + numbers[3] * later).exp()
            line = centre + numbers[0] + numbers[2] * later + slope * logit
            unlikely = F.binary_cross_entropy_with_logits(line, happened, reduction="sum") / count
            total = unlikely + alike / count * (numbers**2).sum() / (2 * DOUBT**2)
            torch.autograd.backward(total)
            return total

        optimizer.step(cost)  # type: ignore[no-untyped-call]
        level, drift = (
            [tuple(pair) for pair in part.T.tolist()] for part in torch.split(numbers.detach(), 2)
        )
        ends = (float(said.lead_time.min()), float(said.lead_time.max()))
        return cls(tuple(centre.tolist()), tuple(level), tuple(drift), ends)

    def of(self, said: Exceedances) -> Exceedances:
        """The same pixels, calibrated."""
        offset, slope = self.line(said.lead_time).unbind(dim=2)
        line = offset + slope * said.above.clamp(LEAST, MOST).logit()
        return Exceedances(torch.sigmoid(line).cummin(dim=1).values, said.lead_time, said.fell)

    def only(self, kept: Sequence[bool]) -> "Calibration":
        """The same for some of the edges; the others are left as they are."""
        nothing = (0.0, 0.0)
        level, drift = (
            tuple(pair if keep else nothing for pair, keep in zip(part, kept, strict=True))
            for part in (self.level, self.drift)
        )
        return replace(self, level=level, drift=drift)

    def card(self) -> dict[str, Any]:
        """What a model file says of it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_card(cls, card: Mapping[str, Any], edges: int) -> "Calibration":
        """The calibration of a model file.

        Raises:
            ValueError: if it is none, or for another number of edges between classes.
        """
        try:
            level, drift = (tuple((float(a), float(b)) for a, b in card[name]) for name in ("level", "drift"))
            centre = tuple(float(logit) for logit in card["centre"])
            first, last = (float(minutes) for minutes in card["lead_times"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"calibration: expected what a run of metnet train writes, got {card}"
            ) from error
        numbers = [number for part in (centre, *level, *drift) for number in part]
        whole = {len(centre), len(level), len(drift)} == {edges}
        if not whole or not all(map(math.isfinite, numbers)) or not 0 < first <= last < math.inf:
            raise ValueError(
                f"calibration: expected finite numbers for each of {edges} edges between classes and rising "
                f"lead times, got {card}; the file is damaged or not of this model"
            )
        return cls(centre, level, drift, (first, last))


def undone(
    probability: Float[Tensor, "*shape"], offset: Float[Tensor, "*#shape"], slope: Float[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    """The probability that a line of a `Calibration` was applied to; NaN stays NaN."""
    return torch.sigmoid((probability.clamp(LEAST, MOST).logit() - offset) / slope)


def exceedances(
    forecast: BinnedForecast,
    lead_time: Float[Tensor, "lead"],
    target: Float[Tensor, "batch lead y x"],
    count: int,
    generator: torch.Generator,
) -> Exceedances:
    """Some observed pixels, `count` of each sample and lead time at most; `target` in mm/h."""
    parts = []
    fell = forecast.bins.classify(target)
    for index, minutes in enumerate(lead_time):
        reached = above(forecast.probability[:, index : index + 1])[:, 0].movedim(1, -1)
        for said, classes in zip(reached, fell[:, index], strict=True):
            there = (classes >= 0).nonzero()
            some = there[torch.randperm(len(there), generator=generator)[:count]].unbind(dim=1)
            parts.append(Exceedances(said[some], minutes.expand(len(some[0])), classes[some]))
    return Exceedances.joined(parts)


def cost(said: Exceedances) -> Float64[Tensor, "edge"]:
    """For each edge the mean over pixels of the binary cross-entropy (nats), as `loss.ordinal` sums it."""
    each = F.binary_cross_entropy(
        said.above.double().clamp(LEAST, MOST), said.happened().double(), reduction="none"
    )
    return each.mean(dim=0)


def identity(bins: RainBins) -> Calibration:
    """The calibration that leaves all as it is."""
    nothing = ((0.0, 0.0),) * len(bins.edges)
    return Calibration((0.0,) * len(bins.edges), nothing, nothing, (REFERENCE, REFERENCE))


def above(probability: Float[Tensor, "batch lead bin y x"]) -> Float[Tensor, "batch lead edge y x"]:
    """P(rate >= edge) for each edge between the classes."""
    first, *others = probability[:, :, 1:].flip(2).unbind(dim=2)
    sums = [first]
    for other in others:
        sums.append(sums[-1] + other)
    return torch.stack(sums[::-1], dim=2)


def _falling(reached: Float[Tensor, "batch lead edge y x"]) -> Float[Tensor, "batch lead edge y x"]:
    """No probability higher than that of a lower edge."""
    first, *others = reached.unbind(dim=2)
    edges = [first]
    for other in others:
        edges.append(torch.minimum(edges[-1], other))
    return torch.stack(edges, dim=2)


def _classes(reached: Float[Tensor, "batch lead edge y x"]) -> Float[Tensor, "batch lead bin y x"]:
    """The probability of each class from those of exceeding its lower edge."""
    return -reached.diff(dim=2, append=0 * reached[:, :, :1])
