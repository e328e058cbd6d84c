"""`bench_skill`: what a training recipe is worth on events that it never saw, beside what else there is.

Each event (or several together) is left out in turn: the recipe trains on all others, and forecasts it. A
forecaster counts at the very pixels where all others have a forecast, too.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from metnet.batch import Batch
from metnet.forecaster import Forecaster
from metnet.model import MetNet
from metnet.rain import EnsembleForecast, RainForecast
from metnet.scores.brier import Brier
from metnet.scores.crps import Crps
from metnet.scores.csi import Csi
from metnet.scores.reliability import Reliability
from metnet.scores.score import Score
from pipelines import destination
from pipelines.baselines.extrapolation import Extrapolation
from pipelines.baselines.steps import Steps, pysteps_nowcast
from pipelines.events import cubes as event_cubes
from pipelines.figures import event_ratios
from pipelines.goals import BASELINES, Goal, goal_table, goals, neighbourhoods, tally
from pipelines.observations import Observations
from pipelines.past import past
from pipelines.plain import rain_cube
from pipelines.progress import track
from pipelines.report import DECIDED
from pipelines.run_folder import Trained
from pipelines.samples import Span
from pipelines.skill import Difference, Estimate, Skill, over_events, perfect
from pipelines.sources.source import Source
from pipelines.trained import TrainedModel, trained, untrained, with_motion

THRESHOLDS = (0.1, 1.0, 5.0)  # mm/h, of the Brier score and of reliability
FARTHEST = 60.0  # minutes
MODEL = f"{MetNet.__module__}.{MetNet.__qualname__}"  # that has a prior
DRAWN = ("steps", "widened")  # baselines in the picture; the extrapolation is far behind them


@dataclass(frozen=True)
class Event:
    """How one left-out event was forecast."""

    name: str
    runs: int
    pixels: int
    lead_times: tuple[float, ...]  # minutes
    table: Mapping[str, Any]  # by score: values by forecaster and lead time, ratios by baseline
    goals: tuple[Goal, ...] = ()  # none in what was measured before they were told


@dataclass(frozen=True)
class BenchedSkill:
    """What a call of `bench_skill` measured."""

    out: str
    events: tuple[Event, ...]

    def __str__(self) -> str:
        """For each event how each goal was met, and for each score the ratio to each baseline."""
        lines = []
        for event in self.events:
            lines.append(f"{event.name}: {tally(event.goals)} goals met")
            lines += [f"  {goal.name}, {goal.wanted}: {goal}" for goal in event.goals]
        for event in self.events:
            lines.append(
                f"{event.name}: {event.runs} runs, {event.pixels:,} pixels, "
                f"{event.lead_times[0]:g} to {event.lead_times[-1]:g} min"
            )
            for score, row in event.table.items():
                told = ", ".join(f"{Estimate(**ratio)} of {name}" for name, ratio in row["ratio"].items())
                lines.append(f"  {score}: {told}")
        for score in dict.fromkeys(score for event in self.events for score in event.table):
            having = [event for event in self.events if score in event.table]
            if len(having) > 1:
                told = ", ".join(f"{_over_all(having, score, name)} of {name}" for name in BASELINES)
                lines.append(f"{_mean(having)}, {score}: {told}")
        return "\n".join([*lines, f"{self.out}/skill.md, {self.out}/skill.json, {self.out}/skill.png"])


def bench_skill(
    data: str,
    events: Mapping[str, Source],
    out: str,
    training: Callable[..., Trained | None],
    leave_out: Sequence[str] = (),
    runs: int = 9,
    side: int = 512,
    members: int = 24,
    widened: str | None = None,
    resamples: int = 1000,
    config: Mapping[str, Any] | None = None,
) -> BenchedSkill:
    """Trains a recipe without some events, forecasts these, and tells its scores beside the baselines'.

    Baselines are pysteps' STEPS, whose scores are corrected for its few members (`Crps.fair`), the plain
    extrapolation, and `widened`: the prior fitted on the same training events, which is where the network
    starts from. What is there in `out` already (cubes, trainings, members) is used again.

    Args:
        data: folder that the events lie in.
        events: what to learn from and to forecast, by name.
        out: folder for all that is made.
        training: `pipelines.train.train`, but for `cube`, `run` and `config`.
        leave_out: events left out one after the other, together where joined by "+"; none: each in turn.
        runs: forecasts of an event, evenly over the init times that have a past and a future.
        side: cells; of a larger grid the window of this size with the most rain is forecast.
        members: of STEPS.
        widened: run folder whose fitted prior is the widened extrapolation; None: the one trained here.
        resamples: how often runs are drawn anew for intervals.
        config: the whole call; `config["training"]` goes into the card of each training.

    Raises:
        ValueError: for a wrong argument, or weights to begin with, before any work; for an event that is not
            there, or that is too short to forecast.
    """
    for key, count in (("runs", runs), ("side", side), ("members", members), ("resamples", resamples)):
        if count < 1:
            raise ValueError(f"{key}={count}: expected at least 1")
    asked = (config or {}).get("training", {})
    if (began := asked.get("weights")) is not None:
        raise ValueError(
            f"training.weights={began}: expected null, for weights may have learned from what is left out"
        )
    if chosen := asked.get("validation_cubes"):
        raise ValueError(
            f"training.validation_cubes={chosen}: expected none, for what is left out may be among them; "
            "a training validates on the end of each event that it learns from"
        )
    folds = [fold.split("+") for fold in (leave_out or list(events))]
    named = [name for fold in folds for name in fold]
    if unknown := sorted(set(named) - set(events)):
        raise ValueError(f"leave_out: no event {', '.join(unknown)}; expected some of {', '.join(events)}")
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise ValueError(
            f"leave_out: {', '.join(twice)} more than once; expected each event once, as its scores stand by "
            "its name: measure the other way in a call of its own, with another out="
        )
    steps = Steps(members)
    pysteps_nowcast()  # or it would be found missing after the first training
    folder = destination.folder("out", out)
    fitted = None if widened is None else _fitted(widened)
    model = asked.get("model") or {}
    if (depth := model.get("stochastic_depth")) and not model.get("advection", True):
        raise ValueError(
            f"training.model.stochastic_depth={depth}: expected 0 with training.model.advection=false"
        )
    if fitted is None and not (model.get("_target_", MODEL) == MODEL and model.get("advection", True)):
        raise ValueError(
            "training.model: expected a MetNet with advection=true, or widened= the run folder of one "
            "trained without the same events; a network of another kind fits no prior to stand beside it"
        )
    cubes = dict(zip(events, event_cubes(data, events, str(folder / "cubes")), strict=True))
    told = []
    for fold in folds:
        run = folder / "runs" / "+".join(fold)
        learned = [cubes[name] for name in cubes if name not in fold]
        given = {"cube": learned, "run": str(run)}
        training(**given, config={**asked, **given})
        forecasters: dict[str, Forecaster] = {
            "trained": trained(run),
            "steps": steps,
            "widened": fitted or untrained(run),
            "extrapolation": Extrapolation(),
        }
        for name in fold:
            kept = folder / "steps" / name
            told.append(_measured(name, rain_cube(cubes[name]), forecasters, runs, side, resamples, kept))
            _write(folder, told)
    return BenchedSkill(out, tuple(told))


def _fitted(widened: str) -> TrainedModel:
    """The fitted prior of a run folder.

    Raises:
        ValueError: if it has none.
    """
    try:
        return untrained(widened)
    except ValueError as error:
        raise ValueError(f"widened={widened}: {error}") from error


def _measured(
    name: str,
    cube: Observations,
    forecasters: Mapping[str, Forecaster],
    runs: int,
    side: int,
    resamples: int,
    kept: Path,
) -> Event:
    """All scores of all forecasters on one event.

    Raises:
        ValueError: if no init time has a past and a future.
    """
    kilometres = cube.grid.cell_size / 1000
    skill = skill_on(cube, forecasters, _scores(kilometres), runs, side, kept)
    reached = goals(skill, kilometres, resamples)
    pixels = int(skill.pixels.sum())
    return Event(name, len(skill.init_times), pixels, skill.lead_times, _table(skill, resamples), reached)


def skill_on(
    cube: Observations,
    forecasters: Mapping[str, Forecaster],
    scores: tuple[Score, ...],
    runs: int,
    side: int,
    kept: Path | None = None,
) -> Skill:
    """What forecasters score on the window of a cube with the most rain, where all of them have a forecast.

    Args:
        cube: that is forecast.
        forecasters: by name, the first a `TrainedModel`, whose past and lead times (to an hour) all have.
        scores: that are told.
        runs: forecasts, evenly over the init times that have a past and a future.
        side: cells; of a larger grid a window of this size is forecast.
        kept: folder for the members of the forecaster "steps", taken from there if there they are.

    Raises:
        ValueError: if no init time has a past and a future.
    """
    model = next(iter(forecasters.values()))
    assert isinstance(model, TrainedModel)
    near = [lead for lead in model.lead_times if lead <= FARTHEST]
    span = Span.of_those(cube, model.frames, near)
    leads = tuple(lead * cube.cadence.total_seconds() / 60 for lead in span.leads)
    inits = init_times(cube, span, runs)
    if not inits:
        raise ValueError(
            f"{cube.path}: no time with {model.frames} frames up to it and {leads[-1]:g} min behind"
        )
    window = _window(cube, side)
    sums: dict[str, list[Tensor]] = {score.name: [] for score in scores}
    counts = []
    for init in track(inits, f"forecasting {Path(cube.path).name}", total=len(inits)):
        batch = _cut(past(cube, init, model.frames, leads), window)
        said = {
            key: _kept(kept, init, window, forecaster, batch)
            if kept is not None and key == "steps"
            else forecaster(batch)
            for key, forecaster in forecasters.items()
        }
        observed = torch.from_numpy(
            np.concatenate([cube.block(init + timedelta(minutes=lead), 1, window) for lead in leads])
        )[None]
        seen = ~observed.isnan()
        for forecast in said.values():
            observed = observed.masked_fill(forecast.probability_above(1.0).isnan(), torch.nan)
        counts.append(torch.stack([(~observed.isnan()).sum((0, 2, 3)), seen.sum((0, 2, 3))]))
        for score in scores:
            sums[score.name].append(
                torch.stack([score.sums(forecast, observed) for forecast in said.values()])
            )
    pixels, seen_pixels = torch.stack(counts, dim=1)
    return Skill(
        scores=scores,
        forecasters=tuple(forecasters),
        init_times=tuple(inits),
        lead_times=leads,
        sums={key: torch.stack(parts, dim=1) for key, parts in sums.items()},
        pixels=pixels,
        observed=seen_pixels,
        rain=torch.full_like(pixels, math.nan, dtype=torch.float64),
    )


def init_times(cube: Observations, span: Span, runs: int) -> list[datetime]:
    """So many init times, evenly over those with every past frame and every target."""
    needed = [*range(-span.frames + 1, 1), *span.leads]
    whole = [
        index
        for index in range(span.frames - 1, len(cube.times) - span.leads[-1])
        if all(cube.observed[index + step] for step in needed)
    ]
    chosen = np.unique(np.linspace(0, len(whole) - 1, min(runs, len(whole))).round().astype(int))
    return [cube.times[whole[place]] for place in chosen]


def _window(cube: Observations, side: int) -> tuple[int, int, int, int]:
    """The window (y0, x0, ny, nx) of at most this side with the most rain over the event."""
    rows, columns = (min(side, size) for size in cube.grid.shape)
    total = np.nansum([cube.block(time, 1)[0] for time in cube.times[::4]], axis=0)
    table = np.zeros((total.shape[0] + 1, total.shape[1] + 1))
    table[1:, 1:] = total.cumsum(0).cumsum(1)
    rain = (
        table[rows:, columns:] - table[:-rows, columns:] - table[rows:, :-columns] + table[:-rows, :-columns]
    )
    y, x = divmod(int(rain.argmax()), rain.shape[1])
    return y, x, rows, columns


def _cut(batch: Batch, window: tuple[int, int, int, int]) -> Batch:
    """What is known of a window alone."""
    y, x, rows, columns = window
    radar = batch.radar[:, :, y : y + rows, x : x + columns]
    return Batch(radar, batch.age, batch.init_time, batch.lead_time, batch.cell_size)


def _kept(
    folder: Path, init: datetime, window: tuple[int, int, int, int], forecaster: Forecaster, batch: Batch
) -> RainForecast:
    """The forecast's members, from the folder if they are there: STEPS takes a minute a run.

    Those of other rain (a cube made anew), or of another motion of it, are not taken for them.
    """
    flow = with_motion(batch).motion
    assert flow is not None
    seen = hashlib.sha256(batch.radar.numpy().tobytes() + flow[:, :2].numpy().tobytes()).hexdigest()[:12]
    place = "-".join(str(number) for number in (*window, *batch.lead_time.int().tolist()))
    path = folder / f"{init:%Y%m%dT%H%MZ}-{place}-{forecaster}-{seen}.zarr".replace(" ", "")
    if not path.exists():
        forecast = forecaster(batch)
        assert isinstance(forecast, EnsembleForecast)
        unfinished = path.with_suffix(".unfinished")
        zarr.save_array(unfinished, forecast.members.numpy())  # type: ignore[arg-type]
        unfinished.rename(path)
    return EnsembleForecast(torch.from_numpy(np.asarray(zarr.load(path))))


def _scores(kilometres: float) -> tuple[Score, ...]:
    """What is told, on cells of this side."""
    return (
        Crps(fair=True),
        *(Brier(threshold, fair=True) for threshold in THRESHOLDS),
        *(Csi(threshold) for threshold in THRESHOLDS[1:]),
        *neighbourhoods(kilometres).values(),
        *(Reliability(threshold) for threshold in THRESHOLDS),
    )


def _table(skill: Skill, resamples: int) -> dict[str, Any]:
    """By score: the values by forecaster and lead time, and the ratio of the means to each baseline's."""
    return {
        score.name: {
            "values": dict(zip(skill.forecasters, skill.values(score).tolist(), strict=True)),
            "ratio": {name: asdict(skill.ratio(score, name, resamples)) for name in BASELINES},
            "difference": {
                name: _by_lead_time(skill.difference(score, name, resamples)) for name in BASELINES
            },
        }
        for score in skill.scores
    }


