"""`Task`: one step of learning, one of validation, and the schedule; `RadarData`: the loaders of both."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from metnet.batch import Batch
from metnet.loss import cross_entropy
from metnet.model import MetNet
from metnet.rain import BinnedForecast
from pipelines.samples import Mixed, Samples, collate

LOWEST = 0.01  # of the learning rate, at the end of the schedule
LONGEST_MEMORY = 0.999  # of the averaged weights, from step to step


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


class Task(LightningModule):
    """Masked cross-entropy on rain bins by AdamW; CRPS (mm/h) on the validation samples.

    What is validated and kept is `average`, whose weights follow the network's slowly (an exponential moving
    average that remembers about a tenth of the steps so far): one step's noise does not decide.
    """

    def __init__(self, network: MetNet, learning: Learning, leads: int, seed: int = 0):
        """`leads` of the lead times, drawn anew for each step by `seed` and its number, are learned from."""
        super().__init__()
        self.network = network
        self.average = copy.deepcopy(network).requires_grad_(False).eval()
        self.learning = learning
        self.leads = leads
        self.seed = seed
        self.scores: dict[str, float] = {}  # of the last validation
        self.scored_at = -1  # the step it was done at
        self._sums = torch.zeros(5, dtype=torch.float64)

    def training_step(self, batch: Batch) -> Tensor:
        """The loss of one batch.

        Raises:
            ValueError: if it is not finite, naming the step and the init times.
        """
        batch, target = self._some_leads(batch)
        loss = cross_entropy(self.network.logits(batch), target, self.network.bins)
        if not torch.isfinite(loss):
            times = [datetime.fromtimestamp(time, UTC).isoformat() for time in batch.init_time.tolist()]
            raise ValueError(
                f"the loss is {loss.item()} at step {self.global_step} (init times {', '.join(times)}); "
                "the last checkpoint is still good: lower learning_rate, or look at these times in the cube"
            )
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch.radar))
        return loss

    def on_train_batch_end(self, outputs: object, batch: Batch, index: int) -> None:
        """Lets the average follow."""
        memory = min(LONGEST_MEMORY, (1 + self.global_step) / (10 + self.global_step))
        with torch.no_grad():
            for kept, newest in zip(self.average.parameters(), self.network.parameters(), strict=True):
                kept.lerp_(newest, 1 - memory)

    def on_validation_epoch_start(self) -> None:
        """Nothing is summed up yet."""
        self._sums.zero_()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up loss and CRPS, and the CRPS of persistence on the same pixels."""
        logits, target = self.average.logits(batch), _target(batch)
        loss = cross_entropy(logits, target, self.network.bins)
        crps = BinnedForecast(logits.softmax(dim=2), self.network.bins).crps(target)
        persistence = (batch.radar[:, -1:] - target).abs()
        both = torch.isfinite(crps) & torch.isfinite(persistence)
        seen = torch.isfinite(target).sum()
        self._sums += torch.stack(
            [
                loss * seen,
                seen,
                crps[both].sum(dtype=torch.float64),
                persistence[both].sum(dtype=torch.float64),
                both.sum(),
            ]
        ).to(self._sums)

    def on_validation_epoch_end(self) -> None:
        """Logs the means over all validation samples."""
        loss, seen, crps, persistence, both = self._sums.tolist()
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
        self.log_dict(self.scores)

    def _some_leads(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch and its target at as many lead times as a step can afford, the same for all samples."""
        count, target = len(batch.lead_time), _target(batch)
        if self.leads >= count:
            return batch, target
        random = np.random.default_rng((self.seed, self.global_step))
        some = torch.from_numpy(np.sort(random.choice(count, self.leads, replace=False)))
        some = some.to(batch.lead_time.device)
        return replace(batch, lead_time=batch.lead_time[some], target=None), target[:, some]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, its rate set at every step by how much of the training is over."""
        optimizer = AdamW(
            self.network.parameters(), lr=self.learning.rate, weight_decay=self.learning.weight_decay
        )
        schedule = LambdaLR(optimizer, lambda step: self.learning.factor(progress(self.trainer, step)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _target(batch: Batch) -> Tensor:
    """What happened (mm/h); there is nothing to learn from without."""
    if batch.target is None:
        raise ValueError("the batch has no target: expected one made by Samples")
    return batch.target


def progress(trainer: Trainer, step: int) -> float:
    """The share of the training that is over, by steps or by time, whichever ends it first."""
    by_steps = step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    by_time = 0.0
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None:
            gone = callback.time_elapsed()
            by_time = gone / (gone + left)
    return max(by_steps, by_time)


class RadarData(LightningDataModule):
    """Training samples that go on from epoch to epoch, and the same validation samples in each.

    The samples of an epoch follow from its number alone, so a training that was cut off and goes on sees what
    it would have seen.
    """

    def __init__(self, training: Mixed, validation: Sequence[Samples], steps: int):
        """`steps` batches are an epoch."""
        super().__init__()
        self.training, self.validation, self.steps = training, validation, steps

    def train_dataloader(self) -> DataLoader[Batch]:
        """The samples of this epoch."""
        trainer = self.trainer
        epoch = 0 if trainer is None else trainer.current_epoch
        count = self.steps * self.training.batch_size
        first = epoch * count
        numbers = range(first, first + count)
        return DataLoader(self.training, self.training.batch_size, sampler=numbers, collate_fn=collate)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """The validation samples of each cube; no loader where there are none."""
        size = self.training.batch_size
        return [DataLoader(samples, size, collate_fn=collate) for samples in self.validation]
