"""`Head`: back to full resolution, and to a distribution over rain bins: `Categorical` or `Ordinal`."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metnet.lead_time import FiLM
from metnet.pointwise import Pointwise
from metnet.rain import RainBins, log_tails

DRY_SHARE = 0.85  # of pixels and times, before anything is learned


@runtime_checkable  # the tests check types, protocols too, on every call
class Link(Protocol):
    """How a distribution over K classes is spelt in numbers that may be anything."""

    def count(self, classes: int) -> int:
        """How many numbers K classes take."""
        ...

    def numbers(
        self, log_probability: Float[Tensor, "batch lead bin y x"]
    ) -> Float[Tensor, "batch lead number y x"]:
        """The numbers of a distribution that sums to 1 and in which no class is impossible."""
        ...

    def logits(self, numbers: Float[Tensor, "batch lead number y x"]) -> Float[Tensor, "batch lead bin y x"]:
        """Unnormalised log-probabilities of the classes, whatever the numbers are."""
        ...


@dataclass(frozen=True)
class Categorical:
    """One logit for each class; classes know nothing of their order (MetNet)."""

    def count(self, classes: int) -> int:
        """As many as classes."""
        return classes

    def numbers(
        self, log_probability: Float[Tensor, "batch lead bin y x"]
    ) -> Float[Tensor, "batch lead bin y x"]:
        """The logarithms themselves."""
        return log_probability

    def logits(self, numbers: Float[Tensor, "batch lead bin y x"]) -> Float[Tensor, "batch lead bin y x"]:
        """The numbers themselves."""
        return numbers


@dataclass(frozen=True)
class Ordinal:
    """The logit of rain at all, then how far each further exceedance's logit lies below the one before.

    Number 0 is the logit c_1 of P(class >= 1); number k makes the step c_k - c_(k+1) = softplus(number k). So
    exceedances fall from class to class whatever the numbers are, and the first number moves all of them.
    """

    def count(self, classes: int) -> int:
        """One for each edge between two classes."""
        return classes - 1

    def numbers(
        self, log_probability: Float[Tensor, "batch lead bin y x"]
    ) -> Float[Tensor, "batch lead number y x"]:
        """c_1, and for each class between others log P(k) - log P(< k) - log P(> k).

        With A, p, B the shares below, in and above class k, exp(step) - 1 = (p + B)(A + p) / (A B) - 1 =
        p / (A B): exact even where p is too small to be seen in the difference of two logits.
        """
        above, below = log_tails(log_probability)
        first = above[:, :, :1] - below[:, :, :1]
        steps = log_probability[:, :, 1:-1] - below[:, :, :-1] - above[:, :, 1:]
        return torch.cat([first, steps], dim=2)

    def logits(self, numbers: Float[Tensor, "batch lead number y x"]) -> Float[Tensor, "batch lead bin y x"]:
        """For each class log P(k) = log s(c_k) + log s(-c_(k+1)) + log s(number k), s being the logistic."""
        steps = numbers[:, :, 1:]
        exceeded = torch.cat([numbers[:, :, :1], -F.softplus(steps)], dim=2).cumsum(dim=2)
        above, below = F.logsigmoid(exceeded), F.logsigmoid(-exceeded)
        between = above[:, :, :-1] + below[:, :, 1:] + F.logsigmoid(steps)
        return torch.cat([below[:, :, :1], between, above[:, :, -1:]], dim=2)


class Head(nn.Module):
    """Back to full resolution, pixel for pixel, and to the numbers that spell a distribution.

    Before anything is learned it says `usual`, the same numbers everywhere; without, beside a prior, it says
    `count` zeros.
    """

    def __init__(
        self, channels: int, fine_channels: int, features: int, count: int, usual: list[float] | None
    ):
        super().__init__()
        self.rise = nn.Conv2d(channels, 4 * fine_channels, 1)
        self.tell = FiLM(features, fine_channels)
        self.mix = nn.Conv2d(fine_channels, fine_channels, 3, padding=1)
        self.classify = Pointwise(fine_channels, count)
        nn.init.normal_(self.classify.weight, std=0.0 if usual is None else 0.01)
        start = torch.zeros(count) if usual is None else torch.tensor(usual)
        self.classify.bias = nn.Parameter(start)

    def forward(
        self,
        coarse: Float[Tensor, "sample channel rows columns"],
        fine: Float[Tensor, "sample fine y x"],
        told: Float[Tensor, "sample feature"],
    ) -> Float[Tensor, "sample number y x"]:
        """The numbers from the map at a quarter of the resolution and the one at full resolution."""
        risen = F.pixel_shuffle(self.rise(coarse), 2)
        risen = F.interpolate(risen, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.gelu(risen + self.tell(fine, told))
        x = x + F.gelu(self.mix(x))
        numbers: Tensor = self.classify(x)
        return numbers.to(torch.promote_types(numbers.dtype, torch.float32))  # tails want more than bfloat16


def climatology(bins: RainBins) -> list[float]:
    """The share of each class when nothing is known: dry mostly, wet with an exponential tail of 2 mm/h."""
    knots = (*bins.edges, bins.top)
    above = [math.exp(-rate / 2) for rate in knots]
    wet = [low - high for low, high in pairwise(above)]
    floor = 1e-3 / len(wet)  # no class is impossible
    wet = [share + floor for share in wet]
    return [DRY_SHARE, *((1 - DRY_SHARE) * share / sum(wet) for share in wet)]


def spelt(link: Link, shares: list[float]) -> list[float]:
    """The numbers of a distribution that is the same everywhere."""
    logarithm = torch.tensor(shares, dtype=torch.float64).log().float()
    numbers: list[float] = link.numbers(logarithm.reshape(1, 1, -1, 1, 1)).flatten().tolist()
    return numbers