def _by_lead_time(difference: Difference) -> dict[str, list[float]]:
    """A difference and its interval, as JSON takes them."""
    return {key: getattr(difference, key).tolist() for key in ("value", "low", "high")}


def _write(folder: Path, events: Sequence[Event]) -> None:
    """All that was measured, as numbers (null where not known), as tables to read, and as a picture."""
    told = [_plain(asdict(event)) for event in events]
    (folder / "skill.json").write_text(json.dumps(told, indent=1, allow_nan=False))
    table = goal_table({event.name: event.goals for event in events})
    page = [*table, "", DECIDED, "", *ratio_tables(events), *_lead_time_tables(events)]
    (folder / "skill.md").write_text("\n".join(page) + "\n")
    (folder / "skill.png").write_bytes(picture(events))


def picture(events: Sequence[Event]) -> bytes:
    """A PNG of each event's scores by those of STEPS and the widened extrapolation, and of all together."""
    drawn = [score for score in _scores(1.0) if isinstance(score, Crps | Brier | Csi)]
    told: dict[str, dict[str, dict[str, Estimate]]] = {}
    for name in (score.name for score in drawn):
        having = [event for event in events if name in event.table]
        told[name] = {}
        for baseline in DRAWN:
            ratios = {event.name: _found(event, name, baseline) for event in having}
            if len(having) > 1:
                ratios[_mean(having)] = _over_all(having, name, baseline)
            told[name][BASELINES[baseline]] = ratios
    return event_ratios(told, {score.name: perfect(score) for score in drawn})


