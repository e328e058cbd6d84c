"""The cut from which on a probability means yes."""

import pytest
import torch

from metnet.calibration import Exceedances
from metnet.decision import Cuts, DecidedForecast
from metnet.rain import EnsembleForecast
from metnet.scores.csi import Csi

EDGES = (0.1, 1.0)


def calibrated_pixels(count=40_000, leads=(5.0, 60.0), dryness=2.0, seed=0):
    """Probabilities that are right; at the second lead time rain is rarer."""
    random = torch.Generator().manual_seed(seed)
    parts = []
    for n, lead in enumerate(leads):
        logit = torch.randn(count, generator=random) * 2 - dryness * n
        reached = torch.stack([logit, logit - 1.5], dim=1).sigmoid()
        fell = (torch.rand(count, 1, generator=random) < reached).sum(dim=1)
        parts.append(Exceedances(reached, torch.full((count,), lead), fell))
    return Exceedances.joined(parts)


def csi(said, edge, lead, cut):
    here = said.lead_time == lead
    yes, came = said.above[here, edge] >= cut, said.fell[here] > edge
    return float((yes & came).sum() / (yes | came).sum())


def test_no_other_cut_has_a_higher_csi():
    said = calibrated_pixels()
    cuts = Cuts.chosen(said, EDGES)
    for edge, threshold in enumerate(EDGES):
        for lead, cut in zip((5.0, 60.0), cuts.at(threshold, (5.0, 60.0)), strict=True):
            best = max(csi(said, edge, lead, level / 100) for level in range(1, 100))
            assert csi(said, edge, lead, cut) == pytest.approx(best)
            assert csi(said, edge, lead, cut) > csi(said, edge, lead, 0.5)


def test_of_calibrated_probabilities_the_best_cut_is_that_of_theory():
    said = calibrated_pixels(200_000)
    cuts = Cuts.chosen(said, EDGES)
    for edge, threshold in enumerate(EDGES):
        for lead, cut in zip((5.0, 60.0), cuts.at(threshold, (5.0, 60.0)), strict=True):
            best = csi(said, edge, lead, cut)
            assert cut == pytest.approx(best / (1 + best), abs=0.03)


def test_where_little_fell_all_lead_times_choose_together_and_where_nothing_did_it_is_half():
    said = calibrated_pixels(leads=(5.0, 60.0), dryness=30.0)
    cuts = Cuts.chosen(said, EDGES)
    assert cuts.cut[0][1] == cuts.cut[0][0]
    nothing = Exceedances(said.above, said.lead_time, torch.zeros_like(said.fell))
    assert Cuts.chosen(nothing, EDGES).cut == ((0.5, 0.5), (0.5, 0.5))


def test_a_lead_time_between_takes_the_cut_of_the_next_and_an_unknown_threshold_has_none():
    cuts = Cuts((0.1, 1.0), (5.0, 10.0), ((0.4, 0.3), (0.2, 0.1)))
    assert cuts.at(1.0, (1.0, 5.0, 6.0, 10.0, 90.0)) == (0.2, 0.2, 0.1, 0.1, 0.1)
    assert cuts.at(2.0, (5.0,)) is None


def test_csi_asks_the_forecast_for_its_cut():
    observed = torch.ones(1, 2, 1, 1)
    three_of_ten = EnsembleForecast(
        torch.tensor([1.0] * 3 + [0.0] * 7).view(1, 10, 1, 1, 1).expand(-1, -1, 2, -1, -1)
    )
    decided = DecidedForecast(three_of_ten, {1.0: (0.25, 0.35)})

    assert Csi(1.0).sums(decided, observed).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert Csi(1.0, cut=0.2).sums(decided, observed).tolist() == [[1, 0, 0], [1, 0, 0]], (
        "what is asked goes first"
    )
    assert Csi(1.0).sums(three_of_ten, observed).tolist() == [[0, 1, 0], [0, 1, 0]]
    assert Csi(0.5).sums(decided, observed).tolist() == [[0, 1, 0], [0, 1, 0]], "no cut of its own: one half"


def test_all_else_is_as_it_was_said():
    members = EnsembleForecast(torch.rand(1, 5, 2, 3, 3))
    decided, observed = DecidedForecast(members, {}), torch.rand(1, 2, 3, 3)
    for name, argument in (("probability_above", 0.5), ("quantile", 0.3), ("crps", observed)):
        torch.testing.assert_close(getattr(decided, name)(argument), getattr(members, name)(argument))
    torch.testing.assert_close(decided.mean(), members.mean())


def test_the_card_gives_them_back_and_a_damaged_one_is_refused():
    cuts = Cuts.chosen(calibrated_pixels(500), EDGES)
    assert Cuts.from_card(cuts.card()) == cuts
    for damage in ({"cut": [[0.5]]}, {"cut": [[0.5, 1.5], [0.5, 0.5]]}, {"lead_times": None}):
        with pytest.raises(ValueError, match="cuts: expected"):
            Cuts.from_card({**cuts.card(), **damage})
