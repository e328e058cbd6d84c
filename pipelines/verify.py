"""Verification: forecast runs against later observations, beside baselines on exactly the same pixels."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from itertools import compress

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from metnet.calibration import undone
from metnet.forecaster import Forecaster
from metnet.rain import RainForecast, TabulatedForecast, tabulated
from metnet.scores.reliability import Reliability
from metnet.scores.score import Score
from pipelines.destination import folder
from pipelines.figures import Case, thinned
from pipelines.frame import parse_interval
from pipelines.late import past_at
from pipelines.observations import Observations
from pipelines.plain import rain_cube
from pipelines.progress import track
from pipelines.report import Provenance, Report, spread, text_table
from pipelines.report_page import write
from pipelines.run_facts import RunFacts
from pipelines.runs import RUN_NAME, ForecastStore, RunHeader
from pipelines.skill import Skill, check_names
from pipelines.words import plural

CELLS_AT_ONCE = 8_000_000  # of all lead times held at once; twelve numbers each are some 400 MB
CASE_LEADS = 3  # of the run that the report draws
Field = NDArray[np.float32]
TIME = "%Y-%m-%dT%H:%MZ"
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Verified:
    """What was verified, and where the report lies."""

    report: Report
    folder: str

    def __str__(self) -> str:
        """The skill table."""
        return f"{text_table(self.report)}\n\n{self.folder}/report.html, {self.folder}/report.json"


def verify(
    cube: str,
    forecasts: str,
    report: str,
    scores: Sequence[Score],
    baselines: Mapping[str, Forecaster],
    reference: str = "extrapolation",
    start: str | None = None,
    end: str | None = None,
    resamples: int = 1000,
) -> Verified:
    """Verifies every run of a forecast store that a cube holds observations for, and writes the report.

    Baselines are made from the same frames that lay before the forecast. A pixel at a lead time counts
    only where it was observed and all have a forecast.

    Args:
        cube: folder or URL of the observations.
        forecasts: folder or URL of the forecast store.
        report: folder for report.json and report.html; made if it is not there.
        scores: what to compute.
        baselines: forecasters to compare with, by name.
        reference: the baseline that differences are told against.
        start: first init time (ISO 8601, UTC); None: the first there is.
        end: last init time, that one included; None: the last there is.
        resamples: how often runs are drawn anew for intervals.

    Raises:
        ValueError: if there is nothing to verify, saying what is missing.
    """
    folder("report", report)
    check_names(scores)
    for score in scores:
        if getattr(score, "fair", False):
            raise ValueError(
                f"scores: {score.name}: a store keeps no members, for whose number it could be corrected; "
                "expected fair=false"
            )
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: expected at least 1")
    if reference not in baselines:
        raise ValueError(
            f"reference={reference}: expected one of the baselines {', '.join(baselines) or '(none)'}"
        )
    observations, store = rain_cube(cube), ForecastStore.open(forecasts)
    past = _Past(observations, baselines)
    names = _chosen(store, start, end)
    tallies: list[_Tally] = []
    skipped: dict[str, str] = {}
    for name in track(names, "verifying runs", total=len(names)):
        try:
            tallies.append(_tally(_Run.open(store, name, past), scores))
        except _NothingToCountError as reason:
            skipped[name] = str(reason)
    if not tallies:
        raise ValueError(_nothing(observations, forecasts, skipped))
    skill = _joined(tallies, scores, ("forecast", *baselines))
    provenance = _provenance(observations, store, [tally.header for tally in tallies])
    _say_of_several_models(forecasts, [tally.header for tally in tallies])
    result = Report.of(skill, reference, resamples, provenance, skipped)
    wettest = max(tallies, key=lambda tally: float(tally.rain.sum()))
    case = _case(_Run.open(store, wettest.header.name, past), reference)
    write(result, case, report)
    return Verified(result, report)


def _say_of_several_models(forecasts: str, headers: Sequence[RunHeader]) -> None:
    """Says that not one model alone is scored, where it is so."""
    told = (header.attributes for header in headers)
    models = Counter(f"{each.get('model')} ({each.get('model_sha256', '')[:8]})" for each in told)
    if len(models) > 1:
        log.warning(
            "%s: all runs are scored as one forecast, but several models made them: %s; start= and end= "
            "choose runs by their init times",
            forecasts,
            ", ".join(f"{plural(count, 'run')} of {model}" for model, count in models.items()),
        )


NOT_YET = "the cube has no observation at any of its valid times"


class _NothingToCountError(Exception):
    """Why a run cannot be verified."""


@dataclass(frozen=True, eq=False)
class _Past:
    """The observations, and those who forecast from them."""

    cube: Observations
    baselines: Mapping[str, Forecaster]

    @cached_property
    def times(self) -> frozenset[datetime]:
        """When there is a frame."""
        return frozenset(compress(self.cube.times, self.cube.observed))


@dataclass(frozen=True, eq=False)
class _Run:
    """One run, what was observed at its valid times, and the baselines' view of the past."""

    header: RunHeader
    fields: xr.Dataset
    past: "_Past"
    leads: tuple[int, ...]  # indices of the lead times with an observation
    facts: RunFacts

    @classmethod
    def open(cls, store: ForecastStore, name: str, past: "_Past") -> "_Run":
        header, cube = store.header(name), past.cube
        if header.grid != cube.grid:
            raise _NothingToCountError(f"made on a grid of {header.grid}, the cube's is one of {cube.grid}")
        valid = [header.init_time + timedelta(minutes=lead) for lead in header.lead_times]
        leads = tuple(index for index, time in enumerate(valid) if time in past.times)
        if not leads:
            if cube.times and all((time - cube.times[0]) % cube.cadence for time in valid):
                every = cube.cadence.total_seconds() / 60
                raise _NothingToCountError(f"no frame at its lead times, but every {every:g} min")
            raise _NothingToCountError(NOT_YET)
        facts = RunFacts.of(header)
        if header.init_time - facts.input_age not in past.times:
            raise _NothingToCountError("the cube lacks the newest frame that it was made from")
        return cls(header, store.dataset(name), past, leads, facts)

    def blocks(self) -> Iterator[tuple[int, ...]]:
        """The lead times to verify, a few at a time: as many as fit into memory."""
        together = max(1, CELLS_AT_ONCE // (self.header.grid.y_size * self.header.grid.x_size))
        for first in range(0, len(self.leads), together):
            yield self.leads[first : first + together]

    def forecast(self, leads: Sequence[int]) -> TabulatedForecast:
        """What the store keeps of the run."""

        def read(name: str, *dims: str) -> Tensor:
            field = self.fields[name].isel(lead_time=list(leads)).compute()  # turning it unread is slow
            return torch.from_numpy(field.transpose("lead_time", *dims, "y", "x").values)[None]

        quantiles = read("rainfall_rate_quantile", "quantile")
        if 0.5 not in self.header.quantiles:
            quantiles = torch.cat([quantiles, read("rainfall_rate_median")[:, :, None]], dim=2)
        exceedance = read("probability_of_exceedance", "threshold")
        mean = read("rainfall_rate_mean")
        return TabulatedForecast(self.header.thresholds, exceedance, self.levels, quantiles, mean)

    def uncalibrated(self, leads: Sequence[int]) -> RainForecast | None:
        """The probabilities before they were calibrated, at the thresholds at which that is known."""
        if not self.facts.calibration:
            return None
        table = self.forecast(leads)
        rates = tuple(rate for rate in self.facts.calibration if rate in table.thresholds)
        lines = torch.tensor([[self.facts.calibration[rate][lead] for rate in rates] for lead in leads])
        offset, slope = lines[..., None, None].unbind(dim=2)
        said = table.exceedance[:, :, [table.thresholds.index(rate) for rate in rates]]
        return replace(table, thresholds=rates, exceedance=undone(said, offset, slope))

    def baseline(self, name: str, leads: Sequence[int]) -> RainForecast:
        """What a baseline says from the frames up to the init time, kept as the store would keep it.

        Else the same forecast would score differently in the store and as a baseline.
        """
        baseline = self.past.baselines[name]
        minutes = [self.header.lead_times[lead] for lead in leads]
        known = self.past.cube, self.header.init_time, baseline.frames, minutes
        batch = past_at(*known, self.facts.input_age)
        times = [self.header.init_time - timedelta(seconds=round(60 * age)) for age in batch.age[0].tolist()]
        since = torch.tensor([time in self.facts.missing for time in times])  # frames that came too late
        seen = replace(batch, radar=batch.radar.masked_fill(since[:, None, None], torch.nan))
        return tabulated(baseline(seen), self.header.thresholds, self.levels)

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels of the run's quantiles, the median among them."""
        levels = self.header.quantiles
        return levels if 0.5 in levels else (*levels, 0.5)

    def observed(self, leads: Sequence[int]) -> Tensor:
        """What was then seen (1, lead, y, x), mm/h."""
        times = [self.header.init_time + timedelta(minutes=self.header.lead_times[lead]) for lead in leads]
        return torch.from_numpy(np.concatenate([self.past.cube.block(time, 1) for time in times]))[None]


@dataclass(frozen=True, eq=False)
class _Tally:
    """The sums of one run, by lead time in minutes."""

    header: RunHeader
    leads: tuple[float, ...]  # minutes
    sums: Mapping[str, Tensor]  # by score: (forecaster, lead, part)
    before: Mapping[str, Tensor]  # of reliability before the forecast was calibrated: (lead, part)
    pixels: Tensor
    observed: Tensor
    rain: Tensor


def _tally(run: _Run, scores: Sequence[Score]) -> _Tally:
    """All scores of all forecasters of one run."""
    blocks = [_block(run, leads, scores) for leads in run.blocks()]
    pixels, seen, rain = torch.cat([counts for counts, _, _ in blocks], dim=1)
    if not pixels.any():
        raise _NothingToCountError("no pixel was observed where all have a forecast")
    minutes = tuple(run.header.lead_times[lead] for lead in run.leads)
    sums = {score.name: torch.cat([part[score.name] for _, part, _ in blocks], dim=1) for score in scores}
    before = {name: torch.cat([part[name] for _, _, part in blocks]) for name in blocks[0][2]}
    return _Tally(run.header, minutes, sums, before, pixels, seen, rain)


def _block(
    run: _Run, leads: Sequence[int], scores: Sequence[Score]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Of some lead times: pixels that count, pixels observed and their rain; and every score's sums.

    With them the sums of reliability before the forecast was calibrated, where that is known.
    """
    forecasts = [run.forecast(leads), *(run.baseline(name, leads) for name in run.past.baselines)]
    observed = run.observed(leads)
    seen = (~observed.isnan()).sum(dim=(0, 2, 3))
    for forecast in forecasts:
        observed = observed.masked_fill(forecast.mean().isnan(), torch.nan)
    pixels = (~observed.isnan()).sum(dim=(0, 2, 3))
    counts = torch.stack([pixels, seen, observed.nansum(dim=(0, 2, 3), dtype=torch.float64)])
    sums = {
        score.name: torch.stack([score.sums(forecast, observed) for forecast in forecasts])
        for score in scores
    }
    raw = run.uncalibrated(leads)
    before = {
        score.name: score.sums(raw, observed)
        for score in scores
        if isinstance(score, Reliability) and raw is not None and score.threshold in run.facts.calibration
    }
    return counts, sums, before


def _joined(tallies: Sequence[_Tally], scores: Sequence[Score], forecasters: tuple[str, ...]) -> Skill:
    """All runs beside each other; a lead time that a run lacks counts nothing."""
    lead_times = sorted({lead for tally in tallies for lead in tally.leads})

    def place(tally: _Tally, values: Tensor, dim: int) -> Tensor:
        shape = list(values.shape)
        shape[dim] = len(lead_times)
        index = torch.tensor([lead_times.index(lead) for lead in tally.leads])
        return torch.zeros(shape, dtype=torch.float64).index_copy(dim, index, values)

    def before(name: str) -> Tensor:
        return torch.stack([place(t, t.before.get(name, 0 * t.sums[name][0]), 0) for t in tallies])

    return Skill(
        scores=tuple(scores),
        forecasters=forecasters,
        init_times=tuple(tally.header.init_time for tally in tallies),
        lead_times=tuple(lead_times),
        sums={
            score.name: torch.stack([place(t, t.sums[score.name], 1) for t in tallies], dim=1)
            for score in scores
        },
        pixels=torch.stack([place(tally, tally.pixels, 0) for tally in tallies]),
        observed=torch.stack([place(tally, tally.observed, 0) for tally in tallies]),
        rain=torch.stack([place(tally, tally.rain, 0) for tally in tallies]),
        uncalibrated={name: before(name) for name in sorted({name for t in tallies for name in t.before})},
    )


def _chosen(store: ForecastStore, start: str | None, end: str | None) -> list[str]:
    """The names of the runs within [start, end]; names sort as their init times do."""
    if not store.names():
        raise ValueError(f"{store.path}: the forecast store holds no run; make one with `metnet forecast`")
    first, last = (None if time is None else time.strftime(RUN_NAME) for time in parse_interval(start, end))
    names = [n for n in store.names() if (first is None or n >= first) and (last is None or n <= last)]
    if not names:
        raise ValueError(
            f"{store.path}: no run starts within start={start}, end={end}; "
            f"there are {len(store.names())}, from {store.names()[0]} to {store.names()[-1]}"
        )
    return names


def _nothing(cube: Observations, forecasts: str, skipped: Mapping[str, str]) -> str:
    """Why not a single run could be verified."""
    reasons = Counter(skipped.values())
    told = "; ".join(f"{reason} ({plural(count, 'run')})" for reason, count in reasons.most_common())
    advice = "; ingest the observations that came after the forecasts" if NOT_YET in reasons else ""
    times = [time for time, seen in zip(cube.times, cube.observed, strict=True) if seen]
    held = f"holds {times[0]:{TIME}} to {times[-1]:{TIME}}" if times else "holds no frame"
    return (
        f"{forecasts}: none of {plural(len(skipped), 'run')}, {min(skipped)} to {max(skipped)}, "
        f"can be verified: {told}. The cube {cube.path} {held}{advice}"
    )


def _provenance(cube: Observations, store: ForecastStore, headers: Sequence[RunHeader]) -> Provenance:
    """Which data and which model the numbers are about."""
    attributes: dict[str, list[str]] = {}
    for header in headers:
        for key, value in header.attributes.items():
            if value not in attributes.setdefault(key, []):
                attributes[key].append(value)
    return Provenance(
        cube=cube.path,
        cube_snapshot=cube.snapshot,
        forecasts=store.path,
        forecasts_snapshot=store.snapshot,
        grid=cube.grid,
        # what differs from run to run tells of the run, not of the model
        attributes={key: v for key, v in attributes.items() if len(v) < max(2, len(headers))},
    )


def _case(run: _Run, baseline: str) -> Case:
    """Some lead times of one run, as fields to look at."""
    leads = [run.leads[index] for index in spread(len(run.leads), CASE_LEADS)]
    threshold = min(run.header.thresholds, key=lambda rate: abs(math.log(rate)))  # mm/h; the nearest to 1
    columns = [_case_fields(run, lead, threshold, baseline) for lead in leads]
    observed, median, probability, other = (np.stack(rows) for rows in zip(*columns, strict=True))
    minutes = tuple(run.header.lead_times[lead] for lead in leads)
    return Case(run.header.init_time, minutes, threshold, baseline, observed, median, probability, other)


def _case_fields(run: _Run, lead: int, threshold: float, baseline: str) -> list[Field]:
    """What was observed, the forecast's median and probability, and the baseline, each (y, x)."""
    forecast, carried = run.forecast([lead]), run.baseline(baseline, [lead])
    fields = (
        run.observed([lead]),
        forecast.quantile(0.5),
        forecast.probability_above(threshold),
        carried.quantile(0.5),
    )
    return [thinned(field[0, 0].numpy()) for field in fields]
