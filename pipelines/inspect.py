"""`inspect`: what a cube or a forecast store holds, in words and as a picture."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from pathlib import Path

import numpy as np
import xarray as xr
import zarr
from pyproj import CRS

from pipelines import destination
from pipelines.cf import RAINFALL_RATE
from pipelines.cube import STATIC, Cube, groups
from pipelines.grid import Grid
from pipelines.pictures import Panel, draw
from pipelines.progress import track
from pipelines.quality import CellFlag, FrameFlag
from pipelines.repository import Repository
from pipelines.runs import ForecastStore, RunHeader
from pipelines.static import StaticFields

WET = 0.1  # mm/h
LOOKED_AT = 24  # frames of a cube, evenly spread: a look, not an audit
SHOWN = 5  # gaps and commits told one by one
PANELS = 4  # lead times drawn
TIME = "%Y-%m-%d %H:%M"
WIDTH = 100  # characters
LABEL = 14

Fact = tuple[str, str]  # a label, and what there is to say


@dataclass(frozen=True)
class Inspection:
    """What is at a path."""

    path: str
    facts: tuple[Fact, ...]
    picture: str | None  # the PNG file that was drawn

    def __str__(self) -> str:
        """The facts, one under the other."""
        facts = (*self.facts, ("picture", self.picture)) if self.picture else self.facts
        return "\n".join([self.path, *(_paragraph(label, text) for label, text in facts)])


def inspect(
    path: str, picture: str | None = "inspect.png", group: str | None = None, history: int = 5
) -> Inspection:
    """Looks at a cube or a forecast store, and draws it.

    Args:
        path: a local folder or URL.
        picture: the PNG file to draw, whose folder is made if it is not there; None for none.
        group: the group of frames of a cube to draw; None: the first.
        history: how many commits to list, the newest first.

    Raises:
        ValueError: if neither is there, saying what is there instead, or a picture or history of that kind
            cannot be had.
    """
    target = None if picture is None else destination.file("picture", picture, ".png")
    if history < 0:
        raise ValueError(f"history={history}: expected how many commits to list, from 0 on")
    repository = Repository.open(path)
    names = groups(repository, repository.snapshot)
    static = _has_static(repository)
    facts: list[Fact] = []
    drawn = False
    if names or static:
        if group is not None and group not in names:
            raise ValueError(f"{path}: no group {group!r} of frames; it has {', '.join(names) or 'none'}")
        for name in names:
            cube = Cube.open(path, name)
            facts += [("group", name)] if len(names) > 1 or static else []
            facts += _cube(cube)
            if target is not None and not drawn and name == (group or names[0]):
                drawn = _draw_cube(cube, target)
        if static:
            fields = StaticFields.open(path)
            facts += _static(fields)
            drawn = drawn or (target is not None and _draw_static(fields, target))
    else:
        store = ForecastStore.open(path)
        facts += _forecasts(store)
        drawn = target is not None and _draw_run(store, target)
    facts.append(("size", _size(path)))
    if history:
        facts.append(("history", _history(repository, history)))
    facts += _taken_back(repository)
    return Inspection(path, tuple(facts), picture if drawn else None)


def _has_static(repository: Repository) -> bool:
    try:
        root = zarr.open_group(repository.reader(repository.snapshot), mode="r", zarr_format=3)
    except FileNotFoundError as error:
        raise ValueError(
            f"{repository.path}: nothing was written here yet; fill it with metnet ingest"
        ) from error
    return STATIC in root


def _static(fields: StaticFields) -> Iterator[Fact]:
    for name, variable in fields.variables.items():
        values = fields.field(name)
        known = values[~np.isnan(values)]
        told = f"{known.min():g} to {known.max():g} {variable.units}" if known.size else "nothing known"
        share = known.size / values.size
        yield "static", f"{name}, {variable.long_name}: {told}, {share:.1%} known; {fields.source(name)}"


def _cube(cube: Cube) -> Iterator[Fact]:
    yield "a cube of", f"{cube.variable.name}, {cube.variable.long_name}, {cube.variable.units}"
    yield from _grid(cube.grid)
    times, observed = cube.times, cube.observed
    if not observed.any():
        yield "frames", "none yet; fill it with metnet ingest"
        return
    span = f"{times[0]:{TIME}} to {times[-1]:{TIME}} UTC"
    minutes = cube.cadence.total_seconds() / 60
    yield "frames", f"{int(observed.sum())} of {len(times)} steps of {minutes:g} min, {span}"
    if cube.products:
        yield "read from", "; ".join(cube.products)
    yield "gaps", _gaps(cube)
    yield "arrived", _arrivals(cube)
    yield "flagged", _flagged_frames(cube)
    there = np.flatnonzero(observed)
    chosen = np.unique(there[np.linspace(0, len(there) - 1, min(LOOKED_AT, len(there))).round().astype(int)])
    seen = wet = cells = 0
    suspect = dict.fromkeys(CellFlag, 0)
    least, most, most_time = np.inf, -np.inf, times[int(chosen[0])]
    for index in track(chosen, "looking", len(chosen)):
        field = cube.block(times[index], 1)[0]
        known = ~np.isnan(field)
        cells, seen = cells + field.size, seen + int(known.sum())
        wet += int((field >= WET).sum())
        quality = cube.quality(times[index])
        for flag in suspect:
            suspect[flag] += int((quality & flag > 0).sum())
        least = min(least, float(field[known].min(initial=np.inf)))
        if known.any() and field[known].max() > most:
            most, most_time = float(field[known].max()), times[index]
    of = f"in {len(chosen)} frames looked at"
    yield "observed", f"{seen / cells:.1%} of the cells, {of}"
    counts = (f"{count} cells of {str(flag.name).lower()}" for flag, count in suspect.items())
    yield "suspect", f"{', '.join(counts)}, {of}"
    if cube.variable != RAINFALL_RATE:
        between = f"{least:g} to {most:g} {cube.variable.units}" if seen else "unknown: no cell was observed"
        yield "values", f"{between}, {of}"
        return
    if not seen:
        yield "rain", "unknown: no cell was observed"
        return
    yield (
        "rain",
        (
            f"{wet / seen:.1%} of the observed cells have {WET:g} mm/h or more; "
            f"the most is {most:.1f} mm/h at {most_time:{TIME}}, {of}"
        ),
    )


def _forecasts(store: ForecastStore) -> Iterator[Fact]:
    names = store.names()
    yield "forecasts", f"{len(names)} runs" if names else "none yet; make some with metnet forecast"
    if not names:
        return
    headers = [store.header(name) for name in track(names, "looking", len(names))]
    newest = headers[-1]
    yield from _grid(newest.grid)
    yield "init times", f"{headers[0].init_time:{TIME}} to {newest.init_time:{TIME}} UTC"
    models = Counter(header.attributes.get("model", "unknown") for header in headers)
    yield "made by", ", ".join(f"{model} ({count})" for model, count in models.items())
    degraded = [header.name for header in headers if header.attributes.get("degraded") == "true"]
    shown = f": {', '.join(degraded[-SHOWN:])}" if degraded else ""
    yield "degraded", f"{len(degraded)} runs, made without some inputs{shown}" if degraded else "none"
    yield "lead times", f"{_numbers(newest.lead_times)} min"
    yield "thresholds", f"{_numbers(newest.thresholds)} mm/h"
    yield "quantiles", _numbers(newest.quantiles)
    yield "newest", _newest(newest, store.dataset(newest.name))


def _newest(header: RunHeader, run: xr.Dataset) -> str:
    """Coverage and rain of a run at its first and last lead time."""
    told = []
    for lead in sorted({0, len(header.lead_times) - 1}):
        chance = run["probability_of_exceedance"].isel(lead_time=lead, threshold=0).values
        known = ~np.isnan(chance)
        mean = float(chance[known].mean()) if known.any() else float("nan")
        told.append(
            f"at {header.lead_times[lead]:g} min {known.mean():.1%} of the cells have a forecast, with a "
            f"mean probability of {mean:.1%} for {header.thresholds[0]:g} mm/h or more"
        )
    return f"{header.name}: " + "; ".join(told)


def _grid(grid: Grid) -> Iterator[Fact]:
    crs = CRS.from_wkt(grid.crs)
    unit = "degrees" if grid.is_geographic else "m"
    step = f"{grid.x_step:g}" if grid.x_step == -grid.y_step else f"{-grid.y_step:g} x {grid.x_step:g}"
    yield (
        "grid",
        (
            f"{grid.y_size} rows x {grid.x_size} columns of {step} {unit} ({grid.cell_size / 1000:.2f} km), "
            f"{_name(crs)}"
        ),
    )
    corners = [(0, 0), (0, grid.x_size - 1), (grid.y_size - 1, grid.x_size - 1), (grid.y_size - 1, 0)]
    told = []
    for name, (row, column) in zip(("NW", "NE", "SE", "SW"), corners, strict=True):
        lon, lat = (float(values[0, 0]) for values in grid.window(row, column, 1, 1).lonlat())
        north, east = "N" if lat >= 0 else "S", "E" if lon >= 0 else "W"
        told.append(f"{name} {abs(lat):.3f}{north} {abs(lon):.3f}{east}")
    yield "corners", "; ".join(told)


def _name(crs: CRS) -> str:
    if crs.name != "unknown":
        return str(crs.name)
    return str(crs.coordinate_operation.method_name) if crs.coordinate_operation else "a CRS without a name"


def _gaps(cube: Cube) -> str:
    """The runs of steps without a frame."""
    gaps = []
    steps = zip(cube.times, cube.observed, strict=True)
    for seen, group in groupby(steps, key=lambda step: bool(step[1])):
        if not seen:
            times = [time for time, _ in group]
            until = f" to {times[-1]:{TIME}} ({len(times)} steps)" if len(times) > 1 else ""
            gaps.append(f"{times[0]:{TIME}}{until}")
    if not gaps:
        return "none"
    more = f", and {len(gaps) - SHOWN} more" if len(gaps) > SHOWN else ""
    return f"{len(gaps)}: {', '.join(gaps[:SHOWN])}{more}"


def _arrivals(cube: Cube) -> str:
    """When the frames were written, how long after their valid time, and by what software."""
    arrived = [
        (arrival, arrival - time)
        for time, arrival in zip(cube.times, cube.arrivals, strict=True)
        if arrival is not None
    ]
    delays = sorted(delay for _, delay in arrived)
    newest = max(arrival for arrival, _ in arrived)
    by = Counter(decoder for decoder in cube.decoders if decoder)
    readers = ", ".join(f"{name} ({count})" for name, count in by.items())
    return (
        f"the last at {newest:{TIME}} UTC; {_told(delays[len(delays) // 2])} after the valid time "
        f"in the middle, {_told(delays[-1])} at most; read by {readers}"
    )


def _told(delay: timedelta) -> str:
    return f"{delay.days} days" if delay.days > 1 else f"{delay.total_seconds() / 60:.0f} min"


def _flagged_frames(cube: Cube) -> str:
    """The steps whose frames as a whole look wrong."""
    flags = cube.flags
    told = []
    for flag in FrameFlag:
        steps = np.flatnonzero(flags & flag)
        if steps.size:
            shown = ", ".join(f"{cube.times[int(step)]:{TIME}}" for step in steps[:SHOWN])
            more = ", ..." if steps.size > SHOWN else ""
            told.append(f"{steps.size} {str(flag.name).lower()} ({shown}{more})")
    return "; ".join(told) or "none"


def _size(path: str) -> str:
    """Bytes on a local disk."""
    if not Path(path).is_dir():
        return "unknown: not a local folder"
    files = [file.stat().st_size for file in Path(path).rglob("*") if file.is_file()]
    return f"{sum(files) / 1e6:.1f} MB in {len(files)} files"


def _history(repository: Repository, count: int) -> str:
    """The newest commits."""
    commits = repository.history(count)
    return "\n".join(f"{when:{TIME}}  {snapshot}  {message}" for when, message, snapshot in commits)


def _taken_back(repository: Repository) -> Iterator[Fact]:
    """What rollbacks keep, if there were any."""
    if tags := list(repository.tags().items())[-SHOWN:]:
        yield "taken back", "\n".join(f"{snapshot}  {tag}" for tag, snapshot in tags)


def _draw_cube(cube: Cube, path: Path) -> bool:
    """The newest frame; False if there is none."""
    there = np.flatnonzero(cube.observed)
    if not there.size:
        return False
    time = cube.times[int(there[-1])]
    title = f"{cube.variable.long_name}, {time:{TIME}} UTC"
    draw(path, title, cube.grid, [[Panel("", cube.block(time, 1)[0], variable=cube.variable)]])
    return True


def _draw_static(fields: StaticFields, path: Path) -> bool:
    """The first of the fields."""
    name, variable = next(iter(fields.variables.items()))
    draw(path, variable.long_name, fields.grid, [[Panel("", fields.field(name), variable=variable)]])
    return True


def _draw_run(store: ForecastStore, path: Path) -> bool:
    """The newest run at a few lead times: the probability of rain, and the median; False if there is none."""
    if not store.names():
        return False
    header = store.header(store.names()[-1])
    run = store.dataset(header.name)
    leads = np.unique(np.linspace(0, len(header.lead_times) - 1, PANELS).round().astype(int))
    chances, rates, grey = [], [], "no forecast"
    for lead in leads:
        at = run.isel(lead_time=int(lead))
        ahead = f"+{header.lead_times[lead]:g} min"
        chance = at["probability_of_exceedance"].isel(threshold=0).values
        chances.append(Panel(f"{ahead}: P(rate ≥ {header.thresholds[0]:g} mm/h)", chance, True, missing=grey))
        rates.append(Panel(f"{ahead}: median rate", at["rainfall_rate_median"].values, missing=grey))
    title = f"{header.attributes.get('model', 'forecast')} from {header.init_time:{TIME}} UTC"
    draw(path, title, header.grid, [chances, rates])
    return True


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _paragraph(label: str, text: str) -> str:
    """A label, and its text beside it, wrapped."""
    indent = " " * (LABEL + 2)
    lines = [
        line
        for part in text.split("\n")
        for line in textwrap.wrap(part, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
    ]
    return f"  {label:<{LABEL}}" + f"\n{indent}".join(lines)
