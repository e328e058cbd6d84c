"""`train`: a cube, a network and a trainer -> a run folder with `model.safetensors` and `model.json`."""

import hashlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning import Callback, Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, Timer
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load, save

from metnet.model import MetNet
from metnet.prior import Pixels
from pipelines.frame import parse_time
from pipelines.observations import Observations
from pipelines.plain import rain_cube
from pipelines.progress import track
from pipelines.samples import ENDLESS, Mixed, Samples, Span, split
from pipelines.task import Learning, RadarData, Task
from pipelines.trained import CARD, WEIGHTS, read_card
from pipelines.version import version

CONFIG = "config.json"
LAST = "checkpoints/last.ckpt"
PRIOR = "prior.safetensors"
PRIOR_SAMPLES = 64  # that the prior is fitted on
PRIOR_PIXELS = 800  # of each sample and lead time
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


def train(
    cube: str | Sequence[str],
    run: str,
    model: Callable[[], MetNet],
    trainer: Callable[..., Trainer],
    lead_times: Sequence[float],
    config: Mapping[str, Any],
    learning_rate: float = 1e-3,
    batch_size: int = 4,
    crop: int = 128,
    validation: float = 0.15,
    validation_samples: int = 16,
    validation_cubes: Sequence[str] = (),
    prior_steps: int = 150,
    check_every: int = 100,
    leads_per_step: int = 4,
    augment: bool = True,
    seed: int = 0,
    start: str | None = None,
    end: str | None = None,
) -> Trained:
    """Trains `model` on cubes to the trainer's limit; the same call again goes on where the last one ended.

    The prior of a network with advection is fitted first. Of each cube, the lead times count that are
    multiples of its cadence.

    Args:
        cube: folder or URL, or several: each is drawn from as often as any other.
        run: folder for checkpoints, logs and the finished model.
        model: makes the network, once the seed is set.
        trainer: makes Lightning's trainer from logger, callbacks and switches; holds the limits.
        lead_times: minutes, multiples of the cube's cadence.
        config: the whole call as it was resolved; `config["model"]` must make the network again.
        learning_rate: of AdamW, at its highest.
        batch_size: samples of a step.
        crop: side of a sample in cells.
        validation: share of the init times, at the end of each cube; with `validation_cubes` none.
        validation_samples: how many samples are drawn from these of each cube, always the same.
        validation_cubes: whole events to validate on, which nothing is learned from.
        prior_steps: steps of fitting the prior, before the training.
        check_every: steps from one checkpoint (and validation) to the next.
        leads_per_step: how many of the lead times, drawn anew, a step learns from; validation takes all.
        augment: turn and mirror the training samples at random.
        seed: of the weights and of the samples.
        start: the first valid time of the cube to use, ISO 8601; None: the cube's first.
        end: the last valid time to use, of targets too; None: the cube's last.

    Raises:
        ValueError: if there is no cube or too little of it, a lead time is no multiple of its cadence, the
            run folder belongs to another call, or the loss stops being finite.
    """
    for key, count, least in (
        ("leads_per_step", leads_per_step, 1),
        ("check_every", check_every, 1),
        ("prior_steps", prior_steps, 0),
    ):
        if count < least:
            raise ValueError(f"{key}={count}: expected at least {least}")
    folder = Path(run)
    finished = _finished(folder, config)
    if finished is not None:
        return finished
    learned = [rain_cube(path) for path in ([cube] if isinstance(cube, str) else cube)]
    kept = [rain_cube(path) for path in validation_cubes]
    if not learned:
        raise ValueError("cube=[]: expected at least one to learn from")
    seed_everything(seed, verbose=False)
    network = model()
    share = 0.0 if kept else validation
    training, validating = [], []
    span_of = Span.of if len(learned) + len(kept) == 1 else Span.of_those
    for opened in learned:
        span = span_of(opened.cadence, network.frames, lead_times)
        used = _between(opened, start, end)
        parts = split(opened.observed[used], span, share).later(used.start)
        if share and not len(parts.validation):
            log.warning(
                "%s has %d frames: too few to keep some for validation, all are trained on",
                opened.path,
                opened.observed.sum(),
            )
        training.append(Samples(opened, parts.training, span, crop, seed=seed, augment=augment))
        if len(parts.validation):
            validating.append(Samples(opened, parts.validation, span, crop, validation_samples, seed + 1))
    for opened in kept:
        span = span_of(opened.cadence, network.frames, lead_times)
        inits = split(opened.observed, span, 0.0).training
        validating.append(Samples(opened, inits, span, crop, validation_samples, seed + 1))
    data = RadarData(Mixed(training, batch_size, seed), validating, check_every)
    with _alone(folder):
        _begin(folder, config, [opened.snapshot for opened in learned])
        _fit_prior(network, data.training, folder, prior_steps, seed)
        task = Task(network, Learning(learning_rate), leads_per_step, seed)
        with _quiet():
            fitted = _fit(trainer, task, data, folder)
        return _finish(folder, config, learned, kept, crop, lead_times, task, fitted)


