"""`cross_entropy`, `ordinal`, `crps`: masked losses over rain bins, for any head."""

from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metnet.rain import BinnedForecast, RainBins, log_tails


class Loss(Protocol):
    """What a forecast costs: its mean over the observed pixels.

    A target that is NaN contributes nothing; where all are, the loss is 0 and so is its gradient. A pixel of
    weight 2 counts as two pixels: with weights that are 1 / (how much more often it was drawn), the loss is
    that of pixels drawn evenly.
    """

    def __call__(
        self,
        logits: Float[Tensor, "batch lead bin y x"],
        target: Float[Tensor, "batch lead y x"],
        bins: RainBins,
        weights: Float[Tensor, "batch lead y x"] | None = None,
    ) -> Float[Tensor, ""]:
        """Of unnormalised log-probabilities of the classes, the target in mm/h."""
        ...


def cross_entropy(
    logits: Float[Tensor, "batch lead bin y x"],
    target: Float[Tensor, "batch lead y x"],
    bins: RainBins,
    weights: Float[Tensor, "batch lead y x"] | None = None,
) -> Float[Tensor, ""]:
    """-log P(class that was observed), in nats (MetNet, arXiv 2003.12140, section 4)."""
    observed = bins.classify(target).flatten(0, 1)
    score = F.cross_entropy(logits.flatten(0, 1), observed, ignore_index=-1, reduction="none")
    return _mean(score.view_as(target), target, weights)


def ordinal(
    logits: Float[Tensor, "batch lead bin y x"],
    target: Float[Tensor, "batch lead y x"],
    bins: RainBins,
    weights: Float[Tensor, "batch lead y x"] | None = None,
) -> Float[Tensor, ""]:
    """The sum over edges of the binary cross-entropy of "at or above it", in nats.

    The probability of exceeding an edge is that of all classes above, so it falls from edge to edge whatever
    the logits are. Unlike cross-entropy it knows that the class next to the true one is a small error.
    """
    above, below = log_tails(logits)
    observed = bins.classify(target)[:, :, None]  # -1 where NaN: below every edge, and then masked
    edge = torch.arange(1, len(bins), device=logits.device)[:, None, None]
    score = -torch.where(observed >= edge, above, below).sum(dim=2)
    return _mean(score, target, weights)


def crps(
    logits: Float[Tensor, "batch lead bin y x"],
    target: Float[Tensor, "batch lead y x"],
    bins: RainBins,
    weights: Float[Tensor, "batch lead y x"] | None = None,
) -> Float[Tensor, ""]:
    """The continuous ranked probability score (mm/h) of the bins, as `BinnedForecast.crps` has it."""
    score = BinnedForecast(logits.softmax(dim=2), bins).crps(target.nan_to_num(nan=0.0))
    return _mean(score, target, weights)


def _mean(
    score: Float[Tensor, "batch lead y x"],
    target: Float[Tensor, "batch lead y x"],
    weights: Float[Tensor, "batch lead y x"] | None,
) -> Float[Tensor, ""]:
    """The weighted mean of finite scores over the pixels whose target was observed."""
    counts = (~target.isnan()).to(score.dtype)
    if weights is not None:
        counts = counts * weights
    return (score * counts).sum() / counts.sum().clamp(min=torch.finfo(score.dtype).tiny)
