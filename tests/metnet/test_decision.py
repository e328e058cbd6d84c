"""The cut from which on a probability means yes, beside every other that there could be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metnet.decision import own_cut
from metnet.rain import EnsembleForecast
from tests.metnet.scores.check import storm

FEW = st.integers(0, 10_000)


def some(seed: int, dryness: float = 2.0, shape: tuple[int, ...] = (1, 1, 40, 50)) -> Tensor:
    """Probabilities as of showers: most of them small."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 - dryness).sigmoid()


def expected(probability: Tensor, cut: float) -> float:
    """The CSI that is expected of a cut, in the words of the definition."""
    flat = probability.flatten().double()
    yes = flat >= cut
    return float(flat[yes].sum() / (yes.sum() + flat[~yes].sum()))


def best_of_all(probability: Tensor) -> tuple[float, float]:
    """The cut with the highest expected CSI, and that CSI, by sorting and trying every number of pixels."""
    ordered = probability.flatten().double().sort(descending=True).values
    hits = ordered.cumsum(0)
    csi = hits / (torch.arange(1, len(ordered) + 1) + hits[-1] - hits)
    return float(ordered[csi.argmax()]), float(csi.max())


@given(FEW, st.floats(-2, 8))
@settings(max_examples=25, deadline=None, database=None)
def test_no_other_number_of_pixels_is_expected_to_have_a_higher_csi(seed: int, dryness: float) -> None:
    said = some(seed, dryness)
    last, csi = best_of_all(said)
    cut = float(own_cut(said))
    assert (said >= cut).sum() == (said.double() >= last).sum()
    assert expected(said, cut) == pytest.approx(csi)


@given(FEW, st.integers(2, 24))
@settings(max_examples=25, deadline=None, database=None)
def test_shares_of_members_of_which_many_are_equal_are_decided_as_well(seed: int, members: int) -> None:
    said = EnsembleForecast(storm(seed, (1, members, 1, 20, 20))).probability_above(2.0)
    _, csi = best_of_all(said)
    assert expected(said, float(own_cut(said))) == pytest.approx(csi)


def test_the_cut_is_the_csi_by_one_and_the_csi() -> None:
    """Theorem 1 of Lipton et al. 2014."""
    for seed in range(5):
        said = some(seed)
        _, csi = best_of_all(said)
        assert float(own_cut(said)) == pytest.approx(csi / (1 + csi), rel=1e-5)


def test_of_probabilities_that_come_true_hindsight_finds_hardly_a_better_cut() -> None:
    random = torch.Generator().manual_seed(1)
    for dryness in (0.0, 3.0, 5.0):
        said = some(2, dryness, (1, 1, 400, 400))
        fell = torch.rand(said.shape, generator=random) < said

        def csi(cut: float, said: Tensor = said, fell: Tensor = fell) -> float:
            yes = said >= cut
            return float((yes & fell).sum() / (yes | fell).sum())

        hindsight = max(csi(level / 100) for level in range(1, 100))
        assert csi(float(own_cut(said))) > 0.98 * hindsight
        assert csi(float(own_cut(said))) > 1.01 * csi(0.5)


def test_each_sample_and_lead_time_decides_for_itself() -> None:
    fields = [[some(1, 0.0), some(2, 4.0)], [some(3, 6.0), torch.zeros(1, 1, 40, 50)]]
    together = own_cut(torch.cat([torch.cat(row, dim=1) for row in fields]))
    alone = torch.stack([torch.cat([own_cut(field)[0] for field in row]) for row in fields])
    assert torch.equal(together, alone)
    assert together.unique().numel() == 4


def test_pixels_without_a_forecast_do_not_count() -> None:
    said = some(4)
    around = torch.nn.functional.pad(said, (5, 7, 3, 2), value=torch.nan)
    assert torch.equal(own_cut(around), own_cut(said))
    assert not torch.equal(own_cut(around.nan_to_num(nan=0.2)), own_cut(said))


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_where_nothing_is_forecast_all_say_no(value: float) -> None:
    said = torch.full((2, 3, 4, 5), value)
    assert not (said >= own_cut(said)[:, :, None, None]).any()


def test_a_forecast_of_one_number_keeps_to_it() -> None:
    member = EnsembleForecast(storm(5, (1, 1, 2, 30, 30)))
    for threshold in (0.1, 1.0, 5.0):
        assert own_cut(member.probability_above(threshold)).tolist() == [[0.5, 0.5]]


def test_a_sure_forecast_of_rain_everywhere_says_yes_everywhere() -> None:
    said = torch.full((1, 1, 4, 5), 0.02)
    assert (said >= own_cut(said)[:, :, None, None]).all()
