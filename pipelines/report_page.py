"""The verification report as one page that needs nothing else: styles and figures are inside."""

import inspect
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from torch import Tensor

from metnet.scores.brier import Brier
from metnet.scores.crps import Crps
from metnet.scores.reliability import Reliability
from metnet.scores.score import Score
from pipelines.figures import Case, advantages, case_maps, reliability_diagrams, score_curves
from pipelines.report import (
    DECIDED,
    TIME,
    Report,
    as_json,
    best_rows,
    decides,
    headline,
    number,
    scope,
    second_sentence,
    spread,
    verdict,
)
from pipelines.skill import FEWEST_RUNS, LEVEL, Skill, perfect
from pipelines.version import version
from pipelines.words import plural

COLUMNS = 12  # lead times in the table at most
TEMPLATE = Path(__file__).with_name("report.html")


def write(report: Report, case: Case, folder: str) -> None:
    """Writes report.json and report.html into a folder, each whole or not at all; makes the folder."""
    numbers, page = json.dumps(as_json(report), indent=1, allow_nan=False), as_html(report, case)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    _replace(place / "report.json", numbers + "\n")
    _replace(place / "report.html", page)


def as_html(report: Report, case: Case) -> str:
    """One page that needs nothing else: styles and figures are inside."""
    skill = report.skill
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"Rain forecasts verified, {skill.init_times[0]:%Y-%m-%d}"),
        headline=escape(headline(report)),
        second=escape(second_sentence(report)),
        scope=escape(scope(report)),
        reference=escape(report.reference),
        level=f"{100 * LEVEL:.0f} %",
        table=_table(report),
        intervals=_intervals(report),
        decided=f"<p>{DECIDED}.</p>" if decides(skill) else "",
        advantage=_advantage(report),
        curves=score_curves(skill),
        reliability=_reliability(skill),
        case_time=f"{case.init_time:{TIME}} UTC",
        maps=case_maps(case),
        facts=_terms(_facts(report)),
        definitions=_definitions(skill.scores),
    )


def _advantage(report: Report) -> str:
    """How much lower than the baselines' the scores are for which lower is better, whatever their size."""
    scores = [score for score in report.skill.scores if isinstance(score, Crps | Brier)]
    if not scores:
        return ""
    figure = advantages(report.skill, scores, report.differences)
    return (
        "<section><h2>Against the baselines</h2>"
        "<p>How much lower the forecast's score is than each baseline's: below zero it is better. Bands are "
        f"{100 * LEVEL:.0f} % intervals from drawing the runs anew; where a band crosses zero there is no "
        f'clear difference.</p><div class="card">{figure}</div></section>'
    )


def _reliability(skill: Skill) -> str:
    """The reliability diagrams, if there are any."""
    diagrams = reliability_diagrams(skill)
    if not diagrams:
        return ""
    return (
        "<section><h2>Reliability</h2>"
        "<p>On the dashed line, rain comes as often as it is forecast; below it, probabilities are too high. "
        "All lead times together; a forecast of one number says only 0 or 1. The bars count the forecast's "
        f'pixels.</p>{_calibrated(skill)}<div class="card narrow">{diagrams}</div></section>'
    )


def _calibrated(skill: Skill) -> str:
    """What calibrating did to the distance from the diagonal, if the forecast was calibrated."""
    said = []
    for score in skill.scores:
        if isinstance(score, Reliability) and score.name in skill.uncalibrated:
            before, after = skill.uncalibrated[score.name], skill.sums[score.name][0]
            runs = before.flatten(1).any(dim=1)  # that were calibrated
            said.append(
                f"{score.name.removeprefix('Calibration error ')} from "
                f"{100 * _error(score, before[runs]):.1f} to {100 * _error(score, after[runs]):.1f} %"
            )
    if not said:
        return ""
    return (
        "<p>The forecast was calibrated on validation data of its training; the dotted line is what the "
        "network itself said. Calibrating changed the mean distance from the dashed line for "
        f"{escape('; '.join(said))}.</p>"
    )


def _error(score: Reliability, sums: Tensor) -> float:
    """The calibration error over all runs and lead times."""
    return float(score.value(sums.sum(dim=(0, 1))[None])[0])


def _table(report: Report) -> str:
    """The skill table as HTML."""
    skill = report.skill
    leads = spread(len(skill.lead_times), COLUMNS)
    rows = []
    for score in skill.scores:
        values, best = skill.values(score), best_rows(skill, score)
        title = f"{escape(score.name)} <small>({perfect(score):g} is best)</small>"
        rows.append(f'<tr><th colspan="{len(leads) + 1}"><span>{title}</span></th></tr>')
        for row, name in enumerate(skill.forecasters):
            said = [_minus(number(float(values[row, lead]))) for lead in leads]
            marks = [" class=best" if row in best[lead] else "" for lead in leads]
            cells = "".join(f"<td{mark}>{text}</td>" for mark, text in zip(marks, said, strict=True))
            rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
        rows.append(_difference_row(report, score, leads))
    return _by_lead_time(report, leads, rows)


