"""`calibrated`: what validation samples say of a network's probabilities, for the card of its run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metnet.batch import Batch
from metnet.calibration import Calibration, Exceedances, cost, exceedances, identity
from metnet.model import MetNet
from pipelines.progress import track
from pipelines.samples import Samples
from pipelines.trained import Published

MORE = 3  # times as many samples are drawn as for a validation, of which there are many
PIXELS = 600  # of each sample and lead time
ROUNDING = 1e-6  # share of a cost that is no gain
TENTHS = 10  # bins of a reliability curve
SHOWN = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # mm/h, thresholds whose reliability the card tells


@dataclass(frozen=True)
class Calibrated:
    """A calibration, judged on samples that it was not fitted on.

    Each cube's samples are judged by what was fitted on those of all others: what one radar network teaches
    of probabilities need not hold on the next. Of a single cube the earlier half is judged by what was fitted
    on the later, and the other way round. Only edges whose cost that lowers, by more than its standard error
    from part to part, are calibrated, by what all samples say together.
    """

    calibration: Calibration
    kept: tuple[bool, ...]  # for each edge between the classes
    cost: dict[str, float]  # nats a pixel, before and after; empty with too few samples for two halves
    reliability: list[dict[str, Any]]  # before and after, by threshold
    fitted_on: dict[str, Any]

    def card(self) -> dict[str, Any]:
        """What `model.json` says of it."""
        return {
            **self.calibration.card(),
            "kept": self.kept,
            "cost": self.cost,
            "reliability": self.reliability,
            "fitted_on": self.fitted_on,
        }

    def __str__(self) -> str:
        """In one line."""
        if not self.cost:
            return "not calibrated: too few validation samples"
        change = 100 * (self.cost["after"] / self.cost["before"] - 1)
        return (
            f"calibrated at {sum(self.kept)} of {len(self.kept)} thresholds: cost of held-out samples "
            f"{self.cost['before']:.4f} nats, {change:+.1f} % by calibrating"
        )


def calibrated(
    network: MetNet | Published,
    validation: Sequence[Samples],
    seed: int = 0,
) -> Calibrated:
    """Fits a calibration to a network on its validation samples.

    Args:
        network: with the weights it will forecast with.
        validation: samples of each cube that nothing was learned from.
        seed: of the choice of pixels.
    """
    edges = network.bins.edges
    parts = _parts(network, validation, seed)
    before = Exceedances.joined(parts)
    fitted_on = {"cubes": [samples.cube.path for samples in validation], "pixels": len(before.fell)}
    if not all(len(part.fell) for part in parts):
        return Calibrated(identity(network.bins), (False,) * len(edges), {}, [], fitted_on)
    others = [Exceedances.joined([*parts[:index], *parts[index + 1 :]]) for index in range(len(parts))]
    judges = list(zip((Calibration.fitted(other) for other in others), parts, strict=True))
    gains = torch.stack([1 - cost(judge.of(part)) / cost(part) for judge, part in judges])
    unsure = gains.std(dim=0) / len(parts) ** 0.5
    kept = tuple((gains.mean(dim=0) > unsure.clamp(min=ROUNDING)).tolist())
    after = Exceedances.joined([judge.only(kept).of(part) for judge, part in judges])
    return Calibrated(
        calibration=Calibration.fitted(before).only(kept),
        kept=kept,
        cost={"before": float(cost(before).sum()), "after": float(cost(after).sum())},
        reliability=_reliability(edges, before, after),
        fitted_on=fitted_on,
    )


def _parts(network: MetNet | Published, validation: Sequence[Samples], seed: int) -> list[Exceedances]:
    """What the network says at some pixels of each cube, or, of a single one, of both halves of its time.

    A cube in which nothing was observed is left out; two empty parts where no cube is left.
    """
    generator = torch.Generator().manual_seed(seed)
    none = Exceedances(torch.zeros(0, len(network.bins.edges)), torch.zeros(0), torch.zeros(0).long())
    halves = [([none], [none]) for _ in validation]
    training = network.training
    network.eval()
    count = sum(MORE * len(samples) for samples in validation)
    for cube, half, batch in track(_drawn(validation), "calibrating", total=count):
        assert batch.target is not None
        target = network.middle(batch.target) if isinstance(network, Published) else batch.target
        with torch.inference_mode():
            forecast = network(batch)
        halves[cube][half].append(exceedances(forecast, batch.lead_time, target, PIXELS, generator))
    network.train(training)
    parts = [[Exceedances.joined(half) for half in both] for both in halves]
    there = [both for both in parts if any(len(half.fell) for half in both)] or [[none, none]]
    return there[0] if len(there) == 1 else [Exceedances.joined(both) for both in there]


def _drawn(validation: Sequence[Samples]) -> Iterator[tuple[int, int, Batch]]:
    """Samples of each cube in the order of their times; with each, which cube, and whether the later half."""
    for cube, few in enumerate(validation):
        samples = Samples(
            few.cube, few.inits, few.span, few.crop, MORE * len(few), few.seed, beside=few.sides.beside
        )
        batches = [samples[index] for index in range(len(samples))]
        batches.sort(key=lambda batch: int(batch.init_time[0]))
        for index, batch in enumerate(batches):
            yield cube, int(2 * index >= len(batches)), batch


def _reliability(edges: Sequence[float], before: Exceedances, after: Exceedances) -> list[dict[str, Any]]:
    """By threshold: mean probability, frequency of the event, and pixels, in tenths of probability."""
    return [
        {
            "threshold": threshold,  # mm/h
            "before": _curve(before, edges.index(threshold)),
            "after": _curve(after, edges.index(threshold)),
        }
        for threshold in SHOWN
        if threshold in edges
    ]


def _curve(said: Exceedances, edge: int) -> dict[str, Any]:
    """One reliability curve, and the mean distance from the diagonal weighted by pixels."""
    probability, happened = said.above[:, edge].double(), said.happened()[:, edge].double()
    place = (probability * TENTHS).long().clamp(max=TENTHS - 1)
    count, total, events = (
        torch.bincount(place, weight, minlength=TENTHS).double()
        for weight in (torch.ones_like(probability), probability, happened)
    )
    filled = count > 0
    return {
        "probability": (total[filled] / count[filled]).tolist(),
        "frequency": (events[filled] / count[filled]).tolist(),
        "count": count[filled].int().tolist(),
        "error": float((total - events).abs().sum() / count.sum()),
    }
