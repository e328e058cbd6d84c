"""The score in metnet/scores/fss.py, by hand and against other software."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scores.spatial import fss_2d_single_field
from torch import Tensor

from metnet.rain import EnsembleForecast
from metnet.scores.fss import Fss
from tests.metnet.scores.check import check_score, storm, with_gaps


@pytest.mark.parametrize("cells", [1, 3, 9])
def test_fss_is_a_score(cells: int) -> None:
    check_score(Fss(1.0, cells), perfect=1.0, splits=("batch", "lead"))


def test_a_neighbourhood_has_a_middle_cell() -> None:
    with pytest.raises(ValueError, match="odd"):
        Fss(1.0, cells=4)


def single(field: Tensor) -> EnsembleForecast:
    return EnsembleForecast(field[:, None])


@pytest.mark.parametrize("cells", [3, 5])
def test_fss_is_that_of_the_scores_package_where_no_edge_rule_matters(cells: int) -> None:
    """A dry frame around both fields makes every share at the edge 0 by any rule."""
    frame = (6, 6, 6, 6)
    forecast, observed = F.pad(storm(1, (1, 1, 20, 20)), frame), F.pad(storm(2, (1, 1, 20, 20)), frame)

    ours = Fss(1.0, cells).value(Fss(1.0, cells).sums(single(forecast), observed))

    theirs = fss_2d_single_field(
        forecast[0, 0].numpy(), observed[0, 0].numpy(), event_threshold=0.999999, window_size=(cells, cells)
    )
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)


def test_fss_counts_known_cells_only_by_hand() -> None:
    """Three cells in a row, the last unobserved: shares of the known ones around the two centres."""
    observed = torch.tensor([1.0, 0.0, torch.nan]).view(1, 1, 1, 3)
    forecast = torch.tensor([0.0, 0.0, 9.0]).view(1, 1, 1, 3)

    sums = Fss(1.0, cells=3).sums(single(forecast), observed)

    torch.testing.assert_close(
        sums, torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    )  # (1/2)^2 at two centres


def brute_force(said: np.ndarray, seen: np.ndarray, known: np.ndarray, cells: int) -> float:
    half, above, below = cells // 2, 0.0, 0.0
    for row, column in np.argwhere(known):
        box = np.s_[max(0, row - half) : row + half + 1, max(0, column - half) : column + half + 1]
        p, o = said[box][known[box]].mean(), seen[box][known[box]].mean()
        above, below = above + (p - o) ** 2, below + p**2 + o**2
    return 1 - above / below


@pytest.mark.parametrize("cells", [3, 7])
def test_fss_beside_gaps_and_edges_is_that_of_a_loop_over_pixels(cells: int) -> None:
    observed = with_gaps(storm(3, (1, 1, 13, 11)), 3)
    forecast = EnsembleForecast(storm(4, (1, 4, 1, 13, 11)))

    ours = Fss(1.0, cells).value(Fss(1.0, cells).sums(forecast, observed))

    seen = observed[0, 0].numpy()
    theirs = brute_force(
        forecast.probability_above(1.0)[0, 0].numpy(), (seen >= 1.0).astype(float), ~np.isnan(seen), cells
    )
    assert float(ours) == pytest.approx(theirs, abs=1e-5)


def test_a_near_miss_is_forgiven_more_the_larger_the_neighbourhood() -> None:
    observed = torch.zeros(1, 1, 32, 32)
    observed[..., 10:14, 10:14] = 5.0
    shifted = observed.roll(4, dims=-1)

    values = [float(Fss(1.0, n).value(Fss(1.0, n).sums(single(shifted), observed))) for n in (1, 5, 9, 17)]

    assert values[0] == pytest.approx(0.0, abs=1e-6)
    assert values == sorted(values) and values[-1] > 0.7
