"""`Goal`: what is asked of a forecast of an event that was never learned from, beside what was measured.

The goals are issue 6's: against pysteps' STEPS, the fitted widened extrapolation, and the extrapolation.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from metnet.scores.brier import Brier
from metnet.scores.crps import Crps
from metnet.scores.csi import Csi
from metnet.scores.fss import Fss
from metnet.scores.reliability import Reliability
from metnet.scores.score import Score
from pipelines.skill import FEWEST_RUNS, Estimate, Skill

BASELINES = {  # in words
    "steps": "STEPS",
    "widened": "the widened extrapolation",
    "extrapolation": "the extrapolation",
}
HEAVY = 5.0  # mm/h, of the fractions skill score
SCALES = (5.0, 20.0)  # km, of the same
AHEAD = 30.0  # minutes, of the CSI; the lead time nearest to it is taken, and named
CRPS_MOST, BRIER_MOST, CSI_LEAST = 0.95, 0.97, 1.05  # of a baseline's
ERROR_MOST, SLOPE = 0.02, (0.9, 1.1)  # of reliability
UNKNOWN = Estimate(math.nan, math.nan, math.nan)
Kind = TypeVar("Kind", bound=Score)


@dataclass(frozen=True)
class Goal:
    """One goal and how it was met; `low` and `high` span 90 %, NaN where not known."""

    name: str
    wanted: str
    value: float
    low: float
    high: float
    met: bool | None  # None: it could not be measured

    def __str__(self) -> str:
        """What was measured, and whether that is enough."""
        if self.met is None:
            return "not measured"
        span = "" if math.isnan(self.low) else f" ({self.low:.4g}-{self.high:.4g})"
        return f"{self.value:.4g}{span} {'met' if self.met else 'missed'}"


def goals(skill: Skill, kilometres: float, resamples: int) -> tuple[Goal, ...]:
    """All goals, of one event with cells of this side.

    Not measured is what lacks its score or its baseline, and what would be a ratio to nothing.
    """
    return (
        *_distribution(skill, resamples),
        *_never_worse(skill, resamples),
        *_decisions(skill, resamples),
        *_places(skill, kilometres, resamples),
        *_reliable(skill, resamples),
    )


def neighbourhoods(kilometres: float) -> dict[float, Fss]:
    """The fractions skill scores by scale (km), on cells of this side; none for a scale within a cell."""
    return {
        scale: Fss(HEAVY, 1 + 2 * round((scale / kilometres - 1) / 2))
        for scale in SCALES
        if scale > kilometres
    }


def goal_table(told: Mapping[str, Sequence[Goal]]) -> Iterator[str]:
    """The goals of some events by their names, as lines of Markdown: a row for each goal."""
    yield f"| goal | wanted | {' | '.join(told)} |"
    yield "|---" * (2 + len(told)) + "|"
    rows = dict.fromkeys((goal.name, goal.wanted) for goals in told.values() for goal in goals)
    for row in rows:
        found = [
            next((str(goal) for goal in goals if (goal.name, goal.wanted) == row), "-")
            for goals in told.values()
        ]
        cells = " | ".join(cell.replace("missed", "**missed**") for cell in found)
        yield f"| {' | '.join(row)} | {cells} |"
    yield f"| met | all | {' | '.join(tally(goals) for goals in told.values())} |"


def tally(goals: Sequence[Goal]) -> str:
    """How many are met, of those that could be measured."""
    return f"{sum(goal.met is True for goal in goals)} of {sum(goal.met is not None for goal in goals)}"


def _goal(name: str, wanted: str, found: Estimate, met: bool) -> Goal:
    """A goal; where there is no number, nobody knows whether it is met."""
    return Goal(name, wanted, found.value, found.low, found.high, None if math.isnan(found.value) else met)


def _of_kind(skill: Skill, kind: type[Kind]) -> list[Kind]:
    """The scores of a kind."""
    return [score for score in skill.scores if isinstance(score, kind)]


def _comparable(skill: Skill, score: Score, baseline: str) -> bool:
    """Whether the baseline has the score."""
    return baseline in skill.forecasters and score.name in skill.sums


def _ratio(skill: Skill, score: Score, baseline: str, resamples: int) -> Estimate:
    """The forecast's mean over the lead times by the baseline's."""
    return skill.ratio(score, baseline, resamples) if _comparable(skill, score, baseline) else UNKNOWN


def _distribution(skill: Skill, resamples: int) -> Iterator[Goal]:
    """CRPS and Brier, as means over the lead times."""
    for score in _of_kind(skill, Crps):
        for baseline in ("steps", "widened"):
            ratio = _ratio(skill, score, baseline, resamples)
            name = f"{_unitless(score)}, ratio to {BASELINES[baseline]}"
            yield _goal(name, f"at most {CRPS_MOST:g}", ratio, ratio.value <= CRPS_MOST)
    for brier in _of_kind(skill, Brier):
        ratio = _highest([_ratio(skill, brier, baseline, resamples) for baseline in ("steps", "widened")])
        name = f"{brier.name}, ratio to the better of {BASELINES['steps']} and {BASELINES['widened']}"
        yield _goal(name, f"at most {BRIER_MOST:g}", ratio, ratio.value <= BRIER_MOST)


def _highest(found: Sequence[Estimate]) -> Estimate:
    """The highest; unknown if one is, for that might be higher."""
    unknown = any(math.isnan(each.value) for each in found)
    return UNKNOWN if unknown else max(found, key=lambda each: each.value)


def _unitless(score: Score) -> str:
    """The name of a score whose ratio has not its unit."""
    return score.name.removesuffix(" mm/h")


def _never_worse(skill: Skill, resamples: int) -> Iterator[Goal]:
    """At how many lead times CRPS and Brier lie above a baseline's with the whole interval.

    Not measured where neither errs at any lead time, for then it rained nowhere and nobody said so.
    """
    named: list[tuple[Score, str]] = [(score, _unitless(score)) for score in _of_kind(skill, Crps)]
    named += [(score, score.name) for score in _of_kind(skill, Brier)]
    for baseline in ("steps", "widened"):
        for score, words in named:
            worse = Estimate(_worse(skill, score, baseline, resamples), math.nan, math.nan)
            name = f"lead times with {words} significantly above that of {BASELINES[baseline]}"
            yield _goal(name, "none", worse, worse.value == 0)


def _worse(skill: Skill, score: Score, baseline: str, resamples: int) -> float:
    """At how many lead times the whole interval lies above the baseline's score; NaN if not known."""
    if not _comparable(skill, score, baseline) or len(skill.init_times) < FEWEST_RUNS:
        return math.nan
    low = skill.difference(score, baseline, resamples).low
    rain = (skill.values(score)[[0, skill.forecasters.index(baseline)]] != 0).any(dim=0)
    return float((low > 0).sum()) if (rain & ~low.isnan()).any() else math.nan


