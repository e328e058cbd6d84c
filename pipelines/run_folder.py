"""The folder of a training: whose it is, what it was begun with, and whether it is finished."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from metnet.forward import FORWARD
from pipelines import destination
from pipelines.checkpoints import FOLDER, all_of, newest, to_disk
from pipelines.trained import CARD, WEIGHTS, check_forward, has_its_weights, read_card

CONFIG = "config.json"
FREE = ("run", "pictures", "strategy", "workers")  # where, what is shown, and by whom
FREE_OF_TRAINER = (
    "max_steps",
    "max_time",
    "accelerator",
    "devices",
    "num_nodes",
    "log_every_n_steps",
)  # how long, and on what
SHOWN = 80  # characters of a setting, at most
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a call of `train` leaves behind."""

    run: Path
    steps: int
    seconds: float  # of training, over all calls that shared the run
    parameters: int
    validation: Mapping[str, float]  # val_loss, val_crps, val_crps_persistence; empty without validation
    before: bool = False  # the run was finished already and nothing was done

    def __str__(self) -> str:
        """For a person at a terminal."""
        head = f"{self.run}: " + ("finished before, nothing to do" if self.before else "trained")
        size = f"{self.parameters:,} parameters, {self.steps} steps in {self.seconds:.0f} s"
        if not self.validation:
            return f"{head}\n  {size}\n  no validation"
        scores = self.validation
        return (
            f"{head}\n  {size}\n  validation: CRPS {scores['val_crps']:.4f} mm/h "
            f"(before training {scores['val_crps_prior']:.4f}, "
            f"persistence {scores['val_crps_persistence']:.4f}), cross-entropy {scores['val_loss']:.4f} nats"
        )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps a second training out of a run folder; processes that help the first one may come in.

    Raises:
        ValueError: if one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = f"run={folder}: another training is at work there; wait for it"
    with nullcontext() if helps() else destination.alone_in(folder, "train", taken):
        yield


def finished(folder: Path, config: Mapping[str, Any]) -> Trained | None:
    """The result of a run that this very call has finished before.

    A folder in which no training has left anything yet belongs to nobody: a wrong setting may be put right.

    Raises:
        ValueError: if the folder belongs to a call with other settings than how long to train, or to software
            whose networks compute otherwise.
    """
    started = folder / CONFIG
    if has_learned(folder) and started.is_file():
        check_forward(started, json.loads(started.read_text()))
    if has_learned(folder) and (differing := _differing(folder, config)):
        raise ValueError(
            f"run={folder} was started with other settings: {', '.join(differing)}; choose another run folder"
        )
    card = read_card(folder)
    if card is None or card["config"].get("trainer") != plain(config).get("trainer"):
        return None
    if not has_its_weights(folder, card):
        log.warning(
            "%s is not there, or not what %s says; making it again, from the newest checkpoint if any",
            folder / WEIGHTS,
            CARD,
        )
        return None
    return Trained(
        folder, card["steps"], card["seconds"], card["parameters"], card["validation"], before=True
    )


def has_learned(folder: Path) -> bool:
    """Whether a training left anything in a run folder that another one could go on from."""
    return bool(all_of(folder / FOLDER)) or (folder / CARD).is_file()


def _differing(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The settings of a call that a run folder was not begun with, each with what it was."""
    started = folder / CONFIG
    if not started.is_file():
        return []
    before, wanted = (
        dict(settings(call)) for call in (json.loads(started.read_text())["config"], plain(config))
    )
    return [
        f"{key}={_in_short(wanted.get(key))} (it was {_in_short(before.get(key))})"
        for key in sorted({*before, *wanted})
        if before.get(key) != wanted.get(key) and (key in before or wanted[key])  # a new one may be off
    ]


def _in_short(value: Any) -> str:
    """A setting, or the beginning of a long one."""
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings that make a run what it is, each with its dotted key; not where, nor how long."""
    free = {"": FREE, "trainer.": FREE_OF_TRAINER}.get(prefix, ())
    for key, value in config.items():
        if key in free:
            continue
        if isinstance(value, Mapping):
            yield from settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def begin(
    folder: Path, config: Mapping[str, Any], snapshots: Mapping[str, str], begun: Mapping[str, Any] | None
) -> None:
    """Writes down what the run is started with: settings, snapshots of its cubes by path, weights."""
    if helps():
        return
    told = {"config": config, "cube_snapshots": snapshots, "weights": begun, "forward": FORWARD}
    replace_file(folder / CONFIG, json.dumps(told, indent=2).encode())


def begun_snapshots(folder: Path) -> Mapping[str, str]:
    """By path, the snapshots of the cubes of the training that this one goes on with, or helps."""
    started = folder / CONFIG
    if not started.is_file() or not (helps() or has_learned(folder)):
        return {}
    told: Mapping[str, str] = json.loads(started.read_text())["cube_snapshots"]
    return told


def begun_with(folder: Path) -> Mapping[str, Any] | None:
    """What is told of the weights that a training began with, if it left a checkpoint to go on from."""
    started = folder / CONFIG
    if not started.is_file() or newest(folder / FOLDER) is None:
        return None
    told: Mapping[str, Any] | None = json.loads(started.read_text()).get("weights")
    return told


def begun_precision(folder: Path) -> str | None:
    """The precision of the training that this one goes on with, or helps; None: it is a new one."""
    started = folder / CONFIG
    if not started.is_file() or not (helps() or has_learned(folder)):
        return None
    told = json.loads(started.read_text())["config"].get("trainer") or {}
    precision = told.get("precision")
    return None if precision is None else str(precision)


def helps() -> bool:
    """Whether this process is one that helps a first one, which alone writes."""
    return int(getattr(rank_zero_only, "rank", 0)) > 0


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, also where the power goes."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content)
    to_disk(unfinished)
    unfinished.replace(path)
    to_disk(path.parent)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return plain
