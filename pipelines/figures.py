"""Figures of the verification report: SVG whose text and lines take the colour of the page around them.

And of `bench_skill`: a picture that stands by itself.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from metnet.scores.reliability import Reliability
from metnet.scores.score import Score
from pipelines.palette import MISSING_COLOUR, RAIN_LEVELS, rain_colours
from pipelines.skill import Difference, Estimate, Skill, perfect

INK = "#010203"  # stands for the colour of the page's text
COLOURS = ("#2b7bd6", "#8a8f98", "#e0761a", "#1f9d77", "#b05fc4", "#c9a100")
MARKS = ("o", "s", "^", "D", "v", "P")
SIDE = 320  # cells of a map at most; a report is looked at, not zoomed into
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}
Fields = NDArray[np.float32]
Bins = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Case:
    """One run to look at: fields (lead, y, x), thinned for the page; NaN is unobserved, or no forecast."""

    init_time: datetime
    lead_times: tuple[float, ...]  # minutes
    threshold: float  # mm/h, of `probability`
    baseline: str
    observed: Fields  # mm/h
    median: Fields  # mm/h
    probability: Fields  # 0..1
    other: Fields  # mm/h, what the baseline says


def thinned(field: Fields, side: int = SIDE) -> Fields:
    """Means over the known cells of square blocks, so that neither side has more than `side` of them."""
    step = -(-max(field.shape) // side)
    rows, columns = (-(-size // step) for size in field.shape)
    padded = np.full((rows * step, columns * step), np.nan, np.float32)
    padded[: field.shape[0], : field.shape[1]] = field
    blocks = padded.reshape(rows, step, columns, step)
    known = (~np.isnan(blocks)).sum(axis=(1, 3))
    total = np.nansum(blocks, axis=(1, 3))
    return np.where(known > 0, total / np.maximum(known, 1), np.nan).astype(np.float32)


def score_curves(skill: Skill) -> str:
    """Every score by lead time, for all forecasters."""
    columns = 3
    rows = -(-len(skill.scores) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 2.35 * rows + 0.4), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, score in zip(panels, skill.scores, strict=False):
            _curves(panel, skill, score)
        for panel in panels[len(skill.scores) :]:
            panel.set_visible(False)
        _legend(figure, panels[0])
        return _svg(figure, "scores by lead time")


def advantages(
    skill: Skill, scores: Sequence[Score], differences: Mapping[str, Mapping[str, Difference]]
) -> str:
    """How much lower or higher scores are than each baseline's, in percent, with their intervals."""
    columns = min(2, len(scores))
    rows = -(-len(scores) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 2.5 * rows + 0.4), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, score in zip(panels, scores, strict=False):
            _advantage(panel, skill, score, differences[score.name])
        for panel in panels[len(scores) :]:
            panel.set_visible(False)
        _legend(figure, panels[0])
        return _svg(figure, "difference from the baselines by lead time")


def reliability_diagrams(skill: Skill) -> str:
    """Observed frequency by forecast probability over all lead times, above how often each was said."""
    scores = [score for score in skill.scores if isinstance(score, Reliability)]
    if not scores:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.5 * max(len(scores), 2), 4.6), layout="constrained")
        panels = figure.subplots(2, len(scores), squeeze=False, height_ratios=(3, 1), sharex=True)
        for (upper, lower), score in zip(panels.T, scores, strict=True):
            _reliability(upper, lower, skill, score)
        panels[0, 0].set_ylabel("observed frequency")
        panels[1, 0].set_ylabel("pixels")
        _legend(figure, panels[0, 0])
        return _svg(figure, "reliability diagrams")