def _difference_row(report: Report, score: Score, leads: Sequence[int]) -> str:
    """The forecast's difference from the reference."""
    value = report.differences[score.name][report.reference].value
    cells = _judged(report, score, {lead: _signed_number(float(value[lead])) for lead in leads})
    return f'<tr class="difference"><td>forecast less {escape(report.reference)}</td>{cells}</tr>'


def _intervals(report: Report) -> str:
    """The intervals of these differences, in a table to unfold; nothing where there are none."""
    skill = report.skill
    if len(skill.init_times) < FEWEST_RUNS:
        return ""
    leads = spread(len(skill.lead_times), COLUMNS)
    rows = []
    for score in skill.scores:
        difference = report.differences[score.name][report.reference]
        spans = {lead: _span(float(difference.low[lead]), float(difference.high[lead])) for lead in leads}
        rows.append(f"<tr><td>{escape(score.name)}</td>{_judged(report, score, spans)}</tr>")
    name = f"{100 * LEVEL:.0f} % intervals of the forecast's difference from {escape(report.reference)}"
    return (
        f'<details><summary>{name}</summary><div class="card" role="region" aria-label="{name}" '
        f'tabindex="0">{_by_lead_time(report, leads, rows)}</div></details>'
    )


def _span(low: float, high: float) -> str:
    return f"{_signed_number(low)} to&nbsp;{_signed_number(high)}" if low == low else _minus(number(low))


def _judged(report: Report, score: Score, said: Mapping[int, str]) -> str:
    """A cell for each lead time, coloured where the difference from the reference is clear."""
    return "".join(
        f'<td class="{verdict(report, score, report.reference, lead)}">{text}</td>'
        for lead, text in said.items()
    )


def _by_lead_time(report: Report, leads: Sequence[int], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{report.skill.lead_times[lead]:g} min</th>" for lead in leads)
    return f"<table><thead><tr><th>lead time</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _facts(report: Report) -> list[tuple[str, str]]:
    """What was verified, line by line."""
    skill, source = report.skill, report.provenance
    coverage = skill.pixels.sum(dim=0) / skill.observed.sum(dim=0)
    grid = source.grid
    facts = [
        ("period", f"{skill.init_times[0]:{TIME}} to {skill.init_times[-1]:{TIME}} UTC (init times)"),
        ("runs", f"{len(skill.init_times)} verified, {len(report.skipped)} left out"),
        ("grid", f"{grid.y_size} x {grid.x_size} cells of {grid.cell_size / 1000:.3g} km"),
        (
            "pixels that count",
            ", ".join(
                f"{100 * float(share):.0f} % at {lead:g} min"
                for lead, share in zip(skill.lead_times, coverage, strict=True)
            )
            + " of the observed ones",
        ),
        (
            "mean rain",
            f"{float(skill.rain.sum() / skill.pixels.sum()):.3g} mm/h over the pixels that count",
        ),
        ("intervals", _method(report)),
        ("cube", f"{source.cube}, snapshot {source.cube_snapshot}"),
        ("forecasts", f"{source.forecasts}, snapshot {source.forecasts_snapshot}"),
        ("software", f"metnet-nowcast {version()}"),
    ]
    facts += [(key.replace("_", " "), _shortened(values)) for key, values in source.attributes.items()]
    return facts + [(f"left out: {name}", reason) for name, reason in report.skipped.items()]


def _definitions(scores: Sequence[Score]) -> str:
    """What each kind of score is, by its class's own words, and how it was called."""
    kinds: dict[type[Score], list[Score]] = {}
    for score in scores:
        kinds.setdefault(type(score), []).append(score)
    terms = []
    for kind, members in kinds.items():
        words = " ".join((inspect.getdoc(kind) or "").replace("`", "").split())
        calls = ", ".join(f"<code>{escape(repr(score))}</code>" for score in members)
        names = "<br>".join(escape(score.name) for score in members)
        terms.append(f"<dt>{names}</dt><dd>{escape(words)}<br>{calls}</dd>")
    return "".join(terms)


def _method(report: Report) -> str:
    """How the intervals were found."""
    if len(report.skill.init_times) < FEWEST_RUNS:
        return f"none: they need at least {FEWEST_RUNS} runs"
    together = plural(report.skill.block, "neighbouring run")
    return (
        f"{100 * LEVEL:.0f} % of {report.resamples} paired resamples of the runs, {together} drawn together"
    )


def _terms(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in pairs)


def _shortened(values: Sequence[str]) -> str:
    """A few values, each at most some lines long."""
    text = "; ".join(value if len(value) <= 400 else f"{value[:400]} ..." for value in values[:3])
    return text if len(values) <= 3 else f"{text}; and {len(values) - 3} more"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _signed_number(value: float) -> str:
    text = _minus(number(value))
    return f"+{text}" if value > 0 else text


def _replace(path: Path, text: str) -> None:
    """Puts a whole file in place at once."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    made = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        made.chmod(0o644)
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise
