"""`python -m benchmarks.coherence RUN CUBE [--windows N] [--members M] [--steps]`: what coherence is worth.

Of windows of a cube, drawn by their rain as validation samples are, the mean rain over the window is forecast
by members of the head of a `metnet train-head` run, and by draws from the very same distributions of the
pixels that hang together not at all (`independent`) or completely (`at one level`: all pixels of all lead
times at one quantile). With `--steps` also by pysteps' STEPS, which sees the same window.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metnet.axial_head import Coherent, window_mean
from metnet.batch import Batch
from metnet.rain import EnsembleForecast
from pipelines.baselines.steps import Steps
from pipelines.beside import Beside
from pipelines.plain import rain_cube
from pipelines.progress import track
from pipelines.samples import Samples, Span, split
from pipelines.trained import TrainedModel, trained

HEADS = (
    "members",
    "CRPS mm/h, each lead time",
    "CRPS mm/h, whole window",
    "spread mm/h",
    "error mm/h",
    "observed by fifths of the ranks",
)
FIFTHS = 5
Draw = Callable[[Batch], Tensor]  # -> members (batch, member, lead, y, x), mm/h


@dataclass(frozen=True)
class Outcome:
    """Of the mean rain over windows, mm/h; means over windows."""

    crps: list[float]  # fair, by lead time
    crps_of_window: float  # fair, of the mean over the lead times
    spread: float  # standard deviation of the members, root of the mean square
    error: float  # of the mean of the members, root of the mean square
    fifths: list[float]  # the share of the observed that lay in each fifth of the ranks among the members


def draws(model: TrainedModel, count: int) -> dict[str, Draw]:
    """The ways to draw members from what a network says, by name."""
    network = model.network
    assert isinstance(network, Coherent)
    random = torch.Generator().manual_seed(0)

    def independent(batch: Batch) -> Tensor:
        level = torch.rand(len(batch.radar), count, *_shape(batch), generator=random)
        return at_level(network, batch, level, random)

    def at_one_level(batch: Batch) -> Tensor:
        level = torch.rand(len(batch.radar), count, 1, 1, 1, generator=random)
        return at_level(network, batch, level.expand(-1, -1, *_shape(batch)), random)

    def of_the_head(batch: Batch) -> Tensor:
        return network.members(batch, count, random)

    return {"of the head": of_the_head, "independent": independent, "at one level": at_one_level}


def at_level(network: Coherent, batch: Batch, level: Tensor, random: torch.Generator) -> Tensor:
    """Members (mm/h) whose classes are at these levels (0..1) of each pixel's distribution.

    Within its class a rate lies anywhere, at one place for all of a map, as the head has it.
    """
    cumulated = network.alone(batch).softmax(dim=2).cumsum(dim=2)[:, None]
    place = (cumulated < level[:, :, :, None]).sum(dim=3).clamp(max=len(network.bins) - 1)
    knots = torch.tensor((0.0, *network.bins.edges, network.bins.top))
    inside = torch.rand(*level.shape[:3], 1, 1, generator=random)
    return torch.where(place == 0, 0.0, knots[place] + inside * (knots[place + 1] - knots[place]))


def _shape(batch: Batch) -> tuple[int, int, int]:
    return len(batch.lead_time), *batch.radar.shape[2:]


def outcome(members: Tensor, target: Tensor, lead_time: Tensor) -> Outcome:
    """How well the mean over the observed pixels of each window is forecast."""
    seen = ~target.isnan()
    count = seen.sum(dim=(2, 3))
    observed = target.nan_to_num().sum(dim=(2, 3)) / count  # NaN where no pixel was observed
    areal = (members.nan_to_num() * seen[:, None]).sum(dim=(3, 4)) / count[:, None]
    each, fell = EnsembleForecast(areal[..., None, None]), observed[..., None, None]
    whole = window_mean(each.members, lead_time)
    fell_in_all = window_mean(fell[:, None], lead_time).members[:, 0]
    return Outcome(
        crps=each.fair_crps(fell).nanmean(dim=(0, 2, 3)).tolist(),
        crps_of_window=whole.fair_crps(fell_in_all).nanmean().item(),
        spread=areal.var(dim=1).nanmean().sqrt().item(),
        error=(areal.mean(dim=1) - observed).square().nanmean().sqrt().item(),
        fifths=_fifths(areal, observed),
    )


def _fifths(members: Tensor, observed: Tensor) -> list[float]:
    """The share of the observed in each fifth of the ranks; one among equals is in the middle of them."""
    below = (members < observed[:, None]).sum(dim=1) + 0.5 * (members == observed[:, None]).sum(dim=1)
    place = ((below + 0.5) / (members.shape[1] + 1) * FIFTHS).long().clamp(max=FIFTHS - 1)
    known = place[~observed.isnan()]
    return (torch.bincount(known, minlength=FIFTHS) / len(known)).tolist()


def windows(model: TrainedModel, path: str, count: int) -> list[Batch]:
    """Windows of a cube with what then fell, as large as the head's maps, drawn by their rain."""
    cube = rain_cube(path)
    assert isinstance(model.network, Coherent)
    span = Span.of(cube.cadence, model.frames, model.lead_times)
    inits = split(cube.observed, span, 0.0).training
    names = model.card["satellite"], model.card["static"], model.card["reach"]
    beside = Beside.of(model.network, *names)
    samples = Samples(cube, inits, span, model.network.head.grid[0], count, seed=1, beside=beside)
    return [samples[number] for number in range(count)]


def outcomes(ways: Mapping[str, Draw], batches: list[Batch]) -> dict[str, Outcome]:
    """How each way to draw members does, on the same windows and on the pixels that all of them forecast."""
    target = torch.cat([batch.target for batch in batches if batch.target is not None])
    drawn = {
        name: torch.cat([draw(batch) for batch in track(batches, name, total=len(batches))])
        for name, draw in ways.items()
    }
    for members in drawn.values():
        target = target.masked_fill(members.isnan().any(dim=1), torch.nan)
    return {name: outcome(members, target, batches[0].lead_time) for name, members in drawn.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder of metnet train-head")
    parser.add_argument("cube", help="cube that it has not learned from")
    parser.add_argument("--windows", type=int, default=24, help="how many are drawn")
    parser.add_argument("--members", type=int, default=24, help="of each forecast")
    parser.add_argument("--steps", action="store_true", help="pysteps' STEPS too")
    given = parser.parse_args()
    model = trained(given.run)
    ways = draws(model, given.members)
    if given.steps:
        steps = Steps(given.members)
        ways["STEPS"] = lambda batch: steps(batch).members
    with torch.no_grad():
        found = outcomes(ways, windows(model, given.cube, given.windows))
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for name, each in found.items():
        leads = ", ".join(f"{value:.3f}" for value in each.crps)
        ranks = ", ".join(f"{share:.0%}" for share in each.fifths)
        numbers = " | ".join(f"{value:.3f}" for value in (each.crps_of_window, each.spread, each.error))
        print(f"| {name} | {leads} | {numbers} | {ranks} |")


if __name__ == "__main__":
    main()
