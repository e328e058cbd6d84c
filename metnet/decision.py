"""`own_cut`: from which probability on a forecaster says yes, so that it expects the highest CSI of itself.

The critical success index (CSI) is hits / (hits + misses + false alarms), each summed over all pixels of all
runs. A forecaster that says yes at n pixels, whose probabilities add up to h, of R over all pixels, expects
about h / (n + R - h): the ratio of the expectations, for the expectation of the ratio. Of calibrated
probabilities no other decision is better than one cut for all pixels that are pooled, and the best cut lies
at CSI / (1 + CSI) of the highest CSI (Lipton et al. 2014, arXiv:1402.1892, theorem 1, which tells it of
F1 = 2 CSI / (1 + CSI)). A cut for each field would say yes all over a field of tiny probabilities, whose
false alarms the other fields then pay. What was observed is not asked for.
"""

from jaxtyping import Float64, Int64
from torch import Tensor

# No best cut lies above one half, where CSI is 1. A probability below the first, 1/8192, never says yes.
# Seven per cent apart, a cut costs next to nothing, and the shares of 24 members lie apart.
CUTS = tuple(0.5 * 2 ** (-step / 10) for step in range(120, -1, -1))


def own_cut(
    count: Float64[Tensor, "lead class"], probability: Float64[Tensor, "lead class"]
) -> Int64[Tensor, "lead"]:
    """The first class that says yes, as do all above it; the lowest class never does.

    `count` holds the pixels of each class of probability, rising; `probability` their sum of probabilities.
    """
    hits = _and_above(probability)[:, 1:]
    expected = hits / (_and_above(count)[:, 1:] + probability.sum(dim=1, keepdim=True) - hits)
    return 1 + expected.nan_to_num(nan=0.0).argmax(dim=1)


def _and_above(part: Float64[Tensor, "lead class"]) -> Float64[Tensor, "lead class"]:
    """The sum over each class and all above it."""
    return part.flip(1).cumsum(1).flip(1)
