"""The cut from which on a probability means yes, beside every other that there could be."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metnet.decision import CUTS, own_cut
from metnet.rain import EnsembleForecast
from tests.metnet.scores.check import storm

FEW = st.integers(0, 10_000)


def some(seed: int, dryness: float = 2.0, pixels: int = 2000) -> Tensor:
    """Probabilities as of showers: most of them small."""
    return (torch.randn(pixels, generator=torch.Generator().manual_seed(seed)) * 2 - dryness).sigmoid()


def histogram(said: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels and the probabilities of one lead time by class, counted one class after the other."""
    edges = [-1.0, *CUTS, 2.0]
    inside = torch.stack([(said >= low) & (said < high) for low, high in pairwise(edges)])
    return inside.sum(dim=1)[None].double(), torch.where(inside, said.double(), 0).sum(dim=1)[None]


def cut_of(said: Tensor) -> float:
    """The probability from which on yes is said."""
    return CUTS[int(own_cut(*histogram(said))) - 1]


def expected(said: Tensor, cut: float) -> float:
    """The CSI that is expected of a cut, in the words of the definition."""
    flat = said.double()
    yes = said >= cut
    return float(flat[yes].sum() / (yes.sum() + flat[~yes].sum()))


def best_of_all(said: Tensor) -> float:
    """The highest expected CSI, by sorting and trying every number of pixels."""
    ordered = said.double().sort(descending=True).values
    hits = ordered.cumsum(0)
    return float((hits / (torch.arange(1, len(ordered) + 1) + hits[-1] - hits)).max())


@given(FEW, st.floats(-2, 8))
@settings(max_examples=25, database=None)
def test_no_other_of_the_cuts_and_hardly_any_number_of_pixels_is_expected_to_have_a_higher_csi(
    seed: int, dryness: float
) -> None:
    said = some(seed, dryness)
    told = expected(said, cut_of(said))
    assert told == pytest.approx(max(expected(said, cut) for cut in CUTS if (said >= cut).any()))
    assert told > 0.995 * best_of_all(said)


@given(FEW, st.integers(2, 24))
@settings(max_examples=25, database=None)
def test_shares_of_up_to_24_members_lie_in_classes_of_their_own(seed: int, members: int) -> None:
    said = EnsembleForecast(storm(seed, (1, members, 1, 20, 20))).probability_above(2.0).flatten()
    assert expected(said, cut_of(said)) == pytest.approx(best_of_all(said))


def test_the_cut_is_the_csi_by_one_and_the_csi() -> None:
    """Theorem 1 of Lipton et al. 2014; classes are 2^(1/10) wide."""
    for seed in range(5):
        said = some(seed, pixels=100_000)
        csi = best_of_all(said)
        assert cut_of(said) == pytest.approx(csi / (1 + csi), rel=0.072)


def test_of_probabilities_that_come_true_hindsight_finds_hardly_a_better_cut() -> None:
    random = torch.Generator().manual_seed(1)
    for dryness in (0.0, 3.0, 5.0):
        said = some(2, dryness, 160_000)
        fell = torch.rand(said.shape, generator=random) < said

        def csi(cut: float, said: Tensor = said, fell: Tensor = fell) -> float:
            yes = said >= cut
            return float((yes & fell).sum() / (yes | fell).sum())

        hindsight = max(csi(level / 100) for level in range(1, 100))
        assert csi(cut_of(said)) > 0.98 * hindsight
        assert csi(cut_of(said)) > 1.01 * csi(0.5)


def test_each_lead_time_decides_for_itself() -> None:
    fields = [some(1, 0.0), some(2, 4.0), some(3, 6.0), torch.zeros(9)]
    together = own_cut(*(torch.cat(parts) for parts in zip(*map(histogram, fields), strict=True)))
    assert together.tolist() == [int(own_cut(*histogram(field))) for field in fields]
    assert together[:3].unique().numel() == 3
