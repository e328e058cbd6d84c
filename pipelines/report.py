"""`Report`: the outcome of a verification, as numbers (`report.json`) and in words."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metnet.scores.crps import Crps
from metnet.scores.csi import Csi
from metnet.scores.reliability import Reliability
from metnet.scores.score import Score
from pipelines.grid import Grid
from pipelines.skill import FEWEST_RUNS, LEVEL, Difference, Skill, perfect
from pipelines.version import version
from pipelines.words import plural

HEADLINE_LEAD = 30  # minutes; the lead time nearest to it is the one the headline tells
UNCALIBRATED = "forecast, not calibrated"
COLUMNS = 6  # lead times in the table on a terminal at most
TIME = "%Y-%m-%d %H:%M"
DECIDED = "CSI: one cut by forecaster and lead time for all runs, where its own probabilities expect most"


@dataclass(frozen=True)
class Provenance:
    """Which data and which model the numbers are about."""

    cube: str
    cube_snapshot: str
    forecasts: str
    forecasts_snapshot: str
    grid: Grid
    attributes: Mapping[str, Sequence[str]]  # of the runs: every value that occurs


@dataclass(frozen=True, eq=False)
class Report:
    """Skill, and the forecast's differences from each baseline, with where it all comes from."""

    skill: Skill
    reference: str  # the baseline that sentences and tables compare with
    differences: Mapping[str, Mapping[str, Difference]]  # by score, by baseline
    resamples: int
    provenance: Provenance
    skipped: Mapping[str, str]  # runs that were not verified, with the reason

    @classmethod
    def of(
        cls, skill: Skill, reference: str, resamples: int, provenance: Provenance, skipped: Mapping[str, str]
    ) -> "Report":
        """The report on a skill."""
        differences = {
            score.name: {name: skill.difference(score, name, resamples) for name in skill.forecasters[1:]}
            for score in skill.scores
        }
        return cls(skill, reference, differences, resamples, provenance, skipped)


def headline(report: Report) -> str:
    """The outcome in one sentence."""
    skill, score = report.skill, main_score(report.skill)
    at = min(range(len(skill.lead_times)), key=lambda i: abs(skill.lead_times[i] - HEADLINE_LEAD))
    difference = report.differences[score.name][report.reference]
    relative, low, high = (
        100 * float(part[at])
        for part in (difference.relative, difference.relative_low, difference.relative_high)
    )
    name = score.name.split()[0]
    start = f"At {skill.lead_times[at]:g} minutes the forecast's {name} is"
    runs = plural(len(skill.init_times), "run")
    if relative != relative:
        reason = f"{report.reference}'s is 0" if difference.value[at].isfinite() else "nothing was counted"
        return f"{start} not comparable with {report.reference}'s: {reason}, over {runs}."
    size = f"{abs(relative):.0f} % {'lower' if relative < 0 else 'higher'} than {report.reference}'s"
    if low != low:
        return f"{start} {size} over {runs}: too few to say how sure that is."
    clear = low > 0 or high < 0
    near, far = sorted((abs(low), abs(high)))
    span = f"{near:.0f} to {far:.0f} %" if clear else f"{_signed(low)} to {_signed(high)} %"
    doubt = "" if clear else ": no clear difference"
    return f"{start} {size} ({100 * LEVEL:.0f} % interval {span}), over {runs}{doubt}."


def second_sentence(report: Report) -> str:
    """At which lead times the forecast is clearly better or worse than the reference."""
    skill, score = report.skill, main_score(report.skill)
    if len(skill.init_times) < FEWEST_RUNS:
        return f"With fewer than {FEWEST_RUNS} runs there are no intervals; verify more before you trust it."
    said = [verdict(report, score, report.reference, lead) for lead in range(len(skill.lead_times))]
    parts = []
    for word, text in (("better", "clearly better"), ("worse", "clearly worse"), ("", "no clear difference")):
        leads = [lead for lead, told in enumerate(said) if told == word]
        if leads:
            parts.append(f"{text} at {_ranges(skill.lead_times, leads)} minutes")
    return f"By {score.name.split()[0]}, beside {report.reference}: {'; '.join(parts)}."


