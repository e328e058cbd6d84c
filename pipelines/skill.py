"""`Skill`: the sums of every score of every forecaster, run by run, and what they say, with uncertainty."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import torch
from torch import Tensor

from metnet.rain import EnsembleForecast
from metnet.scores.score import Score

FEWEST_RUNS = 5  # or events: with fewer, resampling them tells nothing
LEVEL = 0.9  # of the intervals


@dataclass(frozen=True, eq=False)
class Skill:
    """What adds up to the scores. All forecasters were asked at exactly the same pixels.

    `sums` holds for each score a float64 tensor (forecaster, run, lead, part).
    """

    scores: tuple[Score, ...]
    forecasters: tuple[str, ...]  # the forecast itself first, then the baselines
    init_times: tuple[datetime, ...]  # UTC, rising
    lead_times: tuple[float, ...]  # minutes, rising
    sums: Mapping[str, Tensor]  # by the score's name
    pixels: Tensor  # (run, lead), that count
    observed: Tensor  # (run, lead), that were observed
    rain: Tensor  # (run, lead), mm/h, summed over the pixels that count
    # of the forecast before it was calibrated, by the names of reliability scores: (run, lead, part)
    uncalibrated: Mapping[str, Tensor] = field(default_factory=dict)

    def values(self, score: Score) -> Tensor:
        """The score over all runs (forecaster, lead); NaN where nothing was counted."""
        return torch.stack([score.value(sums.sum(dim=0)) for sums in self.sums[score.name]])

    def difference(self, score: Score, baseline: str, resamples: int = 1000) -> "Difference":
        """The forecast's score less a baseline's, with the interval that resampled runs span.

        A circular block bootstrap over runs (Politis & Romano 1992): forecasts whose times overlap err alike,
        so neighbours are drawn together. Both are resampled alike: their difference is what is asked for.
        """
        paired = self.sums[score.name][[0, self.forecasters.index(baseline)]]
        ours, theirs = (score.value(sums.sum(dim=0)) for sums in paired)
        if len(self.init_times) < FEWEST_RUNS:
            unknown = torch.full_like(ours, torch.nan)
            relative = _by(ours - theirs, theirs.abs())
            return Difference(ours - theirs, unknown, unknown, relative, *[unknown] * 4)
        drawn, best = self._draws(resamples), perfect(score)
        again = [_again(score, drawn, sums) for sums in paired]
        difference = again[0] - again[1]
        return Difference(
            ours - theirs,
            *_interval(difference),
            _by(ours - theirs, theirs.abs()),
            *_interval(difference / again[1].abs()),
            *_interval((again[0] - best).abs() - (again[1] - best).abs()),
        )

    def ratio(self, score: Score, baseline: str, resamples: int = 1000) -> "Estimate":
        """The forecast's mean score over the lead times by a baseline's, with the interval of resampled runs.

        Runs are drawn as `difference` draws them. Lead times at which either has no score are left out. NaN
        where the baseline's mean is 0.
        """
        sums = self.sums[score.name][[0, self.forecasters.index(baseline)]]
        ours, theirs = (score.value(part.sum(dim=0)) for part in sums)
        value = float(_by(_mean(ours, theirs), _mean(theirs, ours)))
        if len(self.init_times) < FEWEST_RUNS:
            return Estimate(value, math.nan, math.nan)
        drawn = self._draws(resamples)
        again = [_again(score, drawn, part) for part in sums]
        low, high = _interval(_mean(*again) / _mean(*again[::-1]))
        return Estimate(value, float(low), float(high))

    def pooled(
        self, score: Score, statistic: Callable[[Tensor], Tensor], resamples: int = 1000
    ) -> "Estimate":
        """What a statistic of the score's sums says of the forecast over all runs and lead times together.

        With the interval of resampled runs, drawn as `difference` draws them.
        """
        sums = self.sums[score.name][0].sum(dim=1)
        value = float(statistic(sums.sum(dim=0, keepdim=True))[0])
        if len(self.init_times) < FEWEST_RUNS:
            return Estimate(value, math.nan, math.nan)
        low, high = _interval(statistic(self._draws(resamples) @ sums))
        return Estimate(value, float(low), float(high))

    @property
    def block(self) -> int:
        """Neighbouring runs drawn together: those whose forecast times overlap, a quarter of all at most."""
        count = len(self.init_times)
        if count < 2:
            return 1
        steps = np.diff([time.timestamp() / 60 for time in self.init_times])
        overlapping = round(self.lead_times[-1] / max(float(np.median(steps)), 1e-9))
        return max(1, min(overlapping, count // 4))

    def _draws(self, resamples: int) -> Tensor:
        """How often each run is in each resample (resample, run)."""
        count = len(self.init_times)
        random = np.random.default_rng(0)  # for each score and baseline the same runs
        starts = random.integers(count, size=(resamples, -(-count // self.block)))
        chosen = (starts[:, :, None] + np.arange(self.block)) % count
        chosen = chosen.reshape(resamples, -1)[:, :count]
        drawn = np.zeros((resamples, count))
        np.add.at(drawn, (np.arange(resamples)[:, None], chosen), 1)
        return torch.from_numpy(drawn)


@dataclass(frozen=True, eq=False)
class Difference:
    """The forecast's score less a baseline's by lead time; NaN where not known.

    `low` and `high` span 90 %. `relative` is the difference by the baseline's score; NaN where that is 0.
    """

    value: Tensor
    low: Tensor
    high: Tensor
    relative: Tensor
    relative_low: Tensor
    relative_high: Tensor
    away_low: Tensor  # of how much farther the forecast is from a perfect score than the baseline
    away_high: Tensor


@dataclass(frozen=True)
class Estimate:
    """A number of a forecast; `low` and `high` span 90 %, NaN where not known."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """With the interval, if that is known; a dash if not even the number is."""
        if math.isnan(self.value):
            return "-"
        span = "" if math.isnan(self.low) else f" ({self.low:.3f}-{self.high:.3f})"
        return f"{self.value:.3f}{span}"


def over_events(ratios: Sequence[float], resamples: int = 1000) -> Estimate:
    """The geometric mean of one ratio of several events, with the interval that events drawn anew span.

    Every event counts alike, however much it rained. NaN if any ratio is not known, or one of or to nothing.

    Raises:
        ValueError: if there is none.
    """
    if not ratios:
        raise ValueError("no event whose ratio could be averaged")
    logarithms = torch.tensor(ratios, dtype=torch.float64).log()
    if not logarithms.isfinite().all():
        return Estimate(math.nan, math.nan, math.nan)
    value = float(logarithms.mean().exp())
    if len(ratios) < FEWEST_RUNS:
        return Estimate(value, math.nan, math.nan)
    drawn = np.random.default_rng(0).integers(len(ratios), size=(resamples, len(ratios)))
    low, high = _interval(logarithms[torch.from_numpy(drawn)].mean(dim=1).exp())
    return Estimate(value, float(low), float(high))


def _again(score: Score, drawn: Tensor, sums: Tensor) -> Tensor:
    """The score (resample, lead) of the sums (run, lead, part) of drawn runs (resample, run).

    Lead by lead: all parts of all resamples at once would take some GB.
    """
    return torch.stack([score.value(drawn @ part) for part in sums.unbind(dim=1)], dim=1)


def _by(value: Tensor, baseline: Tensor) -> Tensor:
    """A ratio; NaN where it would be one to nothing."""
    return value / baseline.masked_fill(baseline == 0, torch.nan)


def _interval(again: Tensor) -> tuple[Tensor, Tensor]:
    """What spans the resamples (first) that have a value; NaN where an end is a ratio to nothing."""
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(again, tails, dim=0)
    unknown = ~(low.isfinite() & high.isfinite())
    return low.masked_fill(unknown, torch.nan), high.masked_fill(unknown, torch.nan)


def _mean(score: Tensor, other: Tensor) -> Tensor:
    """The mean over the lead times (last) at which both have a score."""
    return torch.where(other.isnan(), torch.nan, score).nanmean(dim=-1)


def perfect(score: Score) -> float:
    """What a forecast gets that says exactly what then happens, found by asking for one."""
    rain = torch.linspace(0, 300, 64).view(1, 1, 8, 8)  # mm/h, beyond any threshold
    return float(score.value(score.sums(EnsembleForecast(rain[:, None]), rain))[0])


def check_names(scores: Sequence[Score]) -> None:
    """Refuses two scores of one name, whose sums would be one.

    Raises:
        ValueError: naming it; and if there is no score at all.
    """
    names = [score.name for score in scores]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise ValueError(
            f"scores={names}: expected at least one, each once; remove a {', '.join(twice) or 'none'}"
        )