def event_ratios(
    told: Mapping[str, Mapping[str, Mapping[str, Estimate]]], best: Mapping[str, float]
) -> bytes:
    """A PNG of the ratios to baselines (by score, baseline and event), with their intervals.

    A panel for each score, a line for each event; filled marks are of intervals on one side of 1. `best` is
    what a perfect forecast scores: where it is 0 less is better, and else more.
    """
    columns = min(3, len(told))
    rows = -(-len(told) // columns)
    events = list(dict.fromkeys(name for score in told.values() for one in score.values() for name in one))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * columns, (0.3 * len(events) + 0.9) * rows + 0.4), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for panel, (name, baselines) in zip(panels, told.items(), strict=False):
            _ratios(panel, name, baselines, events, less=best[name] == 0)
        for panel in panels[len(told) :]:
            panel.set_visible(False)
        panels[0].set(yticks=range(len(events)), yticklabels=events, ylim=(len(events) - 0.5, -0.5))
        _legend(figure, panels[0])
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def case_maps(case: Case) -> str:
    """What was seen and what was said, one column a lead time."""
    rates, norm = rain_colours()
    chances = matplotlib.colormaps["Purples"].with_extremes(bad=MISSING_COLOUR)
    rows: list[tuple[str, Fields, Any, Any]] = [
        ("observed", case.observed, rates, norm),
        ("forecast: median", case.median, rates, norm),
        (f"{case.baseline}", case.other, rates, norm),
        (
            f"forecast: chance of\n{case.threshold:g} mm/h or more",
            100 * case.probability,
            chances,
            Normalize(0, 100),
        ),
    ]
    shape = case.observed.shape[1:]
    width = 3.0
    height = min(width * shape[0] / shape[1], 4.5)
    with matplotlib.rc_context(
        {
            **STYLE,
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.grid": False,
            "axes.spines.top": True,
            "axes.spines.right": True,
        }
    ):
        figure = Figure(
            figsize=(width * len(case.lead_times) + 1.6, (height + 0.1) * 4 + 0.5), layout="constrained"
        )
        panels = figure.subplots(4, len(case.lead_times), squeeze=False)
        for line, (label, fields, colours, scale) in zip(panels, rows, strict=True):
            for panel, field in zip(line, fields, strict=True):
                panel.imshow(field, cmap=colours, norm=scale, interpolation="none")
                panel.set(xticks=[], yticks=[])
            line[0].set_ylabel(label)
        for panel, lead in zip(panels[0], case.lead_times, strict=True):
            panel.set_title(f"+{lead:g} min")
        rain = figure.colorbar(
            ScalarMappable(norm, rates), ax=panels[:3].ravel().tolist(), ticks=RAIN_LEVELS, spacing="uniform",
            aspect=40, shrink=0.7, label="mm/h",
        )  # fmt: skip
        rain.ax.set_yticklabels([f"{level:g}" for level in RAIN_LEVELS])
        rain.minorticks_off()
        figure.colorbar(
            ScalarMappable(Normalize(0, 100), chances), ax=panels[3].ravel().tolist(), aspect=14, label="%"
        )
        return _svg(figure, "maps of one run")


def _advantage(panel: Axes, skill: Skill, score: Score, differences: Mapping[str, Difference]) -> None:
    """The relative difference of one score from each baseline."""
    panel.axhline(0, color=INK, linewidth=1)
    for index, name in enumerate(skill.forecasters[1:], start=1):
        difference = differences[name]
        colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
        line = 100 * difference.relative.numpy()
        panel.plot(skill.lead_times, line, color=colour, marker=mark, markersize=4, label=f"beside {name}")
        low, high = 100 * difference.relative_low.numpy(), 100 * difference.relative_high.numpy()
        panel.fill_between(skill.lead_times, low, high, color=colour, alpha=0.2, linewidth=0)
    panel.set_title(score.name)
    panel.set_ylabel("difference, %")
    _lead_axis(panel)