def measured(path: Path) -> tuple[Event, ...]:
    """The events in a `skill.json`; of one that tells no goals, without.

    Raises:
        ValueError: if it is none.
    """
    try:
        return tuple(
            Event(**{**told, "table": _numbers(told["table"]), "goals": tuple(_goals(told))})
            for told in json.loads(path.read_text())
        )
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a skill.json of metnet bench-skill: {error}") from error


def _plain(told: Any) -> Any:
    """The same with null, which JSON knows, for each number that is not known."""
    if isinstance(told, Mapping):
        return {key: _plain(value) for key, value in told.items()}
    if isinstance(told, list | tuple):
        return [_plain(value) for value in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told


def _numbers(told: Any) -> Any:
    """The same with NaN for null."""
    if isinstance(told, Mapping):
        return {key: _numbers(value) for key, value in told.items()}
    if isinstance(told, list):
        return [_numbers(value) for value in told]
    return math.nan if told is None else told


def _goals(told: Mapping[str, Any]) -> Iterator[Goal]:
    """The goals of an event in a `skill.json`."""
    for goal in told.get("goals", ()):
        yield Goal(**{**_numbers(goal), "met": goal["met"]})


def ratio_tables(events: Sequence[Event]) -> Iterator[str]:
    """By score, the ratio of every event, and of all together, to each baseline, as lines of Markdown."""
    yield "Mean over the lead times, by the baseline's (90 % interval of a paired block bootstrap over runs)."
    if len(events) > 1:
        yield "Last stands their geometric mean (90 % interval of a bootstrap over events, of five or more)."
    yield ""
    for score in dict.fromkeys(score for event in events for score in event.table):
        having = [event for event in events if score in event.table]
        yield f"| {score} | runs | {' | '.join(f'of {words}' for words in BASELINES.values())} |"
        yield "|---|---|---|---|---|"
        for event in having:
            yield _ratio_row(event.name, event.runs, [_found(event, score, name) for name in BASELINES])
        if len(having) > 1:
            every = [_over_all(having, score, name) for name in BASELINES]
            yield _ratio_row(_mean(having), sum(event.runs for event in having), every)
        yield ""


def _found(event: Event, score: str, baseline: str) -> Estimate:
    """The ratio of an event's score to a baseline's."""
    return Estimate(**event.table[score]["ratio"][baseline])


def _over_all(events: Sequence[Event], score: str, baseline: str) -> Estimate:
    """The mean over events of the ratio of their scores to a baseline's."""
    return over_events([_found(event, score, baseline).value for event in events])


def _mean(events: Sequence[Event]) -> str:
    """What the mean over several events is called."""
    return f"mean of {len(events)} events"


def _ratio_row(name: str, runs: int, ratios: Sequence[Estimate]) -> str:
    """A row of a table of ratios."""
    return f"| {name} | {runs} | {' | '.join(_ratio(ratio) for ratio in ratios)} |"


def _lead_time_tables(events: Sequence[Event]) -> Iterator[str]:
    """Every event by score, forecaster and lead time, likewise."""
    for event in events:
        for score, row in event.table.items():
            yield (
                f"| {event.name}: {score} | "
                + " | ".join(f"{lead:g} min" for lead in event.lead_times)
                + " |"
            )
            yield "|---" * (1 + len(event.lead_times)) + "|"
            for name, values in row["values"].items():
                yield f"| {name} | " + " | ".join(f"{value:.4g}" for value in values) + " |"
            yield ""


def _ratio(ratio: Estimate) -> str:
    """Bold where the whole interval lies on one side of 1."""
    return f"**{ratio}**" if ratio.high < 1 or ratio.low > 1 else str(ratio)
