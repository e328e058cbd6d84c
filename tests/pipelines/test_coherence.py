"""What `benchmarks.coherence` tells of members of the mean rain over a window."""

import pytest
import torch

from benchmarks.coherence import outcome

LEADS = torch.tensor([10.0, 20.0])


def areas(count, windows=400):
    """Members of a window of 4 x 4 pixels, and what fell: each map is of one rate, drawn from the same."""
    random = torch.Generator().manual_seed(0)
    rate = 5 * torch.rand(windows, count + 1, 2, 1, 1, generator=random)
    fields = rate.expand(-1, -1, -1, 4, 4)
    return fields[:, :count], fields[:, count].clone()


def test_members_like_what_fell_are_as_wide_as_they_err_and_fill_all_ranks_alike():
    found = outcome(*areas(24), LEADS)
    assert found.spread == pytest.approx(found.error, rel=0.1)
    assert found.fifths == pytest.approx([0.2] * 5, abs=0.05)
    assert found.crps == pytest.approx([5 / 6, 5 / 6], abs=0.08), "of a uniform distribution: range / 6"
    assert found.crps_of_window < 0.85 * found.crps[0], (
        "the two lead times are not alike, so their mean is surer"
    )


def test_members_that_know_nothing_of_each_other_are_too_narrow_over_an_area():
    members, target = areas(24)
    random = torch.Generator().manual_seed(1)
    alone = 5 * torch.rand(members.shape, generator=random)
    found, narrow = outcome(members, target, LEADS), outcome(alone, target, LEADS)
    assert narrow.spread < 0.5 * narrow.error
    assert narrow.fifths[0] + narrow.fifths[-1] > 0.7
    assert narrow.crps[0] > 1.2 * found.crps[0]


def test_pixels_that_were_not_observed_count_neither_in_members_nor_in_what_fell():
    members, target = areas(24)
    members = members.clone()
    target[:, :, :2], members[:, :, :, :2] = torch.nan, 100.0
    assert outcome(members, target, LEADS) == outcome(*areas(24), LEADS)
    target[7] = torch.nan
    known = torch.arange(len(target)) != 7
    without = outcome(members[known], target[known], LEADS)
    assert outcome(members, target, LEADS).crps == pytest.approx(without.crps)
