"""`Task`: one step of learning, one of validation, and the schedule; `RadarData`: the loaders of both."""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, overload, runtime_checkable

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from metnet.batch import Batch
from metnet.loss import Loss, cross_entropy
from metnet.model import MetNet
from metnet.rain import BinnedForecast, EnsembleForecast, RainBins, RainForecast
from pipelines.baselines.extrapolation import Extrapolation
from pipelines.baselines.persistence import Persistence
from pipelines.samples import ENDLESS, Mixed, Samples, loader
from pipelines.validation import BASELINES, BEFORE, FORECAST, Validation

LOWEST = 0.01  # of the learning rate, at the end of the schedule
LONGEST_MEMORY = 0.999  # of the averaged weights, from step to step
PIXELS = 2.0**16  # sums of losses are told in this unit, so that no gradient is large; a power of 2 is exact
MOST_SKIPPED = 20  # steps in a row; then nothing is being learned
log = logging.getLogger(__name__)


class Network(Protocol):
    """What can be trained: gives classes of rain, by their unnormalised log-probabilities."""

    bins: RainBins

    @property
    def frames(self) -> int:
        """How many past frames it wants to see."""
        ...

    def logits(self, batch: Batch) -> Tensor:
        """(batch, lead, bin, y, x)."""
        ...


@runtime_checkable
class MiddleOnly(Protocol):
    """A network that forecasts the middle of what it sees (the published ones)."""

    def middle(self, field: Tensor) -> Tensor:
        """The part of a field on the grid of the input that is forecast."""
        ...


@dataclass(frozen=True)
class Learning:
    """How fast the weights follow the gradient."""

    rate: float = 1e-3  # at its highest
    warm_up: float = 0.05  # share of the whole training in which the rate rises
    weight_decay: float = 0.01

    def factor(self, progress: float) -> float:
        """The rate's factor at this share of the whole training: a linear rise, then half a cosine."""
        if progress < self.warm_up:
            return max(LOWEST, progress / self.warm_up)
        share = min(1.0, (progress - self.warm_up) / (1 - self.warm_up))
        return LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Importance:
    """How many pixels a pixel counts as, by the class of rain that was observed there.

    Among pixels that count w_k times the classes have shares w_k p_k, up to their sum, where p_k are the true
    ones; so that is what the loss is shown of a network that says p_k (Menon et al. 2021, arXiv 2007.07314).
    The network itself says true probabilities throughout, and nothing has to be undone.

    Raises:
        ValueError: for anything but different rates that are edges of the bins, and weights above 0.
    """

    bins: RainBins
    steps: tuple[tuple[float, ...], ...] = ()  # from this rate on (mm/h), this weight; below all, 1

    def __post_init__(self) -> None:
        """Refuses what cannot be undone."""
        rates = [step[0] for step in self.steps if len(step) == 2]
        if len(set(rates)) < len(self.steps) or not all(
            rate in self.bins.edges and 0 < weight < math.inf for rate, weight in self.steps
        ):
            raise ValueError(
                f"importance={[list(step) for step in self.steps]}: expected pairs of a rate (mm/h), one "
                f"of {list(self.bins.edges)}, each at most once, and a weight above 0"
            )

    def of_classes(self) -> list[float]:
        """The weight of each class."""
        weights = [1.0] * len(self.bins)
        for rate, weight in sorted(self.steps):
            first = self.bins.edges.index(rate) + 1
            weights[first:] = [weight] * (len(weights) - first)
        return weights

    def of(self, target: Tensor) -> Tensor | None:
        """The weight of each pixel of a target (mm/h); None where all are 1."""
        if not self.steps:
            return None
        weights = torch.tensor([*self.of_classes(), 0.0], device=target.device)  # -1, the last: unobserved
        return weights[self.bins.classify(target)]

    def among_weighted(self, logits: Tensor) -> Tensor:
        """What logits (batch, lead, bin, y, x) of the true probabilities are among weighted pixels."""
        if not self.steps:
            return logits
        weights = torch.tensor(self.of_classes(), device=logits.device)
        return logits + weights.log()[:, None, None]


@dataclass(frozen=True)
class Best:
    """The averaged weights that validated best so far, and how well."""

    step: int  # 0: untrained
    scores: Mapping[str, float]
    weights: Mapping[str, Tensor]
    table: Mapping[str, Any]  # of all forecasters, by score and lead time


