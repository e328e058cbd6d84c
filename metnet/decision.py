"""`own_cut`: from which probability on a forecast says yes, so that it expects the highest CSI of itself.

The critical success index (CSI) is hits / (hits + misses + false alarms). Of pixels that are sorted by their
probabilities, p_1 >= p_2 >= ..., a forecast that says yes at the first k expects a CSI of about
(p_1 + ... + p_k) / (k + p_(k+1) + p_(k+2) + ...): the ratio of the expectations, for the expectation of the
ratio. Of calibrated probabilities no other decision is better than a cut, and the best cut lies at
CSI / (1 + CSI) of the highest CSI (Lipton et al. 2014, arXiv:1402.1892, theorem 1, which tells it of
F1 = 2 CSI / (1 + CSI)). What was observed is not asked for.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def own_cut(probability: Float[Tensor, "batch lead y x"]) -> Float[Tensor, "batch lead"]:
    """The cut of each field; a pixel says yes where its probability reaches it. NaN pixels do not count.

    Infinite, so that all say no, where every probability is 0 or unknown. One half where each is 0 or 1.

    The cut of one CSI decides, what is decided has a higher CSI, whose cut decides anew, until none is higher
    (Dinkelbach 1967, doi:10.1287/mnsc.13.7.492): the best of all k, after some passes and without a sort.
    """
    said = probability.flatten(start_dim=2)
    rain = said.nansum(dim=2, dtype=torch.float64)  # pixels that are expected to have any
    csi = torch.zeros_like(rain)
    while True:
        cut = csi / (1 + csi)
        yes = said >= cut.to(said)[:, :, None]
        hits = torch.where(yes, said, 0).sum(dim=2, dtype=torch.float64)
        expected = hits / (yes.sum(dim=2) + rain - hits)
        higher = expected > csi
        if not higher.any():
            return torch.where(csi > 0, cut, torch.inf).to(probability)
        csi = torch.where(higher, expected, csi)
