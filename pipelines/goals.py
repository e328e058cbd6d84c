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
AHEAD = 30.0  # minutes, of the CSI; the lead time nearest to it is taken
CRPS_MOST, BRIER_MOST, CSI_LEAST = 0.95, 0.97, 1.05  # of a baseline's
ERROR_MOST, SLOPE = 0.02, (0.9, 1.1)  # of reliability
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
    """All goals, of one event with cells of this side."""
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


def _distribution(skill: Skill, resamples: int) -> Iterator[Goal]:
    """CRPS and Brier, as means over the lead times."""
    for score in _of_kind(skill, Crps):
        for baseline in ("steps", "widened"):
            ratio = skill.ratio(score, baseline, resamples)
            met = ratio.value <= CRPS_MOST
            yield _goal(f"{score.name} of {BASELINES[baseline]}", f"at most {CRPS_MOST:g}", ratio, met)
    for brier in _of_kind(skill, Brier):
        ratios = [skill.ratio(brier, baseline, resamples) for baseline in ("steps", "widened")]
        ratio = max(ratios, key=lambda ratio: ratio.value)
        name = f"{brier.name} of the better of {BASELINES['steps']} and {BASELINES['widened']}"
        yield _goal(name, f"at most {BRIER_MOST:g}", ratio, ratio.value <= BRIER_MOST)


def _never_worse(skill: Skill, resamples: int) -> Iterator[Goal]:
    """At how many lead times CRPS and Brier lie above a baseline's with the whole interval."""
    scores: list[Score] = [*_of_kind(skill, Crps), *_of_kind(skill, Brier)]
    for baseline in ("steps", "widened"):
        for score in scores:
            low = skill.difference(score, baseline, resamples).low
            known = len(skill.init_times) >= FEWEST_RUNS and not low.isnan().all()
            worse = Estimate(float((low > 0).sum()) if known else math.nan, math.nan, math.nan)
            name = f"lead times with {score.name} significantly above that of {BASELINES[baseline]}"
            yield _goal(name, "none", worse, worse.value == 0)


def _decisions(skill: Skill, resamples: int) -> Iterator[Goal]:
    """CSI at the lead time nearest to half an hour."""
    at = min(range(len(skill.lead_times)), key=lambda lead: abs(skill.lead_times[lead] - AHEAD))
    for score in _of_kind(skill, Csi):
        for baseline in ("extrapolation", "steps"):
            told = skill.difference(score, baseline, resamples)
            parts = (told.relative, told.relative_low, told.relative_high)
            ratio = Estimate(*(1 + float(part[at]) for part in parts))
            name = f"{score.name} at {AHEAD:g} min of {BASELINES[baseline]}"
            yield _goal(name, f"at least {CSI_LEAST:g}", ratio, ratio.value >= CSI_LEAST)


def _places(skill: Skill, kilometres: float, resamples: int) -> Iterator[Goal]:
    """FSS, as a mean over the lead times."""
    for scale, score in neighbourhoods(kilometres).items():
        ratio = skill.ratio(score, "steps", resamples)
        name = f"FSS >= {HEAVY:g} mm/h, {scale:g} km, of {BASELINES['steps']}"
        yield _goal(name, "above 1", ratio, ratio.value > 1)


def _reliable(skill: Skill, resamples: int) -> Iterator[Goal]:
    """The distance from the diagonal, and the slope, over all lead times together."""
    least, most = SLOPE
    for score in _of_kind(skill, Reliability):
        error = skill.pooled(score, score.value, resamples)
        yield _goal(score.name, f"below {ERROR_MOST:g}", error, error.value < ERROR_MOST)
    for score in _of_kind(skill, Reliability):
        slope = skill.pooled(score, score.slope, resamples)
        name = f"Reliability slope >= {score.threshold:g} mm/h"
        yield _goal(name, f"{least:g} to {most:g}", slope, least <= slope.value <= most)