def _ratios(
    panel: Axes,
    title: str,
    told: Mapping[str, Mapping[str, Estimate]],
    events: Sequence[str],
    less: bool,
) -> None:
    """One score of all events by each baseline's."""
    panel.axvline(1, color=INK, linewidth=1)
    for index, (baseline, ratios) in enumerate(told.items()):
        colour, mark = (COLOURS[0], COLOURS[2])[index % 2], MARKS[index % len(MARKS)]
        places = np.array([events.index(name) for name in ratios]) + 0.3 * (index - (len(told) - 1) / 2)
        numbers = np.array([(one.value, one.low, one.high) for one in ratios.values()]).reshape(-1, 3)
        value, low, high = np.where(np.isfinite(numbers), numbers, np.nan).T
        sure = (high < 1) | (low > 1)
        panel.hlines(places, low, high, color=colour, linewidth=1.4)
        panel.scatter(
            value,
            places,
            s=20,
            marker=mark,
            color=colour,
            facecolor=np.where(sure, colour, "white"),
            zorder=3,
            label=f"by that of {baseline}",
        )
    left, right = panel.get_xlim()
    panel.axvspan(*((left, 1) if less else (1, right)), color=COLOURS[3], alpha=0.08, linewidth=0, zorder=0)
    panel.set_xlim(left, right)
    panel.set_title(title)
    panel.set_xlabel(f"ratio; {'below' if less else 'above'} 1 the forecast is better")


def _legend(figure: Figure, panel: Axes) -> None:
    """One legend above all panels, in the order of the forecasters."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))


def _curves(panel: Axes, skill: Skill, score: Score) -> None:
    """One score by lead time."""
    values = skill.values(score)
    for index, (name, line) in enumerate(zip(skill.forecasters, values, strict=True)):
        panel.plot(
            skill.lead_times,
            line,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKS[index % len(MARKS)],
            markersize=4,
            linewidth=2.2 if index == 0 else 1.4,
            zorder=len(skill.forecasters) - index + 2,
            label=name,
        )
    best = perfect(score)
    finite = values[values.isfinite()]
    if len(finite) and bool((finite >= 0).all()):
        panel.set_ylim(bottom=0, top=None if best < 0.5 else 1)
    else:
        panel.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    panel.set_title(f"{score.name}  ({best:g} is best)")
    _lead_axis(panel)


def _lead_axis(panel: Axes) -> None:
    panel.set_xlabel("lead time, minutes")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def _reliability(upper: Axes, lower: Axes, skill: Skill, score: Reliability) -> None:
    """One diagram and, below, how many pixels had each probability."""
    upper.plot([0, 1], [0, 1], color=INK, linewidth=1, alpha=0.5, linestyle=(0, (4, 3)))
    edges = np.linspace(0, 1, score.bins + 1)
    if score.name in skill.uncalibrated:
        probability, frequency, _ = _curve(score, skill.uncalibrated[score.name])
        upper.plot(
            probability, frequency, color=COLOURS[0], linewidth=1, linestyle=":", label="not calibrated"
        )
    for index, name in enumerate(skill.forecasters):
        probability, frequency, count = _curve(score, skill.sums[score.name][index])
        colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
        line = "-" if index == 0 else "none"
        upper.plot(
            probability, frequency, color=colour, marker=mark, markersize=5, linestyle=line, label=name
        )
        if index == 0:
            lower.bar((edges[1:] + edges[:-1]) / 2, count, width=0.9 / score.bins, color=colour)
    lower.set_yscale("log")
    upper.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), box_aspect=1)
    lower.set_box_aspect(1 / 3)
    upper.set_title(f"rain >= {score.threshold:g} mm/h")
    lower.set_xlabel("forecast probability")


def _curve(score: Reliability, sums: Tensor) -> tuple[Bins, Bins, Bins]:
    """Of each bin over all runs and lead times: mean probability and frequency, NaN where empty; pixels."""
    curve = score.curve(sums.sum(dim=(0, 1))[None])
    return curve.probability[0].numpy(), curve.frequency[0].numpy(), curve.count[0].numpy()


def _svg(figure: Figure, label: str) -> str:
    """The figure as an element to stand within a page."""
    file = io.StringIO()
    salt = re.sub(r"\W", "", label)
    with matplotlib.rc_context(
        {"svg.hashsalt": salt}
    ):  # names within one page must differ from figure to figure
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1),
        count=1,
    )
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
