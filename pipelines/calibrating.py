"""`calibrated`: what validation samples say of a network's probabilities, for the card of its run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from metnet.batch import Batch
from metnet.calibration import Calibration, Exceedances, cost, exceedances, identity, unweighted
from metnet.model import MetNet
from pipelines.progress import track
from pipelines.samples import Samples
from pipelines.trained import Published

MORE = 3  # times as many samples are drawn as for a validation, of which there are many
PIXELS = 600  # of each sample and lead time
TENTHS = 10  # bins of a reliability curve
SHOWN = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # mm/h, thresholds whose reliability the card tells


@dataclass(frozen=True)
class Calibrated:
    """A calibration, judged on samples that it was not fitted on.

    The earlier half of each cube's samples is judged by what was fitted on the later, and the other way
    round. Only edges whose cost that lowers are calibrated, by what all samples say together.
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
    class_weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Calibrated:
    """Fits a calibration to a network on its validation samples.

    Args:
        network: with the weights it will forecast with.
        validation: samples of each cube that nothing was learned from.
        class_weights: the factors by which the loss counted pixels of each class of `network.bins`.
        seed: of the choice of pixels.
    """
    weights, edges = tuple(class_weights or ()), network.bins.edges
    halves = _halves(network, validation, weights, seed)
    before = Exceedances.joined(halves)
    fitted_on = {"cubes": [samples.cube.path for samples in validation], "pixels": len(before.fell)}
    if not all(len(half.fell) for half in halves):
        nothing = replace(identity(network.bins), class_weights=weights)
        none = (False,) * len(edges)
        return Calibrated(nothing, none, {}, [], fitted_on)
    earlier, later = (Calibration.fitted(half) for half in halves)
    after = Exceedances.joined([later.of(halves[0]), earlier.of(halves[1])])
    kept = tuple((cost(after) < cost(before)).tolist())
    after = Exceedances.joined([later.only(kept).of(halves[0]), earlier.only(kept).of(halves[1])])
    return Calibrated(
        calibration=Calibration.fitted(before, weights).only(kept),
        kept=kept,
        cost={"before": float(cost(before).sum()), "after": float(cost(after).sum())},
        reliability=_reliability(edges, before, after),
        fitted_on=fitted_on,
    )


def _halves(
    network: MetNet | Published, validation: Sequence[Samples], weights: tuple[float, ...], seed: int
) -> tuple[Exceedances, Exceedances]:
    """What the network says at some pixels of the earlier and of the later half of each cube's samples."""
    generator = torch.Generator().manual_seed(seed)
    none = Exceedances(torch.zeros(0, len(network.bins.edges)), torch.zeros(0), torch.zeros(0).long())
    halves = [none], [none]
    training = network.training
    network.eval()
    count = sum(MORE * len(samples) for samples in validation)
    for half, batch in track(_drawn(validation), "calibrating", total=count):
        assert batch.target is not None
        target = network.middle(batch.target) if isinstance(network, Published) else batch.target
        with torch.inference_mode():
            forecast = unweighted(network(batch), weights)
        halves[half].append(exceedances(forecast, batch.lead_time, target, PIXELS, generator))
    network.train(training)
    earlier, later = (Exceedances.joined(half) for half in halves)
    return earlier, later


def _drawn(validation: Sequence[Samples]) -> Iterator[tuple[int, Batch]]:
    """Samples of each cube in the order of their times; with each, whether it is of the later half."""
    for few in validation:
        samples = Samples(
            few.cube, few.inits, few.span, few.crop, MORE * len(few), few.seed, beside=few.sides.beside
        )
        batches = [samples[index] for index in range(len(samples))]
        batches.sort(key=lambda batch: int(batch.init_time[0]))
        for index, batch in enumerate(batches):
            yield int(2 * index >= len(batches)), batch


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