def verdict(report: Report, score: Score, baseline: str, lead: int) -> str:
    """`better` or `worse` where the whole interval is nearer to a perfect score, or farther; else nothing."""
    difference = report.differences[score.name][baseline]
    if difference.away_high[lead] < 0:
        return "better"
    return "worse" if difference.away_low[lead] > 0 else ""


def text_table(report: Report) -> str:
    """The skill table for a terminal: a row for each score and forecaster, a column for each lead time."""
    skill = report.skill
    chosen = spread(len(skill.lead_times), COLUMNS)
    width = max(len(score.name) for score in skill.scores) + 2
    who = max(len(name) for name in skill.forecasters) + 2
    lines = [
        headline(report),
        scope(report),
        "",
        f"{'lead time, minutes':{width + who}}" + "".join(f"{skill.lead_times[i]:>9g} " for i in chosen),
    ]
    for score in skill.scores:
        values, best = skill.values(score), best_rows(skill, score)
        for row, name in enumerate(skill.forecasters):
            cells = "".join(
                f"{number(float(values[row, i])):>9}{'*' if row in best[i] else ' '}" for i in chosen
            )
            lines.append(f"{score.name if row == 0 else '':{width}}{name:{who}}{cells}".rstrip())
    lines.append("* best at that lead time")
    if decides(skill):
        lines.append(DECIDED)
    for reason in dict.fromkeys(report.skipped.values()):
        runs = [run for run, why in report.skipped.items() if why == reason]
        more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
        lines.append(f"left out: {', '.join(runs[:3])}{more}: {reason}")
    return "\n".join(lines)


