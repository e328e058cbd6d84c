"""`cross_entropy`: the masked loss over rain bins (MetNet, arXiv 2003.12140, section 4)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metnet.rain import RainBins


def cross_entropy(
    logits: Float[Tensor, "batch lead bin y x"], target: Float[Tensor, "batch lead y x"], bins: RainBins
) -> Float[Tensor, ""]:
    """The mean of -log P(class that was observed), in nats, over the observed pixels.

    A target that is NaN contributes nothing; where all are, the loss is 0 and so is its gradient.
    """
    observed = bins.classify(target).flatten(0, 1)
    total = F.cross_entropy(logits.flatten(0, 1), observed, ignore_index=-1, reduction="sum")
    return total / (observed >= 0).sum().clamp(min=1)
