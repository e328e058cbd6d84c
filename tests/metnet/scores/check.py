"""`check_score`: what every `Score` promises, asked of one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metnet.rain import EnsembleForecast
from metnet.scores.score import Score


def storm(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Rain rates (mm/h) of which about half are 0, some lie exactly on a threshold, and few are heavy."""
    generator = torch.Generator().manual_seed(seed)
    rate = -3 * torch.rand(shape, generator=generator).clamp(min=1e-3).log()
    steps = torch.tensor([0.1, 1.0, 2.0, 5.0])[torch.randint(0, 4, shape, generator=generator)]
    rate = torch.where(torch.rand(shape, generator=generator) < 0.1, steps, rate)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, 0.0, rate)


def forecast_of(seed: int, members: int = 5) -> EnsembleForecast:
    """Members for two samples of three lead times, which know nothing of what happened."""
    return EnsembleForecast(storm(seed, (2, members, 3, 12, 10)))


def with_gaps(observed: Tensor, seed: int) -> Tensor:
    """The same field, unobserved at about a fifth of its pixels."""
    generator = torch.Generator().manual_seed(seed)
    return observed.masked_fill(torch.rand(observed.shape, generator=generator) < 0.2, torch.nan)


def check_score(score: Score, perfect: float, splits: tuple[str, ...] = ("batch", "lead", "y", "x")) -> None:
    """Parts add up over the axes of `splits`; what is not known counts nothing; perfect is perfect."""
    assert score.name
    _check_shape(score)
    for axis in splits:
        _check_parts_add_up(score, axis)
    _check_unknown_counts_nothing(score)
    _check_perfect(score, perfect)


def _check_shape(score: Score) -> None:
    sums = score.sums(forecast_of(1), storm(2, (2, 3, 12, 10)))
    assert sums.dtype == torch.float64
    assert sums.ndim == 2 and sums.shape[0] == 3
    assert score.value(sums).shape == (3,)
    assert score.value(sums).isfinite().all()


def _check_parts_add_up(score: Score, axis: str) -> None:
    members_dim = {"batch": 0, "lead": 2, "y": 3, "x": 4}[axis]
    observed_dim = {"batch": 0, "lead": 1, "y": 2, "x": 3}[axis]
    length = {"batch": 2, "lead": 3, "y": 12, "x": 10}[axis]

    @given(st.integers(0, 10_000), st.integers(1, length - 1))
    @settings(max_examples=8, database=None)
    def parts_add_up(seed: int, cut: int) -> None:
        members = forecast_of(seed).members
        observed = with_gaps(storm(seed + 1, (2, 3, 12, 10)), seed)
        parts = zip(
            members.split([cut, length - cut], dim=members_dim),
            observed.split([cut, length - cut], dim=observed_dim),
            strict=True,
        )
        first, second = (score.sums(EnsembleForecast(m), o) for m, o in parts)
        joined = torch.cat([first, second]) if axis == "lead" else first + second
        whole = score.sums(EnsembleForecast(members), observed)
        torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-4)

    parts_add_up()


def _check_unknown_counts_nothing(score: Score) -> None:
    forecast, observed = forecast_of(3), with_gaps(storm(4, (2, 3, 12, 10)), 4)
    sums = score.sums(forecast, observed)
    other = torch.where(observed.isnan()[:, None], 99.0, forecast.members)
    assert torch.equal(score.sums(EnsembleForecast(other), observed), sums), (
        "a forecast of the unseen was counted"
    )

    seen = storm(4, (2, 3, 12, 10))
    unknown = forecast.members.masked_fill(observed.isnan()[:, None], torch.nan)
    assert torch.equal(score.sums(EnsembleForecast(unknown), seen), sums), "no forecast was counted as one"

    nothing = score.sums(forecast, torch.full_like(observed, torch.nan))
    assert score.value(nothing).isnan().all(), "a score of nothing must be NaN"
    assert not nothing.any(), "nothing must add nothing"


def _check_perfect(score: Score, perfect: float) -> None:
    observed = storm(5, (2, 3, 12, 10))
    right = score.value(score.sums(EnsembleForecast(observed[:, None]), observed))
    torch.testing.assert_close(right, torch.full_like(right, perfect), atol=1e-6, rtol=0)
    wrong = score.value(score.sums(EnsembleForecast(observed[:, None].roll(3, -1) + 1), observed))
    assert ((wrong - perfect).abs() > 0.01).all(), "a wrong forecast looks perfect"
