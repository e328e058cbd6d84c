"""Reliability: how often what was forecast happened (Murphy & Winkler 1977, doi:10.2307/2346866)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from metnet.rain import RainForecast
from metnet.scores.score import add_up_by_class


@dataclass(frozen=True)
class Curve:
    """A reliability diagram by lead time and bin of probability; NaN where a bin is empty."""

    probability: Float64[Tensor, "lead bin"]  # mean forecast probability
    frequency: Float64[Tensor, "lead bin"]  # how often the event then happened
    count: Float64[Tensor, "lead bin"]  # pixels


@dataclass(frozen=True)
class Reliability:
    """How far probabilities lie from the frequencies with which rain then came, on average: 0 is best.

    The expected calibration error over `bins` equal bins of probability, for rain at or above the
    threshold: the mean of |mean probability - observed frequency|, each bin weighted by its pixels.
    """

    threshold: float  # mm/h
    bins: int = 10

    @property
    def name(self) -> str:
        """Such as `Calibration error >= 1 mm/h`."""
        return f"Calibration error >= {self.threshold:g} mm/h"

    def sums(
        self, forecast: RainForecast, observed: Float[Tensor, "batch lead y x"]
    ) -> Float64[Tensor, "lead part"]:
        """For each bin the pixels, then for each the probabilities, then for each the events."""
        probability = forecast.probability_above(self.threshold)
        counted = ~(probability.isnan() | observed.isnan())
        said = probability.nan_to_num(nan=0.0)
        bin_ = (said * self.bins).long().clamp(0, self.bins - 1)
        return add_up_by_class(bin_, self.bins, counted, said, observed >= self.threshold)

    def value(self, sums: Float64[Tensor, "lead part"]) -> Float64[Tensor, "lead"]:
        """The expected calibration error."""
        count, probability, events = torch.split(sums, self.bins, dim=1)
        distance: Tensor = (probability - events).abs().sum(dim=1)
        return distance / count.sum(dim=1)

    def slope(self, sums: Float64[Tensor, "lead part"]) -> Float64[Tensor, "lead"]:
        """The slope of the line through the diagram's points that fits best, each weighted by its pixels.

        1 is best; below it the forecast is too sure of itself, above it not sure enough. The line is the
        regression line of the attributes diagram (Hsu & Murphy 1986, doi:10.1016/0169-2070(86)90048-8).
        NaN where only one bin holds anything.
        """
        count, probability, events = torch.split(sums, self.bins, dim=1)
        total = count.sum(dim=1, keepdim=True)
        away = probability / count.clamp(min=1) - probability.sum(dim=1, keepdim=True) / total
        above = events - count * events.sum(dim=1, keepdim=True) / total
        filled = (count > 0).sum(dim=1)
        slope: Tensor = (away * above).sum(dim=1) / (count * away.square()).sum(dim=1)
        return slope.masked_fill(filled < 2, torch.nan)

    def curve(self, sums: Float64[Tensor, "lead part"]) -> Curve:
        """The reliability diagram that the sums hold."""
        count, probability, events = torch.split(sums, self.bins, dim=1)
        return Curve(probability / count, events / count, count)
