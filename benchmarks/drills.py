"""`python -m benchmarks.drills RUN CUBE [--inits N] [--side CELLS]`: a model robbed of parts of its past.

The newest 1, 2, ... frames of all but one are lost; the oldest are; a quarter of the circle is cut out of
every frame (a dead radar); the whole source is 10, 20 or 30 minutes late, so that older frames stand in with
their true ages; and all is lost at once. Each is forecast from the same init times, and scored on the pixels
that were observed later and have a forecast; how many of those that were ever seen have none is told beside
it. The window of the grid is the one with the most rain.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch import Tensor

from metnet.batch import Batch
from metnet.rain import BinnedForecast
from pipelines.late import past_at
from pipelines.observations import Observations
from pipelines.plain import rain_cube
from pipelines.progress import track
from pipelines.trained import TrainedModel, trained

LEADS = (5.0, 15.0, 30.0, 60.0)  # minutes
LATE = (10, 20, 30)  # minutes
HEADS = ("drill", "CRPS mm/h", "Brier 0.1", "Brier 1", "80 % width mm/h", "entropy nats", "no forecast")


@dataclass(frozen=True)
class Case:
    """One past, undisturbed and by how late it is, with what then fell."""

    in_time: Batch
    late: Mapping[int, Batch]  # by minutes
    target: Tensor  # (1, lead, y, x), mm/h


@dataclass(frozen=True)
class Outcome:
    """Means over pixels, lead times and cases."""

    crps: float  # mm/h
    light: float  # Brier score at 0.1 mm/h
    rain: float  # Brier score at 1 mm/h
    width: float  # mm/h, between the quantiles 0.1 and 0.9
    entropy: float  # nats, of the classes
    missing: float  # share without a forecast of the pixels that any past frame observed, and a later one


def drills(case: Case) -> Iterator[tuple[str, Batch]]:
    """Each drill's past, by its name; the first is the past as it is."""
    whole, frames = case.in_time, case.in_time.radar.shape[1]
    yield "as it is", whole
    for count in range(1, frames):
        yield f"newest {count} of {frames} frames lost", lost(whole, range(frames - count, frames))
    for count in range(1, frames):
        yield f"oldest {count} of {frames} frames lost", lost(whole, range(count))
    yield "90 degree sector cut", cut(whole)
    for minutes, batch in case.late.items():
        yield f"{minutes} min late", batch
    yield "nothing at all", lost(whole, range(frames))


def lost(batch: Batch, frames: Sequence[int]) -> Batch:
    """The batch without these frames."""
    radar = batch.radar.clone()
    radar[:, list(frames)] = torch.nan
    return replace(batch, radar=radar)


def cut(batch: Batch) -> Batch:
    """The batch without the quarter of a circle from its middle to the north-east."""
    return replace(batch, radar=batch.radar.masked_fill(sector(batch), torch.nan))


def sector(batch: Batch) -> Tensor:
    """Where that quarter is (y, x)."""
    rows, columns = batch.radar.shape[2:]
    return (torch.arange(rows)[:, None] < rows // 2) & (torch.arange(columns) >= columns // 2)


def outcomes(model: TrainedModel, cases: Sequence[Case]) -> dict[str, Outcome]:
    """What each drill does to a model."""
    sums: dict[str, Tensor | int] = {}
    for case in track(cases, "drills", total=len(cases)):
        for name, batch in drills(case):
            seen = ~batch.radar.isnan().all(dim=1, keepdim=True)
            sums[name] = sums.get(name, 0) + _sums(model(batch), case.target, seen)
    return {name: Outcome(*(total[0] / total[1]).tolist()) for name, total in sums.items()}


def _sums(forecast: BinnedForecast, target: Tensor, seen: Tensor) -> Tensor:
    """What `Outcome` tells, summed over the pixels that count for it, and their number."""
    crps, later = forecast.crps(target), ~target.isnan()
    briers = [(forecast.probability_above(rate) - (target >= rate).float()).square() for rate in (0.1, 1.0)]
    width = forecast.quantile(0.9) - forecast.quantile(0.1)
    entropy = torch.special.entr(forecast.probability).sum(dim=2)
    missing = forecast.mean().isnan()
    each = [(field, later & ~missing) for field in (crps, *briers, width, entropy)]
    told = [torch.stack([field[at].double().sum(), at.sum()]) for field, at in each]
    told.append(torch.stack([(missing & later & seen).sum(), (later & seen).sum().clamp(min=1)]))
    return torch.stack(told, dim=1)


def cases(
    cube: Observations, frames: int, count: int, side: int, leads: Sequence[float] = LEADS
) -> list[Case]:
    """Pasts of one window, evenly spread over the times with a past in the cube and all that then fell."""
    lead = [timedelta(minutes=minutes) for minutes in leads]
    there = {time for time, seen in zip(cube.times, cube.observed, strict=True) if seen}
    most = timedelta(minutes=max(LATE))
    usable = [
        time
        for time in cube.times
        if time - most - (frames - 1) * cube.cadence >= cube.times[0]
        and all(time + later in there for later in lead)
    ]
    if not usable:
        raise ValueError(
            f"{cube.path}: no init time has {frames} frames, {most} before them, and {leads} minutes after it"
        )
    inits = [usable[index] for index in torch.linspace(0, len(usable) - 1, count).round().int().tolist()]
    window = _wettest(torch.from_numpy(cube.block(inits[len(inits) // 2], 1))[0], side)
    made = []
    for init in dict.fromkeys(inits):
        late = {0: timedelta(0)} | {
            minutes: timedelta(minutes=minutes)
            for minutes in LATE
            if not timedelta(minutes=minutes) % cube.cadence
        }
        pasts = {
            minutes: _within(past_at(cube, init, frames, leads, age), window) for minutes, age in late.items()
        }
        target = torch.stack([torch.from_numpy(cube.block(init + later, 1))[0] for later in lead])
        made.append(Case(pasts.pop(0), pasts, target[None, :, window[0], window[1]]))
    return made


def _wettest(rain: Tensor, side: int) -> tuple[slice, slice]:
    """The rows and columns of the window with the most rain."""
    size = min(side, rain.shape[0]), min(side, rain.shape[1])
    means = torch.nn.functional.avg_pool2d(rain.nan_to_num().log1p()[None, None], size, stride=8)[0, 0]
    place = int(means.argmax())
    y, x = 8 * (place // means.shape[1]), 8 * (place % means.shape[1])
    return slice(y, y + size[0]), slice(x, x + size[1])


def _within(batch: Batch, window: tuple[slice, slice]) -> Batch:
    """The batch on some rows and columns."""
    return replace(batch, radar=batch.radar[:, :, window[0], window[1]].contiguous())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder of metnet train")
    parser.add_argument("cube", help="cube that it has not learned from")
    parser.add_argument("--inits", type=int, default=8, help="init times")
    parser.add_argument("--side", type=int, default=256, help="cells of the window's sides")
    parser.add_argument("--calibrated", action="store_true", help="with the run's calibration")
    given = parser.parse_args()
    model, cube = trained(given.run), rain_cube(given.cube)
    model = model if given.calibrated else model.uncalibrated()
    found = outcomes(model, cases(cube, model.frames, given.inits, given.side))
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for name, outcome in found.items():
        numbers = (outcome.crps, outcome.light, outcome.rain, outcome.width, outcome.entropy)
        print(f"| {name} | {' | '.join(f'{number:.4f}' for number in numbers)} | {outcome.missing:.0%} |")


if __name__ == "__main__":
    main()
