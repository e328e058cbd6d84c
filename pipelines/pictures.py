"""Pictures: a field, or a row of fields, on its grid with parallels and meridians (PNG)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pipelines.cf import RAINFALL_RATE, Variable
from pipelines.grid import Grid
from pipelines.palette import MISSING_COLOUR, RAIN_LEVELS, rain_colours

SIDE = 1000  # cells of a field that are drawn, at most, along its longer side
PANEL = 4.2  # inches, the longer side of a small field
FIELD = 9.0  # inches, the longer side of a single field
CHANCES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)  # where each colour of a probability begins
CHANCE_COLOURS = (
    "#ffffff",
    "#e3eef9",
    "#bcd7ee",
    "#86b9e0",
    "#4f95cd",
    "#2a6fb0",
    "#3b4a9c",
    "#4a2a83",
    "#3d0f57",
)
NO_ECHO = -20.0  # dBZ; services write "no echo" as numbers far below the others
RAINY_UNITS = {"mm h-1": "mm/h", "mm": "mm"}  # drawn in the colours of rain
Field = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Panel:
    """One field with its title, in the units of its quantity; or a probability within 0..1."""

    title: str
    field: Field
    probability: bool = False
    variable: Variable = RAINFALL_RATE
    missing: str = "not observed"  # what NaN says; of a forecast it is "no forecast"


@dataclass(frozen=True)
class Scale:
    """What the colours of a row of panels mean."""

    colours: Colormap
    norm: Normalize
    ticks: Sequence[float] | None  # None: where matplotlib puts them
    labels: Sequence[str] | None
    meaning: str


def draw(path: Path, title: str, grid: Grid, rows: Sequence[Sequence[Panel]]) -> None:
    """Draws panels, each row with one scale of colours; NaN is grey. The file is replaced whole."""
    count = max(len(row) for row in rows)
    wide, high = _size(grid, FIELD if count == len(rows) == 1 else PANEL)
    figure = Figure(figsize=(wide * count + 1.3, high * len(rows) + 0.9), layout="constrained", dpi=110)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes = figure.subplots(len(rows), count, squeeze=False, sharex=True, sharey=True)
    for line, row in zip(axes, rows, strict=True):
        scale = scale_of(row)
        for panel, place in zip(row, line, strict=False):
            _draw(place, grid, panel, scale)
        for place in line[len(row) :]:
            place.set_visible(False)
        show_scale(figure, list(line[: len(row)]), scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        figure.savefig(unfinished, format="png")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _size(grid: Grid, longer: float) -> tuple[float, float]:
    """Inches of a panel, true to the shape of the grid."""
    high, wide = grid.y_size * -grid.y_step * _stretch(grid), grid.x_size * grid.x_step
    return longer * wide / max(wide, high), longer * high / max(wide, high)


def _stretch(grid: Grid) -> float:
    """How much longer a unit of y is than one of x: on a grid of degrees, at its middle latitude."""
    if not grid.is_geographic:
        return 1.0
    middle = grid.y_first + grid.y_step * (grid.y_size - 1) / 2
    return 1 / max(0.1, float(np.cos(np.radians(middle))))


def _draw(axes: Axes, grid: Grid, panel: Panel, scale: Scale) -> None:
    """The field, and where north of it the parallels and meridians run."""
    step = -(-max(grid.shape) // SIDE)
    unit = 1.0 if grid.is_geographic else 1e-3  # degrees, or km from m
    west, north = grid.x_first - grid.x_step / 2, grid.y_first - grid.y_step / 2
    east, south = west + grid.x_step * grid.x_size, north + grid.y_step * grid.y_size
    axes.imshow(
        panel.field[::step, ::step],
        cmap=scale.colours,
        norm=scale.norm,
        extent=(west * unit, east * unit, south * unit, north * unit),
        interpolation="nearest",
    )
    axes.set_aspect(_stretch(grid))
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.tick_params(labelsize=8, length=3, color="#999999")
    named = "degrees" if grid.is_geographic else "km"
    axes.set_xlabel("degrees east" if grid.is_lonlat else f"x, {named}", fontsize=8)
    axes.set_ylabel("degrees north" if grid.is_lonlat else f"y, {named}", fontsize=8)
    axes.label_outer()
    if grid.is_lonlat:
        axes.grid(color="#000000", alpha=0.15, linewidth=0.5)
    else:
        _graticule(axes, grid, unit)


def _graticule(axes: Axes, grid: Grid, unit: float) -> None:
    """Parallels and meridians with their degrees, over a grid of a projection; a single line shows none."""
    if min(grid.shape) < 2:
        return
    coarse = max(1, max(grid.shape) // 60)
    rows, columns = _places(grid.y_size, coarse), _places(grid.x_size, coarse)
    x, y = np.meshgrid(grid.x[columns] * unit, grid.y[rows] * unit)
    lon, lat = (values[np.ix_(rows, columns)] for values in grid.lonlat())
    for values, suffix in ((lon, "E"), (lat, "N")):
        if not np.isfinite(values).all() or np.ptp(values) > 180:
            continue
        levels = MaxNLocator(5).tick_values(float(values.min()), float(values.max()))
        lines = axes.contour(x, y, values, levels=levels, colors="#000000", alpha=0.25, linewidths=0.6)
        for label in axes.clabel(lines, fmt=lambda degree, suffix=suffix: f"{degree:g}°{suffix}", fontsize=7):
            upwards = (label.get_rotation() + 45) % 180 - 45  # one way for all: turned round, 9.6 reads 9.9
            label.set(rotation=upwards, alpha=0.7)


def _places(size: int, step: int) -> NDArray[np.intp]:
    """Every `step`-th index, and the last."""
    return np.unique(np.append(np.arange(0, size, step), size - 1))


def scale_of(row: Sequence[Panel]) -> Scale:
    """The colours that all panels of a row share."""
    variable, grey = row[0].variable, f"grey: {row[0].missing}"
    if row[0].probability:
        colours = ListedColormap(list(CHANCE_COLOURS), name="probability").with_extremes(bad=MISSING_COLOUR)
        norm = BoundaryNorm([*CHANCES, 1.0001], len(CHANCE_COLOURS))
        labels = [f"{100 * chance:g}" for chance in CHANCES]
        return Scale(colours, norm, CHANCES, labels, f"probability, %; {grey}")
    if variable.classes:
        return _scale_of_classes(variable, grey)
    if variable.units in RAINY_UNITS:
        levels = (0.0, *RAIN_LEVELS)
        meaning = f"{RAINY_UNITS[variable.units]}; {grey}"
        return Scale(*rain_colours(), levels, [f"{level:g}" for level in levels], meaning)
    known = np.concatenate([panel.field[~np.isnan(panel.field)] for panel in row])
    if variable.units == "dBZ":
        known = known[known > NO_ECHO]
    low, high = np.percentile(known, [1, 99]) if known.size else (0.0, 1.0)
    colours = matplotlib.colormaps["cividis"].with_extremes(bad=MISSING_COLOUR)
    spread = Normalize(float(low), float(high) if high > low else float(low) + 1.0)
    return Scale(colours, spread, None, None, f"{variable.units}; {grey}")


def _scale_of_classes(variable: Variable, grey: str) -> Scale:
    """One colour for each class, with its meaning; nothing to see is white."""
    values = [value for value, _ in variable.classes]
    twenty = [matplotlib.colormaps["tab20"](place % 20) for place in range(len(values))]
    colours = ListedColormap(
        [(1.0, 1.0, 1.0, 1.0) if not value else twenty[i] for i, value in enumerate(values)]
    )
    between = [(low + high) / 2 for low, high in pairwise(values)]
    norm = BoundaryNorm([values[0] - 0.5, *between, values[-1] + 0.5], len(values))
    labels = [meaning.replace("_", " ") for _, meaning in variable.classes]
    middles = [(low + high) / 2 for low, high in pairwise(norm.boundaries)]
    shown = colours.with_extremes(bad=MISSING_COLOUR)
    return Scale(shown, norm, middles, labels, grey)


def show_scale(figure: Figure, axes: Sequence[Axes], scale: Scale) -> None:
    """The scale of colours of a row of panels."""
    drawn: Any = ScalarMappable(scale.norm, scale.colours)
    bar = figure.colorbar(drawn, ax=axes, ticks=scale.ticks, shrink=0.9, pad=0.01, spacing="uniform")
    bar.ax.tick_params(labelsize=8)
    if scale.labels is not None:
        bar.ax.set_yticklabels(list(scale.labels), fontsize=8)
    bar.minorticks_off()
    bar.set_label(scale.meaning, fontsize=8)
    bar.outline.set(edgecolor="#999999", linewidth=0.6)  # or the white end is lost on the page
