"""`forecast`: a forecaster over one or many init times of a cube, each written as one run."""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import compress
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch

from metnet.batch import Batch
from metnet.forecaster import Forecaster
from metnet.model import MetNet
from pipelines.beside import Beside
from pipelines.export import export_run, place_of_run
from pipelines.frame import parse_interval, parse_time, whole_steps
from pipelines.late import newest_past
from pipelines.observations import Observations
from pipelines.past import RADAR_ALONE
from pipelines.plain import rain_cube
from pipelines.progress import track
from pipelines.run_blocks import tiled, whole
from pipelines.run_facts import CALIBRATED, MISSING, SILENT, RunFacts
from pipelines.runs import INPUT_AGE, ForecastStore, RunBlock, RunHeader
from pipelines.trained import Published, TrainedModel, trained, with_motion
from pipelines.version import version
from pipelines.words import plural

log = logging.getLogger(__name__)

THRESHOLDS = (0.1, 1.0, 2.0, 5.0, 10.0)  # mm/h
QUANTILES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
HORIZON = 60.0  # minutes, where nothing says how far ahead
MOST_LEADS = 12  # up to the horizon
STALEST = 30.0  # minutes
LONGEST_LEAD = 24 * 60.0  # minutes; no radar frame tells of later rain
TEXT = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class Forecasted:
    """What a call of `forecast` did."""

    path: str  # of the forecast store
    model: str
    lead_times: tuple[float, ...]  # minutes
    made: tuple[str, ...]  # names of the runs written now
    there: tuple[str, ...]  # names of the runs that were there already
    degraded: Mapping[str, str]  # by run made: what it was made without, in words
    completed: Mapping[str, str]  # by run there: what of that has come since
    covered: float  # share of the cells of the last run made that have a forecast at the last lead time
    seconds: float
    export: str | None

    def __str__(self) -> str:
        """What was made and where, in a few lines."""
        lines = []
        if self.made:
            leads = f"{plural(len(self.lead_times), 'lead time')} to {self.lead_times[-1]:g} min"
            runs = _several("run", self.made)
            lines.append(f"{runs} by {self.model}: {leads}, {self.seconds:.1f} s -> {self.path}")
            covered = "less than 1%" if 0 < self.covered < 0.01 else f"{self.covered:.0%}"
            lines.append(f"{covered} of the cells have a forecast at {self.lead_times[-1]:g} min")
        if self.there:
            lines.append(f"already there: {_several('run', self.there)}")
        for name, missing in self.degraded.items():
            lines.append(f"degraded: {name} was made without {missing}")
        for name, come in self.completed.items():
            lines.append(
                f"degraded: {name} was made without {come}, which came since; restate=true makes it again"
            )
        if self.export:
            lines.append(f"exported to {self.export}")
        return "\n".join(lines)