@dataclass(frozen=True)
class Shown:
    """Validation samples with what was forecast for them, to be drawn."""

    batch: Batch
    target: Tensor  # mm/h
    forecasts: Mapping[str, RainForecast]

    @property
    def rain(self) -> Tensor:
        """What fell on each sample, added up over its cells and lead times (mm/h)."""
        return self.target.nan_to_num().flatten(1).sum(dim=1)


@dataclass(frozen=True)
class Habits:
    """How a `Task` learns, beside its rate."""

    leads: int = 4  # lead times a step learns from, drawn anew for each
    seed: int = 0
    loss: Loss = cross_entropy
    importance: tuple[tuple[float, ...], ...] = ()
    on_nonfinite: Literal["stop", "skip"] = "stop"
    compiled: bool = False


@dataclass
class Gathered:
    """What the micro-batches of a step add up to, and which of them were not finite."""

    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    pixels: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    broken: list[str] = field(default_factory=list)


class Task(LightningModule):
    """A masked loss on rain bins by AdamW; CRPS (mm/h) and other scores on the validation samples.

    The loss of a step is the mean over all pixels observed in all of its micro-batches and processes, however
    many each of them holds. What is validated and kept is `average`, whose weights follow the network's
    slowly (an exponential moving average that remembers about a tenth of the steps so far): one step's noise
    does not decide.
    """

    def __init__(
        self,
        network: nn.Module,
        learning: Learning,
        habits: Habits,
        data: "RadarData | None" = None,
        lead_times: Sequence[float] = (),
    ):
        """`data` names a batch whose loss is not finite; `lead_times` (minutes) are those of validation."""
        super().__init__()
        self.network = network
        self.average = copy.deepcopy(network).requires_grad_(False).eval()
        self.learning, self.habits, self.data = learning, habits, data
        self.bins: RainBins = network.bins  # type: ignore[assignment]
        self.importance = Importance(self.bins, habits.importance)
        self.validation = Validation(lead_times)
        self.scores: dict[str, float] = {}  # of the last validation
        self.scored_at = -1  # the step it was done at
        self.untrained: dict[str, float] = {}  # the scores before training
        self.best: Best | None = None
        self.shown: Shown | None = None  # of the last validation, the batch with the rainiest sample
        self.skipped = 0  # steps, in all
        self._in_a_row = 0
        self._gathered = Gathered()
        self._sums = torch.zeros(5, dtype=torch.float64)
        self._split_up = False
        self._logits = self._compiled()

    def configure_model(self) -> None:
        """Shares the weights out among the processes, where the strategy is one that does.

        Network and average are each gathered whole for as long as they are at work; gradients and the state
        of the optimizer stay shared out.
        """
        if self._split_up or not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        for network in (self.network, self.average):
            fully_shard(network, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]
            register_fsdp_forward_method(network, "logits")
        self._split_up = True
        self._logits = self._compiled()

    def _compiled(self) -> Callable[[Batch], Tensor]:
        """What gives the logits in training."""
        logits: Callable[[Batch], Tensor] = self.network.logits  # type: ignore[assignment]
        if not self.habits.compiled:
            return logits
        if not isinstance(self.network, MetNet):
            return torch.compile(logits, dynamic=False)
        self.network.compile(dynamic=False)  # torch 2.13 cannot make every kernel for shapes left open
        return logits

    def weights(self) -> dict[str, Tensor]:
        """A copy of the averaged weights, whole; all processes must ask for it."""
        return {name: _whole(tensor) for name, tensor in self.average.state_dict().items()}

    # ---- learning ----------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draws whatever is random in the network by the number of the step, not by what came before."""
        key = (self.habits.seed, self.global_step, batch_idx % self._micro_batches, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the losses of one micro-batch, in `PIXELS`; the step divides by all pixels it had."""
        batch, target = self._some_leads(batch)
        logits = self.importance.among_weighted(self._logits(batch).float())
        weights = self.importance.of(target)
        with torch.autocast(logits.device.type, enabled=False):
            mean = self.habits.loss(logits, target, self.bins, weights)
        counts = ~target.isnan() if weights is None else weights * ~target.isnan()
        pixels = counts.sum(dtype=torch.float64)
        total = mean * pixels.float()
        if not torch.isfinite(total):
            self._gathered.broken.append(f"{mean.item()} {self._told(batch, batch_idx)}")
        self._gathered.loss = self._gathered.loss + total.detach().double().cpu()
        self._gathered.pixels = self._gathered.pixels + pixels.cpu()
        return total / PIXELS

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Makes the gradient that of the mean over all pixels of the step; stops or skips what is not finite.

        Raises:
            ValueError: if loss or gradient is not finite, naming the batch.
        """
        gathered, self._gathered = self._gathered, Gathered()
        gradients = [each.grad for each in self.network.parameters() if each.grad is not None]
        norm = _whole(nn.utils.get_total_norm(gradients)) if gradients else torch.zeros(())
        finite = bool(torch.isfinite(norm)) and not gathered.broken
        told = torch.tensor([gathered.loss, gathered.pixels, float(not finite)], dtype=torch.float64)
        loss, pixels, broken = self._over_processes(told).tolist()
        if broken:
            self._give_up(gathered.broken or ["finite, but its gradient is not"])
            for each in self.network.parameters():
                each.grad = None
            return
        self._in_a_row = 0
        factor = PIXELS * self._micro_batches * self.trainer.world_size / max(pixels, 1.0)
        for gradient in gradients:
            gradient.mul_(factor)
        self.log("train_loss", loss / max(pixels, 1.0), prog_bar=True)

    def _give_up(self, broken: Sequence[str]) -> None:
        """Stops, or warns and lets the step pass."""
        what = f"step {self.global_step}: the loss is {'; '.join(broken)}"
        if self.habits.on_nonfinite == "stop":
            raise ValueError(
                f"{what}. The last checkpoint is still good: lower learning_rate, look at these frames with "
                "metnet inspect, or leave such steps out with on_nonfinite=skip"
            )
        self.skipped += 1
        self._in_a_row += 1
        log.warning("%s; the step is skipped", what)
        if self._in_a_row >= MOST_SKIPPED:
            raise ValueError(
                f"{MOST_SKIPPED} steps in a row had a loss that is not finite, the last one {broken[0]}: "
                "the network has diverged; lower learning_rate and choose another run folder"
            )

    def optimizer_step(self, *given: Any, **named: Any) -> None:
        """Lets the average follow each step."""
        super().optimizer_step(*given, **named)
        step = self.global_step + 1
        memory = min(LONGEST_MEMORY, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, newest in zip(self.average.parameters(), self.network.parameters(), strict=True):
                kept.lerp_(newest, 1 - memory)
            for own, known in zip(self.average.buffers(), self.network.buffers(), strict=True):
                own.copy_(known)  # such as the statistics of a batch norm, which are means over time already

    def _some_leads(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch and its target at as many lead times as a step can afford, the same for all samples."""
        count, target = len(batch.lead_time), self._target(batch)
        if self.habits.leads >= count:
            return batch, target
        random = np.random.default_rng((self.habits.seed, self.global_step))
        some = torch.from_numpy(np.sort(random.choice(count, self.habits.leads, replace=False)))
        some = some.to(batch.lead_time.device)
        return replace(batch, lead_time=batch.lead_time[some], target=None), target[:, some]

    def _target(self, batch: Batch) -> Tensor:
        """What happened (mm/h) where the network forecasts; there is nothing to learn from without."""
        if batch.target is None:
            raise ValueError("the batch has no target: expected one made by Samples")
        return self._seen_by(batch.target)

    def _seen_by(self, field: Tensor) -> Tensor:
        """The part of a field (batch, lead, y, x) that the network forecasts."""
        return self.network.middle(field) if isinstance(self.network, MiddleOnly) else field

    def _told(self, batch: Batch, batch_idx: int) -> str:
        """Where a batch comes from."""
        if self.data is None:
            times = [datetime.fromtimestamp(time, UTC).isoformat() for time in batch.init_time.tolist()]
            return f"(init times {', '.join(times)})"
        return f"({'; '.join(self.data.told(self.global_step, batch_idx % self._micro_batches))})"

    @property
    def _micro_batches(self) -> int:
        return self.trainer.accumulate_grad_batches

    def _over_processes(self, numbers: Tensor) -> Tensor:
        """Float64 numbers added up over all processes."""
        if self.trainer.world_size == 1:
            return numbers
        summed = numbers.to(self.device)
        torch.distributed.all_reduce(summed)
        return summed.cpu()

    # ---- validation --------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Nothing is summed up yet."""
        self._sums.zero_()
        self.shown = None
        self.validation.begin()
        self._baselines = self.validation.wants_baselines

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up loss and CRPS, the CRPS of persistence, and the scores beside the baselines.

        In single precision, as forecasts are made.
        """
        with torch.autocast(batch.radar.device.type, enabled=False):
            logits = self.average.logits(batch)  # type: ignore[operator]
            target = self._target(batch)
            loss = cross_entropy(logits, target, self.bins)
            forecast = BinnedForecast(logits.softmax(dim=2), self.bins)
        crps = forecast.crps(target)
        standing = Persistence()(batch).members[:, 0]
        persistence = self._seen_by(standing)
        error = (persistence - target).abs()
        both = torch.isfinite(crps) & torch.isfinite(error)
        seen = torch.isfinite(target).sum()
        self._sums += torch.stack(
            [
                loss * seen,
                seen,
                crps[both].sum(dtype=torch.float64),
                error[both].sum(dtype=torch.float64),
                both.sum(),
            ]
        ).to(self._sums)
        self._score(batch, target, forecast, standing)

    def _score(self, batch: Batch, target: Tensor, forecast: RainForecast, standing: Tensor) -> None:
        """Scores the network, and the baselines where that is not known, on the pixels that all forecast."""
        members = {
            "persistence": standing,
            "extrapolation": Extrapolation()(batch).members[:, 0],
        }
        baselines = {name: EnsembleForecast(self._seen_by(each)[:, None]) for name, each in members.items()}
        known = [~each.members.isnan().any(dim=1) for each in baselines.values()]
        common = target.masked_fill(~torch.stack(known).all(dim=0), torch.nan)
        leads = batch.lead_time.tolist()
        asked: dict[str, RainForecast] = {FORECAST: forecast, **(baselines if self._baselines else {})}
        for name, each in asked.items():
            self.validation.add(name, each, common, leads)
        shown = Shown(batch, target, {**baselines, FORECAST: forecast})
        if self.shown is None or shown.rain.max() > self.shown.rain.max():
            self.shown = shown

    def on_validation_epoch_end(self) -> None:
        """Logs the means over all validation samples, and remembers the best weights.

        Raises:
            ValueError: if nothing was observed in them.
        """
        loss, seen, crps, persistence, both = self._over_processes(self._sums).tolist()
        if not seen:
            raise ValueError(
                "no validation sample has an observed target: set validation=0, or a longer cube"
            )
        self.scores = {
            "val_loss": loss / seen,
            "val_crps": crps / both if both else math.inf,
            "val_crps_persistence": persistence / both if both else math.inf,
        }
        self.scored_at = self.global_step
        self._finish_scores()
        better = self.best is None or self.scores["val_crps"] < self.best.scores["val_crps"]
        if better and math.isfinite(self.scores["val_crps"]):
            self.best = Best(self.global_step, self.scores, self.weights(), self.validation.table())
        if self.scored_at == 0:
            self.untrained = self.scores
        self.log_dict(self.scores)

    def _finish_scores(self) -> None:
        """Adds the scores up over all processes, and logs their means over the lead times."""
        asked = [FORECAST, *(BASELINES if self._baselines else ())]
        self.validation.unflatten(self._over_processes(self.validation.flat(asked)), asked)
        if self._baselines:
            self.validation.end(BASELINES)
        if self.scored_at == 0:
            self.validation.keep(FORECAST, BEFORE)
        for name in self.validation.forecasters():
            means = self.validation.scored(name).means()
            self.log_dict({f"{score}/{name}": value for score, value in means.items()})

    # ---- what a checkpoint holds beside weights, optimizer, schedule and counts ----------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The best weights so far, and the sums of the baselines."""
        best = None
        if self.best is not None:
            best = {each.name: getattr(self.best, each.name) for each in fields(Best)}
        checkpoint["task"] = {
            "best": best,
            "validation": self.validation.state(),
            "untrained": self.untrained,
            "scores": self.scores,
            "scored_at": self.scored_at,
            "skipped": self.skipped,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it back."""
        held = checkpoint["task"]
        self.best = None if held["best"] is None else Best(**held["best"])
        self.validation.restore(held["validation"])
        self.scores, self.scored_at = held["scores"], held["scored_at"]
        self.untrained, self.skipped = held["untrained"], held["skipped"]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, its rate set at every step by how much of the training is over."""
        optimizer = AdamW(
            self.network.parameters(), lr=self.learning.rate, weight_decay=self.learning.weight_decay
        )
        schedule = LambdaLR(optimizer, lambda step: self.learning.factor(progress(self.trainer, step)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _whole(tensor: Tensor) -> Tensor:
    """A copy that is shared with no other process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def progress(trainer: Trainer, step: int) -> float:
    """The share of the training that is over, by steps or by time, whichever ends it first."""
    by_steps = step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    by_time = 0.0
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None:
            gone = callback.time_elapsed()
            by_time = gone / (gone + left)
    return max(by_steps, by_time)


@dataclass(frozen=True)
class Numbers(Sequence[int]):
    """The numbers of the samples that one of several processes learns from, without end.

    Batch after batch goes around the processes, so that together they see what one process with larger
    batches would.
    """

    first: int
    batch_size: int
    process: int = 0
    processes: int = 1

    def __len__(self) -> int:
        """As many as are left."""
        return (ENDLESS - self.first) // self.processes // self.batch_size * self.batch_size

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> "Sequence[int]": ...
    def __getitem__(self, index: int | slice) -> "int | Sequence[int]":
        """The number at a place."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        batch, within = divmod(index, self.batch_size)
        return self.first + (batch * self.processes + self.process) * self.batch_size + within

    def __iter__(self) -> Iterator[int]:
        """One after the other."""
        return (self[place] for place in range(len(self)))


class Even(Dataset[Batch]):
    """Samples made up to a multiple of the processes by some without a target, which count nowhere.

    Processes that share out the weights gather them together: one without a batch would not come, and the
    others would wait for it.
    """

    def __init__(self, samples: Samples, processes: int):
        self.samples, self.processes = samples, processes

    def __len__(self) -> int:
        """How many samples there are, those that count nowhere included."""
        return math.ceil(len(self.samples) / self.processes) * self.processes

    def __getitem__(self, index: int) -> Batch:
        """Sample number `index`."""
        if index < len(self.samples):
            return self.samples[index]
        sample = self.samples[index % len(self.samples)]
        assert sample.target is not None
        return replace(sample, target=torch.full_like(sample.target, torch.nan))


class RadarData(LightningDataModule):
    """Training samples without end, and the same validation samples each time.

    Which samples a step sees follows from its number alone, so a training that was cut off and goes on sees
    what it would have seen.
    """

    def __init__(self, training: Mixed, validation: Sequence[Samples], workers: int = 0):
        """`workers` processes read the samples, or with 0 the training itself."""
        super().__init__()
        self.training, self.validation, self.workers = training, validation, workers

    def train_dataloader(self) -> DataLoader[Batch]:
        """All samples from the next step on."""
        first = 0 if self.trainer is None else self._first(self.trainer.global_step, 0)
        return self._loaded(self.training, Numbers(first, self.training.batch_size, *self._place))

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """The validation samples of each cube, shared out evenly among the processes."""
        process, processes = self._place
        even = [Even(samples, processes) for samples in self.validation]
        return [self._loaded(samples, range(process, len(samples), processes)) for samples in even]

    def told(self, step: int, micro_batch: int) -> list[str]:
        """Where each sample of this process's micro-batch of a step comes from."""
        first = self._first(step, micro_batch) + self._place[0] * self.training.batch_size
        return [self.training.told(first + place) for place in range(self.training.batch_size)]

    @property
    def _place(self) -> tuple[int, int]:
        """The number of this process, and of how many."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _first(self, step: int, micro_batch: int) -> int:
        """The first sample of a micro-batch, over all processes."""
        assert self.trainer is not None
        batches = step * self.trainer.accumulate_grad_batches + micro_batch
        return batches * self._place[1] * self.training.batch_size

    def _loaded(self, samples: Mixed | Even, numbers: Sequence[int]) -> DataLoader[Batch]:
        return loader(samples, self.training.batch_size, numbers, self.workers)