def _decisions(skill: Skill, resamples: int) -> Iterator[Goal]:
    """CSI at the lead time nearest to half an hour."""
    at = min(range(len(skill.lead_times)), key=lambda lead: abs(skill.lead_times[lead] - AHEAD))
    for score in _of_kind(skill, Csi):
        for baseline in ("extrapolation", "steps"):
            ratio = UNKNOWN
            if _comparable(skill, score, baseline):
                told = skill.difference(score, baseline, resamples)
                parts = (told.relative, told.relative_low, told.relative_high)
                ratio = Estimate(*(1 + float(part[at]) for part in parts))
            name = f"{score.name} at {skill.lead_times[at]:g} min, ratio to {BASELINES[baseline]}"
            yield _goal(name, f"at least {CSI_LEAST:g}", ratio, ratio.value >= CSI_LEAST)


def _places(skill: Skill, kilometres: float, resamples: int) -> Iterator[Goal]:
    """FSS, as a mean over the lead times."""
    for scale, score in neighbourhoods(kilometres).items():
        ratio = _ratio(skill, score, "steps", resamples)
        name = f"FSS >= {HEAVY:g} mm/h, {scale:g} km, ratio to {BASELINES['steps']}"
        yield _goal(name, "above 1", ratio, ratio.value > 1)


def _reliable(skill: Skill, resamples: int) -> Iterator[Goal]:
    """The distance from the diagonal, and the slope, over all lead times together.

    Not measured where rain was neither said nor seen.
    """
    least, most = SLOPE
    for score in _of_kind(skill, Reliability):
        curve = score.curve(skill.sums[score.name][0].sum(dim=(0, 1))[None])
        rain = curve.probability.nansum() + curve.frequency.nansum() > 0
        error = skill.pooled(score, score.value, resamples) if rain else UNKNOWN
        yield _goal(score.name, f"below {ERROR_MOST:g}", error, error.value < ERROR_MOST)
    for score in _of_kind(skill, Reliability):
        slope = skill.pooled(score, score.slope, resamples)
        name = f"Reliability slope >= {score.threshold:g} mm/h"
        yield _goal(name, f"{least:g} to {most:g}", slope, least <= slope.value <= most)