def _fit_prior(network: MetNet, samples: Mixed, folder: Path, steps: int, seed: int) -> None:
    """Gives a network with advection the prior that fits the training samples best.

    It is kept in the run folder, so that a training that goes on starts from the same.
    """
    if network.prior is None or not steps:
        return
    place = folder / PRIOR
    if place.is_file():
        network.prior.load_state_dict(load(place.read_bytes()))
        return
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for number in track(range(PRIOR_SAMPLES), "fitting the prior", total=PRIOR_SAMPLES):
        batch = samples[ENDLESS // 2 + number * samples.batch_size]  # none that a step learns from
        drawn.append(network.pixels(batch, PRIOR_PIXELS, generator))
    network.prior.fit(Pixels.joined(drawn), steps, seed=seed)
    _replace(place, save(network.prior.state_dict()))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second training out of a run folder.

    Raises:
        ValueError: if one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "train.lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"run={folder}: another training is at work there; wait for it") from error


def _between(cube: Observations, start: str | None, end: str | None) -> slice:
    """The steps of the cube's time axis within [start, end]."""
    low = parse_time(start) if start else cube.times[0]
    high = parse_time(end) if end else cube.times[-1]
    before = sum(time < low for time in cube.times)
    return slice(before, before + sum(low <= time <= high for time in cube.times))


def _finished(folder: Path, config: Mapping[str, Any]) -> Trained | None:
    """The result of a run that this very call has finished before.

    A folder in which no training has left anything yet belongs to nobody: a wrong setting may be put right.

    Raises:
        ValueError: if the folder belongs to a call with other settings than how long to train.
    """
    started = folder / CONFIG
    if started.is_file() and ((folder / LAST).is_file() or (folder / CARD).is_file()):
        before, wanted = (
            dict(_settings(call)) for call in (json.loads(started.read_text())["config"], _plain(config))
        )
        differing = sorted(key for key in {*before, *wanted} if before.get(key) != wanted.get(key))
        if differing:
            named = ", ".join(f"{key}={wanted.get(key)} (it was {before.get(key)})" for key in differing)
            raise ValueError(
                f"run={folder} was started with other settings: {named}; choose another run folder"
            )
    card = read_card(folder)
    if card is None or card["config"].get("trainer") != _plain(config).get("trainer"):
        return None
    return Trained(
        folder, card["steps"], card["seconds"], card["parameters"], card["validation"], before=True
    )


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings that make a run what it is, each with its dotted key; not where, nor how long."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.") if prefix or key != "trainer" else ()
        elif prefix or key != "run":
            yield f"{prefix}{key}", value


def _begin(folder: Path, config: Mapping[str, Any], snapshots: list[str]) -> None:
    """Writes down what the run was started with; warns if a cube has changed since."""
    folder.mkdir(parents=True, exist_ok=True)
    started = folder / CONFIG
    if started.is_file():
        before = json.loads(started.read_text())["cube_snapshots"]
        for old, new in zip(before, snapshots, strict=True):
            if old != new:
                log.warning("%s goes on with a cube that has changed: snapshot %s, then %s", folder, old, new)
    _replace(started, json.dumps({"config": config, "cube_snapshots": snapshots}, indent=2).encode())


