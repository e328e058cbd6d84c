"""Lightning's trainer, made for a run folder; refuses what Lightning would take and get wrong."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

PRECISIONS = ("32-true", "bf16-mixed")  # 16 bits would want losses that are scaled
AUTO = "auto"  # the quicker of them
OWN = {  # of the trainer's arguments: what goes on and what is kept follow from them
    "callbacks",
    "check_val_every_n_epoch",
    "default_root_dir",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "max_epochs",
    "num_sanity_val_steps",
    "strategy",
    "use_distributed_sampler",
    "val_check_interval",
}
log = logging.getLogger(__name__)


def make_trainer(
    make: Callable[..., Trainer], callbacks: Sequence[Callback], folder: Path, strategy: Strategy | None
) -> Trainer:
    """The trainer, with a clock if it has none.

    Raises:
        ValueError: if it would never end, refuses its arguments, or is given one that is not its user's.
    """
    given = make.keywords if isinstance(make, partial) else {}
    for key in sorted(OWN & given.keys()):
        instead = "choose strategy=ddp or fsdp" if key == "strategy" else "leave it out"
        raise ValueError(
            f"trainer.{key}={given[key]}: expected no such key, which is the training's own; {instead}"
        )
    try:
        trainer = make(
            max_epochs=-1,
            callbacks=[*callbacks],
            logger=[
                CSVLogger(folder, name="logs"),
                TensorBoardLogger(folder, name="tensorboard", version=""),
            ],
            default_root_dir=folder,
            strategy=strategy or "auto",
            num_sanity_val_steps=0,
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (AttributeError, MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
        if isinstance(error, AttributeError) or "Timer" in str(error):  # what Lightning says of max_time=5
            time = given.get("max_time", "?")
            raise ValueError(
                f"trainer.max_time={time}: expected days:hours:minutes:seconds, such as 00:00:15:00"
            ) from error
        if str(error).startswith("Precision"):
            raise ValueError(
                f"trainer.precision={given.get('precision', '?')}: expected one of "
                f"{', '.join((*PRECISIONS, AUTO))}"
            ) from error
        if (accelerator := _accelerator(make)) not in ("auto", "cpu"):
            raise ValueError(
                f"trainer.accelerator={accelerator}: {error}; expected one that this machine has, such as "
                "cpu, or auto, which takes a GPU where there is one"
            ) from error
        raise ValueError(f"{error}; trainer: expected the keys and values of Lightning's Trainer") from error
    _check(trainer, strategy)
    timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if any(isinstance(callback, Timer) and callback.time_remaining() == 0 for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError("trainer.max_time: expected more than no time at all")
    if trainer.max_steps < 0 and not timed:
        raise ValueError("trainer.max_steps=-1 and trainer.max_time=null: give one of them, or it never ends")
    if not timed:
        trainer.callbacks.append(Timer())  # type: ignore[attr-defined]
    return trainer


def decided(
    make: Callable[..., Trainer], config: Mapping[str, Any], before: str | None
) -> tuple[Callable[..., Trainer], Mapping[str, Any]]:
    """A trainer and its call with a precision in place of `AUTO`: the one of `before`, or the quicker one.

    Raises:
        ValueError: for 16 bits of little range, which Lightning takes for others on a CPU.
    """
    given = make.keywords if isinstance(make, partial) else {}
    asked = str(given.get("precision", ""))
    if asked.startswith("16"):
        raise ValueError(
            f"trainer.precision={asked}: expected one of {', '.join((*PRECISIONS, AUTO))}; "
            "take bf16-mixed, which needs no scaling of the loss"
        )
    accelerator = _accelerator(make)
    if asked == AUTO:
        quick = "bf16-mixed" if _knows_bfloat16(accelerator) else "32-true"
        log.info("trainer.precision=auto: %s", before or f"{quick}, which is the quicker one here")
        found = before or quick
        make = partial(make, precision=found)
        config = {**config, "trainer": {**config.get("trainer", {}), "precision": found}}
    elif asked.startswith("bf16") and not _knows_bfloat16(accelerator):
        log.warning(
            "trainer.precision=%s: this machine has no known instructions for bfloat16, without which it "
            "takes several times as long as 32-true; trainer.precision=auto takes the quicker one",
            asked,
        )
    return make, config


def _accelerator(make: Callable[..., Trainer]) -> str:
    """What is asked for."""
    given = make.keywords if isinstance(make, partial) else {}
    return str(given.get("accelerator", "auto"))


def _knows_bfloat16(accelerator: str) -> bool:
    """Whether the hardware is one of those known to be quicker in bfloat16."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return accelerator in ("auto", "cpu") and any(has.get(name) for name in ("amx_bf16", "avx512_bf16"))


def _check(trainer: Trainer, strategy: Strategy | None) -> None:
    """Refuses what Lightning would take and get wrong: a norm below 0 turns every gradient around.

    Raises:
        ValueError: naming the key.
    """
    clip, every = trainer.gradient_clip_val, trainer.log_every_n_steps  # type: ignore[attr-defined]
    known = f"one of {', '.join((*PRECISIONS, AUTO))}"
    alone = "1 with strategy=alone; for several processes, set strategy=ddp"
    for key, value, expected, is_right in (
        ("precision", trainer.precision, known, trainer.precision in PRECISIONS),
        (
            "accumulate_grad_batches",
            trainer.accumulate_grad_batches,
            "at least 1",
            trainer.accumulate_grad_batches >= 1,
        ),
        ("gradient_clip_val", clip, "a norm, or 0 for none", clip is None or 0 <= clip < math.inf),
        ("log_every_n_steps", every, "at least 1, or 0 for no logs", every >= 0),
        ("devices", trainer.num_devices, alone, strategy is not None or trainer.num_devices == 1),
        ("num_nodes", trainer.num_nodes, alone, strategy is not None or trainer.num_nodes == 1),
    ):
        if not is_right:
            raise ValueError(f"trainer.{key}={value}: expected {expected}")
    if isinstance(strategy, ModelParallelStrategy):
        _check_shares(strategy, trainer.num_devices * trainer.num_nodes)


def _check_shares(strategy: ModelParallelStrategy, processes: int) -> None:
    """Refuses to share weights out among other processes than there are, which Lightning does at the start.

    Raises:
        ValueError: naming the key.
    """
    shares, split = strategy._data_parallel_size, strategy._tensor_parallel_size
    numbers = [size for size in (shares, split) if isinstance(size, int)]
    if len(numbers) == 2 and math.prod(numbers) != processes:
        raise ValueError(
            f"strategy.data_parallel_size={shares}: expected {processes}, as many as there are processes "
            "(trainer.devices x trainer.num_nodes); set one of them to the other"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Lightning's remarks and hints from the terminal; errors still come."""
    loggers = [
        logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