def decides(skill: Skill) -> bool:
    """Whether the forecasters themselves choose from which probability on they say yes."""
    return any(isinstance(score, Csi) and score.cut is None for score in skill.scores)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly spread, with both ends."""
    return torch.linspace(0, count - 1, min(most, count)).round().int().tolist()


def scope(report: Report) -> str:
    """Whose forecasts, and over what: runs, period and pixels."""
    skill = report.skill
    period = f"{skill.init_times[0]:{TIME}} to {skill.init_times[-1]:{TIME}} UTC"
    pixels, observed = float(skill.pixels.sum()), float(skill.observed.sum())
    skipped = f", {plural(len(report.skipped), 'run')} left out" if report.skipped else ""
    models = report.provenance.attributes.get("model", ())
    return (
        f"{' and '.join(models)}{': ' if models else ''}{plural(len(skill.init_times), 'run')} "
        f"from {period}{skipped}; {pixels:,.0f} pixels, "
        f"{100 * pixels / observed:.0f} % of the observed ones (those where all have a forecast)."
    )


def best_rows(skill: Skill, score: Score) -> list[set[int]]:
    """For each lead time the forecasters nearest to a perfect score; none where nothing was counted."""
    away = (skill.values(score) - perfect(score)).abs().nan_to_num(nan=torch.inf)
    least = away.min(dim=0).values
    return [
        {row for row, value in enumerate(column) if value == low} if low < torch.inf else set()
        for column, low in zip(away.T.tolist(), least.tolist(), strict=True)
    ]


def as_json(report: Report) -> dict[str, Any]:
    """Every number of the report; null where nothing was counted."""
    skill, source = report.skill, report.provenance
    return {
        "headline": headline(report),
        "software": f"metnet-nowcast {version()}",
        "cube": {"path": source.cube, "snapshot": source.cube_snapshot},
        "forecasts": {"path": source.forecasts, "snapshot": source.forecasts_snapshot},
        "provenance": {key: list(values) for key, values in source.attributes.items()},
        "grid": {
            "crs_wkt": source.grid.crs,
            "shape": list(source.grid.shape),
            "cell_size_m": source.grid.cell_size,
        },
        "forecasters": list(skill.forecasters),
        "reference": report.reference,
        "lead_times_min": list(skill.lead_times),
        "pixels": _plain(skill.pixels.sum(dim=0)),
        "observed_pixels": _plain(skill.observed.sum(dim=0)),
        "runs": [
            {
                "init_time": time.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "pixels": _plain(skill.pixels[index]),
                "mean_rain_mm_h": _plain(skill.rain[index] / skill.pixels[index]),
            }
            for index, time in enumerate(skill.init_times)
        ],
        "skipped_runs": [{"run": name, "reason": reason} for name, reason in report.skipped.items()],
        "interval": {
            "level": LEVEL,
            "method": "circular block bootstrap over runs, paired",
            "resamples": report.resamples,
            "block_runs": skill.block,
            "fewest_runs": FEWEST_RUNS,
        },
        "scores": [_score_json(report, score) for score in skill.scores],
        "reliability": [
            _reliability_json(skill, score) for score in skill.scores if isinstance(score, Reliability)
        ],
    }


def _score_json(report: Report, score: Score) -> dict[str, Any]:
    """One score of all forecasters, and its differences."""
    skill = report.skill
    values = skill.values(score)
    return {
        "name": score.name,
        "definition": " ".join((inspect.getdoc(type(score)) or "").split()),
        "best": perfect(score),
        "values": {name: _plain(values[row]) for row, name in enumerate(skill.forecasters)},
        "sums": {
            name: _plain(skill.sums[score.name][row].sum(dim=0)) for row, name in enumerate(skill.forecasters)
        },
        "differences": {
            name: {
                "difference": _plain(difference.value),
                "low": _plain(difference.low),
                "high": _plain(difference.high),
                "relative": _plain(difference.relative),
                "relative_low": _plain(difference.relative_low),
                "relative_high": _plain(difference.relative_high),
            }
            for name, difference in report.differences[score.name].items()
        },
    }


def _reliability_json(skill: Skill, score: Reliability) -> dict[str, Any]:
    """The reliability diagram of each forecaster, by lead time and bin."""
    sums = {name: skill.sums[score.name][row] for row, name in enumerate(skill.forecasters)}
    if score.name in skill.uncalibrated:
        sums[UNCALIBRATED] = skill.uncalibrated[score.name]
    curves = {name: score.curve(parts.sum(dim=0)) for name, parts in sums.items()}
    return {
        "threshold_mm_h": score.threshold,
        "curves": {
            name: {
                "probability": _plain(curve.probability),
                "frequency": _plain(curve.frequency),
                "count": _plain(curve.count),
                "calibration_error": _plain(score.value(sums[name].sum(dim=0))),
                "slope": _plain(score.slope(sums[name].sum(dim=0))),
            }
            for name, curve in curves.items()
        },
    }


def main_score(skill: Skill) -> Score:
    """What the headline is about: the CRPS, for it judges the whole distribution; else the first score."""
    return next((score for score in skill.scores if isinstance(score, Crps)), skill.scores[0])


def _plain(values: Tensor) -> Any:
    """Numbers as JSON knows them: null where not finite."""
    if values.ndim:
        return [_plain(value) for value in values]
    number = float(values)
    return number if abs(number) < float("inf") else None


def number(value: float) -> str:
    """Three or four decimals, as tables want them; a dash for NaN."""
    if value != value:
        return "-"
    digits = 4 if abs(value) < 0.1 else 3
    return f"{round(value, digits) + 0.0:.{digits}f}"  # plus 0: no minus before nothing


def _ranges(lead_times: Sequence[float], chosen: Sequence[int]) -> str:
    """Lead times in words: neighbours as a range."""
    runs: list[list[int]] = []
    for index in chosen:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    ends = [(lead_times[run[0]], lead_times[run[-1]]) for run in runs]
    return ", ".join(f"{first:g}" if first == last else f"{first:g} to {last:g}" for first, last in ends)


def _signed(percent: float) -> str:
    return f"{percent:+.0f}".replace("-", "−")