def _fit(make: Callable[..., Trainer], task: Task, data: RadarData, folder: Path) -> "Fitted":
    """Trains from the last checkpoint, or from the start, to the trainer's limit; keeps what validates best.

    The untrained network counts too: it is the fitted prior, which a short training can spoil.
    """
    last = folder / LAST
    validated = bool(data.validation)
    keep = ModelCheckpoint(
        last.parent,
        filename="best",
        monitor="val_crps" if validated else None,
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    on_terminal = sys.stderr.isatty()
    bar: list[Callback] = [RichProgressBar()] if on_terminal else []
    trainer = _made(make, [keep, *bar], folder, on_terminal)
    start = {name: weight.clone() for name, weight in task.state_dict().items()}
    if validated:
        trainer.validate(task, datamodule=data, verbose=False)
    untrained = task.scores
    try:
        trainer.fit(task, datamodule=data, ckpt_path=last if last.is_file() else None, weights_only=True)
    except SystemExit as stop:  # what Lightning makes of Ctrl+C
        raise KeyboardInterrupt from stop
    trainer.save_checkpoint(last)
    steps = trainer.global_step
    if validated and task.scored_at != steps:
        trainer.validate(task, datamodule=data, verbose=False)
    best = keep.best_model_score
    if validated and best is not None and float(best) < task.scores["val_crps"]:
        task.load_state_dict(torch.load(keep.best_model_path, weights_only=True)["state_dict"])
        trainer.validate(task, datamodule=data, verbose=False)
    if validated and untrained["val_crps"] < task.scores["val_crps"]:
        log.warning("the untrained network validates better than the trained one, and is kept: train longer")
        task.load_state_dict(start)
        task.scores = untrained
    if validated:
        task.scores = {**task.scores, "val_crps_prior": untrained["val_crps"]}
    timer = next(callback for callback in trainer.callbacks if isinstance(callback, Timer))  # type: ignore[attr-defined]
    return Fitted(steps, timer.time_elapsed(), task.scores)


@dataclass(frozen=True)
class Fitted:
    """How long it was trained, and how well it validates."""

    steps: int
    seconds: float
    scores: Mapping[str, float]


def _made(
    make: Callable[..., Trainer], callbacks: Sequence[Callback], folder: Path, on_terminal: bool
) -> Trainer:
    """The trainer, with a clock if it has none.

    Raises:
        ValueError: if it would never end, or refuses its arguments.
    """
    try:
        trainer = make(
            max_epochs=-1,
            callbacks=[*callbacks],
            logger=CSVLogger(folder, name="logs"),
            default_root_dir=folder,
            gradient_clip_val=1.0,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
            log_every_n_steps=10,
            enable_progress_bar=on_terminal,
            enable_model_summary=False,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(f"trainer: {error}") from error
    except AttributeError as error:  # what Lightning makes of max_time=5
        raise ValueError("trainer.max_time: expected days:hours:minutes:seconds") from error
    timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if any(isinstance(callback, Timer) and callback.time_remaining() == 0 for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError("trainer.max_time: expected more than no time at all")
    if trainer.max_steps < 0 and not timed:
        raise ValueError("trainer.max_steps=-1 and trainer.max_time=null: give one of them, or it never ends")
    if not timed:
        trainer.callbacks.append(Timer())  # type: ignore[attr-defined]
    return trainer


def _finish(
    folder: Path,
    config: Mapping[str, Any],
    learned: Sequence[Observations],
    kept: Sequence[Observations],
    crop: int,
    lead_times: Sequence[float],
    task: Task,
    fitted: Fitted,
) -> Trained:
    """Writes weights, then card: a card is only ever beside its own weights.

    Raises:
        ValueError: if the scores are not finite.
    """
    if not all(math.isfinite(score) for score in fitted.scores.values()):
        raise ValueError(
            f"the network validates with {dict(fitted.scores)}: it has diverged, and no model is written; "
            "lower learning_rate and choose another run folder"
        )
    network = task.average
    weights = save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
    parameters = sum(parameter.numel() for parameter in network.parameters())
    card = {
        "config": config,
        "bins": {"edges": network.bins.edges, "top": network.bins.top},  # mm/h
        "scaling": network.scaling.card(),
        "frames": network.frames,
        "cadence_minutes": sorted({cube.cadence.total_seconds() / 60 for cube in learned}),
        "lead_times": [float(lead) for lead in lead_times],
        "crop": crop,
        "cubes": [_told(cube) for cube in learned],
        "validation_cubes": [_told(cube) for cube in kept],
        "steps": fitted.steps,
        "seconds": round(fitted.seconds, 1),
        "parameters": parameters,
        "validation": fitted.scores or None,
        "software": f"metnet-nowcast {version()}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    _replace(folder / WEIGHTS, weights)
    _replace(folder / CARD, json.dumps(card, indent=2).encode())
    return Trained(folder, fitted.steps, fitted.seconds, parameters, fitted.scores)


def _told(cube: Observations) -> dict[str, Any]:
    """What a card says of a cube."""
    return {"path": cube.path, "snapshot": cube.snapshot, "cell_size": cube.grid.cell_size}  # metres


def _replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return plain


@contextmanager
def _quiet() -> Iterator[None]:
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
