"""Checkpoints of a training: each file whole or not there at all, and its name tells what must be in it.

A checkpoint of step 120 is `step-00000120-<sha256>.ckpt`, with the first half of its digest. So one file is
written and renamed, nothing has to agree with a second one, and damage shows before anything is read from it.
"""

import hashlib
import logging
import math
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

FOLDER = "checkpoints"  # in the run folder
KEPT = 2  # the newest, and the one before it in case the newest is damaged
DIGITS = 32  # of the digest in a name
NAME = re.compile(rf"step-(\d{{8,}})-([0-9a-f]{{{DIGITS}}})\.ckpt")
UNFINISHED = "unfinished.ckpt"
STOPPING = (signal.SIGINT, signal.SIGTERM)
LONGEST = 300.0  # seconds of work that a power cut may cost, and a step more
log = logging.getLogger(__name__)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder; one that is damaged is passed over with a warning."""
    for _, path in sorted(all_of(folder), reverse=True):
        if _digest(path) == _promised(path):
            return path
        log.warning(
            "%s is damaged: its content is not what its name promises; going on from the one before it", path
        )
    return None


def file_away(unfinished: Path, step: int) -> Path:
    """Gives a file that was just written its name, safely on disk, and removes what it makes needless.

    Other files of this step and of later ones are left over from before a damaged checkpoint was passed over.
    """
    folder = unfinished.parent
    path = folder / f"step-{step:08d}-{_digest(unfinished)}.ckpt"
    to_disk(unfinished)
    unfinished.replace(path)
    to_disk(folder)
    before = sorted(entry for entry in all_of(folder) if entry[0] < step)
    kept = {path, *(older for _, older in before[len(before) - (KEPT - 1) :])}
    for _, other in all_of(folder):
        if other not in kept:
            other.unlink()
    return path


def all_of(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a folder, each with its step."""
    return [(int(found[1]), path) for path in folder.glob("*.ckpt") if (found := NAME.fullmatch(path.name))]


def _promised(path: Path) -> str:
    """The digest in a name."""
    return path.stem.rpartition("-")[2]


def _digest(path: Path) -> str:
    """Of what the file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would outlast a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class StoppedError(Exception):
    """The training was told to stop; what it had learned is in its newest checkpoint."""


class Checkpoints(Callback):
    """Writes a checkpoint every so many steps, after five minutes, at the end, and at Ctrl+C or SIGTERM.

    Only between two steps of the optimizer, when no gradient is half gathered. A second Ctrl+C does not wait
    for that. With several processes all take part, and the first writes.

    Args:
        folder: where they are.
        every: steps; where a validation is due at the same step, the checkpoint follows it.
    """

    def __init__(self, folder: Path, every: int):
        self.folder, self.every = folder, every
        self._written = -1  # the step of the newest
        self._since = math.inf  # when it was written, or the training began
        self._signal = 0  # that was received, if any

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to signals from here on, in place of Lightning, which stops within a step.

        Lightning gives every signal back to whom it belonged, before it tells its callbacks that all is over.
        """
        self._written = trainer.global_step if trainer.ckpt_path else -1
        self._since = time.monotonic()
        with suppress(ValueError):  # only the main thread of a process may listen
            for number in STOPPING:
                signal.signal(number, self._received)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes where a checkpoint is due and no validation, and gives way where that was asked for."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        due = trainer.global_step % self.every == 0
        if due and trainer.enable_validation:
            return  # it comes next, and what it finds is to be in the checkpoint
        stopping = self._told_to_stop(trainer)
        if due or stopping or _any(trainer, time.monotonic() - self._since > LONGEST):
            self._write(trainer)
        if stopping:
            raise StoppedError(f"stopped at step {trainer.global_step}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes after a validation during training."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._write(trainer)
        if self._told_to_stop(trainer):
            raise StoppedError(f"stopped at step {trainer.global_step}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the last step, unless that was done."""
        if self._written != trainer.global_step:
            self._write(trainer)

    def _told_to_stop(self, trainer: Trainer) -> bool:
        """Whether any process was."""
        return _any(trainer, bool(self._signal))

    def _write(self, trainer: Trainer) -> None:
        """The state of all that decides how the training goes on."""
        unfinished = self.folder / UNFINISHED
        trainer.save_checkpoint(unfinished)
        if trainer.is_global_zero:
            file_away(unfinished, trainer.global_step)
        trainer.strategy.barrier("checkpoint")
        self._written, self._since = trainer.global_step, time.monotonic()

    def _received(self, number: int, frame: FrameType | None) -> None:
        """Remembers a signal until the step is done; the second time, stops at once."""
        if self._signal:
            raise KeyboardInterrupt
        self._signal = number


def _any(trainer: Trainer, here: bool) -> bool:
    """Whether it is so in any process."""
    return trainer.strategy.reduce_boolean_decision(here, all=False) if trainer.world_size > 1 else here