def forecast(
    cube: str,
    model: Forecaster,
    forecasts: str,
    init_time: str | Sequence[str] = "latest",
    start: str | None = None,
    end: str | None = None,
    every: float | None = None,
    lead_times: Sequence[float] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    quantiles: Sequence[float] = QUANTILES,
    stalest: float = STALEST,
    calibrated: bool = True,
    restate: bool = False,
    export: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Forecasted:
    """Forecasts from the past in a cube; a run that is there already is not made again.

    A run sees the cube up to its init time. Past frames that are missing are told to the model as NaN, a
    newest frame that is late by its age; both are named in the run's attributes, and so are satellite groups
    and static fields that it learned with and of which nothing is there. Cells that no past frame observed
    have no forecast (NaN).

    Args:
        cube: its folder or URL.
        model: any forecaster; a `TrainedModel` is applied tile by tile on large grids.
        forecasts: folder or URL of the forecast store; made if it is not there.
        init_time: "latest", ISO 8601 (UTC), several such times, or "all" that have a complete past.
        start: with "all", the first init time.
        end: with "all", the last one.
        every: with "all", minutes; only init times at whole multiples of it after the cube's first time.
        lead_times: minutes; None: those the model was trained for, or up to an hour.
        thresholds: mm/h, of the probabilities of exceedance.
        quantiles: within (0, 1).
        stalest: minutes that the newest frame that holds anything may be old; not with "all".
        calibrated: with a `TrainedModel`, probabilities as its validation data corrected them.
        restate: makes those again that are there but were made without frames that have come since.
        export: a NetCDF file (.nc) or Zarr store (.zarr) for the run, if it is one; replaced if it is there.
        config: the command as it was given, kept with the runs.

    Raises:
        ValueError: for an init time without data or with too few frames before it, a cube of another
            cadence than the model's, or a run that another model or other keys made at the same place.
            With "all", a frame that holds no observation is passed over with a warning.
    """
    began = monotonic()
    if not 0 <= stalest <= LONGEST_LEAD:
        raise ValueError(f"stalest={stalest:g}: expected minutes from 0 to {LONGEST_LEAD:g}")
    taken = {Path(path).resolve() for path in (cube, forecasts)}
    if export is not None and place_of_run(export).resolve() in taken:
        raise ValueError(f"export={export}: is the cube or the forecasts; expected a place of its own")
    opened = rain_cube(cube)
    if isinstance(model, TrainedModel) and not calibrated:
        model = model.uncalibrated()
    stalest = 0.0 if init_time == "all" else stalest
    leads = _lead_times(opened, model, lead_times)
    inits = _init_times(opened, model.frames, init_time, start, end, every, stalest)
    if export is not None and len(inits) > 1:
        raise ValueError(f"export={export} holds one run: expected one init_time, got {len(inits)}")
    levels = tuple(float(level) for level in quantiles)
    limits = tuple(float(threshold) for threshold in thresholds)
    made_of = {**_provenance(opened, model, config), **_facts(model, limits, leads).attributes()}
    headers = [RunHeader(init, opened.grid, leads, limits, levels, made_of) for init in inits]
    store = ForecastStore.open_or_create(forecasts)
    _warn_of_what_is_unlike(store, opened, leads)
    made: dict[str, _Run] = {}
    completed: dict[str, str] = {}
    blind: set[str] = set()
    for header in track(headers, "forecasting"):
        come = _come_since(store, opened, model, header, stalest)
        if come and not restate:
            completed[header.name] = come
        try:
            run = _run(store, opened, model, header, stalest, again=restate and bool(come))
        except _BlindError as error:
            if init_time != "all":
                raise
            log.warning("no run %s: %s", header.name, error)
            blind.add(header.name)
        else:
            made.update({} if run is None else {header.name: run})
    if export is not None:
        export_run(store, headers[0].name, export)
    return Forecasted(
        path=forecasts,
        model=_name(model),
        lead_times=leads,
        made=tuple(made),
        there=tuple(header.name for header in headers if header.name not in (*made, *blind)),
        degraded={name: run.missing for name, run in made.items() if run.missing},
        completed=completed,
        covered=list(made.values())[-1].covered if made else math.nan,
        seconds=monotonic() - began,
        export=export,
    )


def _warn_of_what_is_unlike(store: ForecastStore, cube: Observations, leads: Sequence[float]) -> None:
    """Says of a grid or of lead times that they fit neither the runs that are there nor the cube's frames."""
    names = store.names()
    if names and store.header(names[-1]).grid != cube.grid:
        log.warning(
            "%s: its newest run, %s, has another grid than the cube %s; runs are verified and shown one grid "
            "at a time, so give another domain a store of its own (forecasts=)",
            store.path,
            names[-1],
            cube.path,
        )
    if between := [f"{lead:g}" for lead in leads if whole_steps(lead, cube.cadence) is None]:
        log.warning(
            "lead_times: at %s min the cube %s has no frame, one every %g min: these cannot be verified",
            ", ".join(between),
            cube.path,
            _minutes(cube),
        )


def from_path(path: str) -> TrainedModel:
    """The model of a run folder of `metnet train`.

    Raises:
        ValueError: if there is no such folder, or no finished run in it.
    """
    if not Path(path).exists():
        raise ValueError(
            f"model={path}: no such folder, and no baseline of that name in configs/baseline/; "
            "expected persistence, extrapolation, steps, pretrained, or the run folder of metnet train"
        )
    return trained(path)


class _BlindError(ValueError):
    """No frame that is new enough for an init time holds an observation."""


@dataclass
class _Run:
    """What is told of a run once it is made."""

    missing: str  # what it was made without, in words
    covered: float = math.nan  # share of the cells with a forecast at the last lead time

    def counting(self, blocks: Iterable[RunBlock], header: RunHeader) -> Iterator[RunBlock]:
        """The same blocks, their coverage counted."""
        last, cells = len(header.lead_times) - 1, 0
        for block in blocks:
            if block.lead.stop > last:
                cells += int(np.count_nonzero(~np.isnan(block.median[-1])))
            yield block
        self.covered = cells / (header.grid.y_size * header.grid.x_size)


def _run(
    store: ForecastStore,
    cube: Observations,
    model: Forecaster,
    header: RunHeader,
    stalest: float,
    again: bool,
) -> _Run | None:
    """Makes a run and writes it whole; None if it is there already, and not to be made again.

    Raises:
        ValueError: if something else is there under its name.
    """
    if header.name in store:
        _check_same(store, header)
        if not again:
            return None
    beside = _beside(model)
    batch, missing = _past(cube, model.frames, header, stalest, beside)
    silent = _silent(batch, beside)
    if silent:
        told = header.name, ", ".join(silent), cube.path
        log.warning("%s: made without %s, which it learned with, and of which %s has nothing then", *told)
    facts = {
        MISSING: missing or "none",
        INPUT_AGE: f"{float(batch.age[0, -1]):g}",
        SILENT: " ".join(silent) or "none",
        "degraded": "true" if missing or silent else "false",
        "created": datetime.now(UTC).strftime(TEXT),
    }
    header = replace(header, attributes={**header.attributes, **facts})
    in_tiles = isinstance(model, TrainedModel) and beside == RADAR_ALONE
    if in_tiles:
        batch = with_motion(batch)  # of the whole grid: where tiles told their own, seams would show
    blocks = (tiled if in_tiles else whole)(model, batch, header)
    run = _Run(_lacking(missing.split(), silent))
    if store.write_run(header, run.counting(blocks, header), again) is None:  # another process was first
        _check_same(store, header)
        return None
    return run


def _come_since(
    store: ForecastStore, cube: Observations, model: Forecaster, header: RunHeader, stalest: float
) -> str:
    """What a run that is there was made without, and the cube has now; in words."""
    if header.name not in store or store.header(header.name).attributes.get("degraded") != "true":
        return ""
    before, beside = store.header(header.name).attributes, _beside(model)
    frames, sources = (before.get(key, "none").split() for key in (MISSING, SILENT))
    with suppress(_BlindError):  # less than before, after a rollback of the cube
        batch, missing = _past(cube, model.frames, header, stalest, beside)
        there = {f"{time:{TEXT}}" for time in compress(cube.times, cube.observed)} - {*missing.split()}
        there |= {*beside.satellite, *beside.static} - {*_silent(batch, beside)}
        return _lacking(*([each for each in part if each in there] for part in (frames, sources)))
    return ""


def _lacking(frames: Sequence[str], sources: Sequence[str]) -> str:
    """Frames by their valid times, and sources by their names, in words."""
    told = [f"the frames of {' '.join(frames)}"] if frames else []
    return " and ".join([*told, ", ".join(sources)] if sources else told)


def _beside(model: Forecaster) -> Beside:
    """What a network sees beside the radar, by the names that it was trained with."""
    if not isinstance(model, TrainedModel):
        return RADAR_ALONE
    told = model.card.get("config", {})
    names = told.get("satellite", ()), told.get("static", ())
    return replace(Beside.of(model.network, *names, told.get("reach", RADAR_ALONE.reach)), motion=True)


def _past(
    cube: Observations, frames: int, header: RunHeader, stalest: float, beside: Beside
) -> tuple[Batch, str]:
    """What a forecaster may know, and the valid times up to the init time of the frames that are missing."""
    batch = newest_past(cube, header.init_time, frames, header.lead_times, stalest, beside)
    if batch is None:
        late = f", nor does any up to {stalest:g} min before (stalest)" if stalest else ""
        raise _BlindError(f"{cube.path}: the frame of {header.init_time:{TEXT}} holds no observation{late}")
    seconds = (60 * batch.age[0].double()).round().int().tolist()
    there = {age for age, frame in zip(seconds, batch.radar[0], strict=True) if not frame.isnan().all()}
    ages = range(seconds[0], -1, -round(cube.cadence.total_seconds()))
    gone = [header.init_time - timedelta(seconds=age) for age in ages if age not in there]
    return batch, " ".join(f"{time:{TEXT}}" for time in gone)


def _silent(batch: Batch, beside: Beside) -> list[str]:
    """The satellite groups and static fields that a network is to see, and of which not one cell is known."""
    names = list[str]()
    for wanted, part, axis in ((beside.satellite, batch.satellite, 2), (beside.static, batch.static, 1)):
        fields = () if part is None else part.unbind(dim=axis)
        names += [name for name, field in zip(wanted, fields, strict=True) if field.isnan().all()]
    return names


def _init_times(
    cube: Observations,
    frames: int,
    wanted: str | Sequence[str],
    start: str | None,
    end: str | None,
    every: float | None,
    stalest: float,
) -> list[datetime]:
    """The init times that are asked for, each with a frame that is new enough and the axis before it."""
    present = [time for time, seen in zip(cube.times, cube.observed, strict=True) if seen]
    if not present:
        raise ValueError(f"{cube.path}: a cube without frames; fill it with metnet ingest")
    if wanted == "all":
        return _every_init_time(cube, frames, start, end, every)
    if start is not None or end is not None or every is not None:
        raise ValueError(f"init_time={wanted}: start, end and every only choose from init_time=all")
    texts = [wanted] if isinstance(wanted, str | datetime) else wanted
    if not texts:
        raise ValueError(f"init_time={wanted}: expected latest, all, or at least one time")
    times = sorted({present[-1] if text == "latest" else parse_time(text, "init_time") for text in texts})
    first = cube.times[0] + (frames - 1) * cube.cadence
    begin = f"the cube {cube.path} begins at {cube.times[0]:{TEXT}}"
    for time in times:
        oldest = time - timedelta(minutes=stalest)
        on_axis = not (time - cube.times[0]) % cube.cadence
        if not on_axis or not any(oldest <= other <= time for other in present):
            late = f", nor up to {stalest:g} min before (stalest)" if stalest and on_axis else ""
            near = _near(present, time)
            raise ValueError(f"init_time={time:{TEXT}}: the cube {cube.path} has no frame then{late}; {near}")
        if time < first:
            enough = [other for other in present if other >= first]
            more = "ingest more, or take model=persistence, which wants a single one"
            rather = f"the first init_time with enough is {enough[0]:{TEXT}}" if enough else more
            raise ValueError(
                f"init_time={time:{TEXT}}: the model wants {frames} frames up to it, "
                f"one every {_minutes(cube):g} min, but {begin}; {rather}"
            )
    return times


def _every_init_time(
    cube: Observations, frames: int, start: str | None, end: str | None, every: float | None
) -> list[datetime]:
    """All times with a complete past, thinned to multiples of `every` minutes after the cube's first time."""
    stride = 1 if every is None else whole_steps(every, cube.cadence)
    if stride is None:
        raise ValueError(f"every={every:g}: expected a multiple of the cube's {_minutes(cube):g} minutes")
    low, high = parse_interval(start, end)
    complete = [
        time
        for index, time in enumerate(cube.times)
        if index >= frames - 1
        and index % stride == 0
        and (low is None or low <= time)
        and (high is None or time <= high)
        and cube.observed[index - frames + 1 : index + 1].all()
    ]
    if not complete:
        raise ValueError(
            f"init_time=all, start={start}, end={end}: the cube {cube.path} has no such time with "
            f"{frames} successive frames up to it; it holds {int(cube.observed.sum())} frames, from "
            f"{cube.times[0]:{TEXT}} to {cube.times[-1]:{TEXT}}"
        )
    return complete


def _near(present: Sequence[datetime], time: datetime) -> str:
    """The times nearest to one that is missing."""
    before = [other for other in present if other < time][-1:]
    after = [other for other in present if other > time][:1]
    near = " and ".join(f"{other:{TEXT}}" for other in before + after)
    span = f"{len(present)} frames from {present[0]:{TEXT}} to {present[-1]:{TEXT}}"
    return f"the nearest are {near}, of {span}"


def _lead_times(cube: Observations, model: Forecaster, wanted: Sequence[float] | None) -> tuple[float, ...]:
    """Minutes: those wanted, else the model's own, else up to an hour in steps of the cube's cadence."""
    minutes = _minutes(cube)
    if isinstance(model, TrainedModel):
        _check_cadence(cube, model)
        model.warn_of_unlearned(wanted or ())
        leads = tuple(float(lead) for lead in (_learned_leads(cube, model) if wanted is None else wanted))
    else:
        step = minutes * math.ceil(HORIZON / MOST_LEADS / minutes)
        count = max(1, int(HORIZON / step))
        usual = [step * (i + 1) for i in range(count)]
        leads = tuple(float(lead) for lead in (usual if wanted is None else wanted))
    if leads and leads[-1] > LONGEST_LEAD:
        raise ValueError(f"lead_times={leads}: expected minutes up to {LONGEST_LEAD:g}")
    return leads


def _learned_leads(cube: Observations, model: TrainedModel) -> Sequence[float]:
    """Those a model learned that the cube can verify; of a cadence that few of them fit, each of its steps.

    A network that is told the lead time as a number knows those between the ones that it learned.
    """
    minutes, learned = _minutes(cube), model.lead_times
    fitting = [lead for lead in learned if whole_steps(lead, cube.cadence)]
    steps = [minutes * (step + 1) for step in range(int(max(learned) / minutes))]
    told = isinstance(model.network, MetNet) and model.network.planes is None
    if told and cube.cadence not in model.cadences and 2 * len(fitting) < len(steps):
        return steps
    return fitting or learned


def _check_cadence(cube: Observations, model: TrainedModel) -> None:
    """Warns of a cadence between those that a model learned from, which was told how old each frame is.

    Raises:
        ValueError: for one outside of them; and for each that a published network, told of no ages, has not
            learned from.
    """
    if cube.cadence in model.cadences:
        return
    minutes = _minutes(cube)
    learned = " or ".join(f"{cadence.total_seconds() / 60:g}" for cadence in model.cadences)
    told = (
        f"the model learned from frames every {learned} min, the cube {cube.path} has one every {minutes:g}"
    )
    within = min(model.cadences) < cube.cadence < max(model.cadences)
    if isinstance(model.network, Published) or not within:
        raise ValueError(f"{told} min; train a model on a cube like this one")
    log.warning("%s min, which lies between", told)


def _provenance(cube: Observations, model: Forecaster, config: Mapping[str, Any] | None) -> dict[str, str]:
    """What made a run, from what."""
    return {
        "input_cube": cube.path,
        "input_snapshot": cube.snapshot,
        "model": _name(model),
        "model_sha256": model.sha256 if isinstance(model, TrainedModel) else "none",
        "config": json.dumps(config or {}, default=str, sort_keys=True),
        "software_version": version(),
    }


def _facts(model: Forecaster, thresholds: Sequence[float], lead_times: Sequence[float]) -> RunFacts:
    """How a run's probabilities are calibrated, where a model says so."""
    if not isinstance(model, TrainedModel) or model.calibration is None:
        return RunFacts(calibrated=isinstance(model, TrainedModel) and model.is_calibrated)
    edges = model.network.bins.edges
    known = [rate for rate in thresholds if rate in edges]
    lines = model.calibration.line(torch.tensor(lead_times))
    calibration = {
        rate: tuple((offset, slope) for offset, slope in lines[:, edges.index(rate)].tolist())
        for rate in known
    }
    return RunFacts(calibration, calibrated=True)


def _check_same(store: ForecastStore, header: RunHeader) -> None:
    """Refuses to take another run for this one."""
    there = store.header(header.name)
    for what, old, new in (
        ("model", there.attributes.get("model"), header.attributes["model"]),
        ("model_sha256", there.attributes.get("model_sha256"), header.attributes["model_sha256"]),
        ("calibrated", there.attributes.get(CALIBRATED, "false"), header.attributes[CALIBRATED]),
        ("grid", there.grid, header.grid),
        ("lead_times", there.lead_times, header.lead_times),
        ("thresholds", there.thresholds, header.thresholds),
        ("quantiles", there.quantiles, header.quantiles),
    ):
        if old != new:
            raise ValueError(
                f"{store.path}: the run {header.name} is there already, made with "
                f"{what}={old} and not {new}; give another forecasts= path"
            )


def _name(model: Forecaster) -> str:
    """What a run calls its model: `MetNet`, or a baseline with its settings."""
    return type(model.network).__name__ if isinstance(model, TrainedModel) else repr(model)


def _minutes(cube: Observations) -> float:
    return cube.cadence.total_seconds() / 60


def _several(what: str, names: Sequence[str]) -> str:
    """One name, or how many and the first and last."""
    return f"{what} {names[0]}" if len(names) == 1 else f"{len(names)} {what}s ({names[0]} .. {names[-1]})"
