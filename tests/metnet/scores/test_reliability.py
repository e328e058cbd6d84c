"""The score in metnet/scores/reliability.py, by hand and against other software."""

import numpy as np
import pytest
import torch

from metnet.rain import EnsembleForecast
from metnet.scores.reliability import Reliability
from tests.metnet.scores.check import check_score, forecast_of, storm


@pytest.mark.parametrize("bins", [1, 10])
def test_reliability_is_a_score(bins: int) -> None:
    check_score(Reliability(1.0, bins), perfect=0.0)


def test_rain_that_falls_as_often_as_forecast_is_reliable() -> None:
    quarter = EnsembleForecast(torch.tensor([5.0, 0.0, 0.0, 0.0]).view(1, 4, 1, 1, 1).expand(1, 4, 1, 1, 8))
    as_forecast = torch.tensor([2.0, 3.0] + [0.0] * 6).view(1, 1, 1, 8)
    too_often = torch.tensor([2.0] * 4 + [0.0] * 4).view(1, 1, 1, 8)

    score = Reliability(1.0)

    assert score.value(score.sums(quarter, as_forecast)).tolist() == [0.0]
    assert score.value(score.sums(quarter, too_often)).tolist() == [0.25]


def test_the_diagram_holds_each_pixel_in_the_bin_of_its_probability() -> None:
    members = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    forecast = EnsembleForecast(members.T.reshape(1, 4, 1, 1, 3))
    observed = torch.tensor([0.0, 2.0, 2.0]).view(1, 1, 1, 3)

    score = Reliability(1.0, bins=4)
    curve = score.curve(score.sums(forecast, observed))

    assert curve.count.tolist() == [[1, 0, 1, 1]]  # 0, none, 1/2, and 1 in the last bin
    torch.testing.assert_close(
        curve.probability, torch.tensor([[0.0, torch.nan, 0.5, 1.0]], dtype=torch.float64), equal_nan=True
    )
    torch.testing.assert_close(
        curve.frequency, torch.tensor([[0.0, torch.nan, 1.0, 1.0]], dtype=torch.float64), equal_nan=True
    )


def test_the_diagram_of_members_drawn_like_the_truth_lies_on_the_diagonal() -> None:
    members = storm(1, (1, 40, 2, 100, 100))
    chosen = torch.randint(0, 40, (1, 1, 2, 100, 100), generator=torch.Generator().manual_seed(2))
    truth = members.gather(1, chosen)[:, 0]

    score = Reliability(1.0)
    curve = score.curve(score.sums(EnsembleForecast(members), truth))

    filled = curve.count > 300
    assert int(filled.sum()) >= 4
    torch.testing.assert_close(curve.frequency[filled], curve.probability[filled], atol=0.05, rtol=0)


def sums_of(points: list[tuple[float, float, float]], bins: int = 10) -> torch.Tensor:
    """The sums of some (probability, frequency, pixels), each in its bin."""
    sums = torch.zeros(1, 3, bins, dtype=torch.float64)
    for probability, frequency, pixels in points:
        sums[0, :, int(probability * bins)] = torch.tensor(
            [pixels, probability * pixels, frequency * pixels], dtype=torch.float64
        )
    return sums.flatten(1)


@pytest.mark.parametrize(("slope", "offset"), [(1.0, 0.0), (0.5, 0.2), (1.1, -0.05), (-1.0, 1.0)])
def test_the_slope_of_points_on_a_line_is_the_line_s_whatever_their_pixels(
    slope: float, offset: float
) -> None:
    points = [(x, offset + slope * x, 10.0 ** (4 - i)) for i, x in enumerate((0.05, 0.31, 0.55, 0.72))]
    assert float(Reliability(1.0).slope(sums_of(points))) == pytest.approx(slope)


def test_the_slope_is_that_of_least_squares_weighted_by_pixels() -> None:
    random = np.random.default_rng(0)
    x = (np.arange(10) + random.random(10)) / 10
    y, pixels = random.random(10), random.integers(1, 1000, 10).astype(float)

    ours = float(Reliability(1.0).slope(sums_of(list(zip(x, y, pixels, strict=True)))))

    assert ours == pytest.approx(np.polyfit(x, y, 1, w=np.sqrt(pixels))[0])
    assert ours != pytest.approx(np.polyfit(x, y, 1)[0], rel=0.01)


def test_two_points_have_a_slope_and_one_has_none() -> None:
    score = Reliability(1.0)
    assert float(score.slope(sums_of([(0.0, 0.1, 90), (0.8, 0.5, 10)]))) == pytest.approx(0.5)
    for sums in (sums_of([(0.3, 0.2, 50)]), sums_of([])):
        assert score.slope(sums).isnan().all()


def test_probabilities_too_far_from_the_mean_by_a_factor_have_its_inverse_as_slope() -> None:
    """As of members that are drawn like the truth, but spread too far from the base rate."""
    random = torch.Generator().manual_seed(0)
    truth = torch.rand(200_000, generator=random, dtype=torch.float64)
    happened = torch.rand(200_000, generator=random, dtype=torch.float64) < 0.35 + 0.3 * truth
    said = 0.2 + 0.6 * truth  # where 0.35 + 0.3 truth came
    bins = (said * 10).long()
    parts = [torch.bincount(bins, weight, minlength=10) for weight in (0 * said + 1, said, happened.double())]
    assert float(Reliability(1.0).slope(torch.cat(parts)[None])) == pytest.approx(0.5, abs=0.02)


def test_lead_times_do_not_mix() -> None:
    forecast, observed = forecast_of(1), storm(2, (2, 3, 12, 10))
    score = Reliability(1.0)

    whole = score.sums(forecast, observed)

    for lead in range(3):
        part = score.sums(
            EnsembleForecast(forecast.members[:, :, lead : lead + 1]), observed[:, lead : lead + 1]
        )
        assert torch.equal(part[0], whole[lead])
