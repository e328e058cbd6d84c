"""`Progress` and `WriteScores`: what a training says of itself while it goes on."""

import sys
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from pipelines.task import Task, progress
from pipelines.validation import write_down

EVERY = 10  # steps from one figure of the speed to the next


class Progress(Callback):
    """Tells how fast a training is, how long it will take, and where the loss is.

    Samples a second and the seconds that are left go to the logs; on a terminal a bar shows them.

    Args:
        batch_size: samples of a micro-batch of one process.
        on_terminal: show the bar.
    """

    def __init__(self, batch_size: int, on_terminal: bool):
        self.batch_size, self.on_terminal = batch_size, on_terminal
        self._bar: Bar | None = None
        self._began = self._since = self._paused = 0.0  # seconds
        self._start = self._last = 0  # steps
        self._share = 0.0  # of the whole, where this call began

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._began = self._since = time.monotonic()
        self._start = self._last = trainer.global_step
        self._share = progress(trainer, trainer.global_step)
        if self.on_terminal and trainer.is_global_zero:
            columns = (
                TextColumn("training"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
            )
            self._bar = Bar(*columns, console=Console(file=sys.stderr), transient=True)
            self._bar.add_task("", total=1.0)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every few steps, says how it goes."""
        step = trainer.global_step
        if step - self._last < EVERY:
            return
        samples = (step - self._last) * self.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        figures = {"samples_per_second": samples / max(time.monotonic() - self._since, 1e-9)}
        share = progress(trainer, step)
        if share > self._share:
            gone = time.monotonic() - self._began
            figures["seconds_left"] = gone * (1 - share) / (share - self._share)
        pl_module.log_dict(figures)
        self._last, self._since = step, time.monotonic()
        if self._bar is not None:
            loss = float(trainer.callback_metrics.get("train_loss", float("nan")))
            self._bar.update(
                self._bar.task_ids[0], completed=share, description=described(step, loss, figures)
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock: validation is no part of the speed."""
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets it go on."""
        self._since += time.monotonic() - self._paused

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def described(step: int, loss: float, figures: dict[str, float]) -> str:
    """One line on a step: its number, the loss, the speed and the time left."""
    line = f"step {step}, loss {loss:.3f}, {figures['samples_per_second']:.1f} samples/s"
    if "seconds_left" not in figures:
        return line
    minutes, seconds = divmod(round(figures["seconds_left"]), 60)
    return f"{line}, {minutes}:{seconds:02d} left"


class WriteScores(Callback):
    """Writes the scores of every validation, by lead time, into a file of the run.

    Args:
        path: of the file; each of its lines is a JSON object.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds those of the newest."""
        assert isinstance(pl_module, Task)
        if trainer.is_global_zero and trainer.state.fn in (TrainerFn.FITTING, TrainerFn.VALIDATING):
            write_down(self.path, trainer.global_step, pl_module.validation)
