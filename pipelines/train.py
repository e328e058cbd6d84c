"""`train`: a cube, a network and a trainer -> a run folder with `model.safetensors` and `model.json`."""

import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from icechunk import IcechunkError
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.strategies import Strategy
from safetensors.torch import save
from torch import Tensor, nn

from metnet.axial_head import Coherent
from metnet.forward import FORWARD
from metnet.head import Ordinal
from metnet.loss import Loss, cross_entropy, ordinal
from metnet.metnet2 import MetNet2
from metnet.model import MetNet
from pipelines import destination
from pipelines.augmentation import NOTHING_CHANGED, Augmentation
from pipelines.beginning import Fitting, fingerprint, fit_start, keep_prior, taken_over, warn_of_seen
from pipelines.beside import Beside
from pipelines.calibrating import Calibrated, calibrated
from pipelines.checkpoints import FOLDER, Checkpoints, StoppedError, newest
from pipelines.cube import Cube
from pipelines.drop_out import DropOut
from pipelines.observations import Observations
from pipelines.plain import rain_cube
from pipelines.run_folder import (
    Trained,
    alone_in,
    begin,
    begun_precision,
    begun_snapshots,
    begun_with,
    finished,
    helps,
    replace_file,
)
from pipelines.sample_store import stored
from pipelines.samples import SMALLEST_CROP, Mixed, Samples
from pipelines.sampling import Sampling, knowable, samples_of
from pipelines.task import Habits, Importance, Learning, RadarData, Task
from pipelines.trained import CARD, WEIGHTS, Published, read_card
from pipelines.trainer import decided, make_trainer, quiet
from pipelines.training_log import Progress, WriteScores
from pipelines.training_pictures import Pictures
from pipelines.version import version

NOTHING_DROPPED = DropOut()
VALIDATION = "validation.jsonl"
MANY_CELLS = 1_000_000  # of all samples of a step
log = logging.getLogger(__name__)


def train(
    cube: str | Sequence[str],
    run: str,
    model: Callable[[], MetNet | Published | Coherent],
    trainer: Callable[..., Trainer],
    lead_times: Sequence[float],
    config: Mapping[str, Any],
    learning_rate: float = 1e-3,
    batch_size: int = 4,
    crop: int = 128,
    validation: float = 0.15,
    validation_samples: int = 16,
    validation_cubes: Sequence[str] = (),
    prior_samples: int = 64,
    prior_crop: int = 256,
    prior_steps: int = 150,
    local_steps: int = 900,
    check_every: int = 100,
    leads_per_step: int = 4,
    loss: Loss | None = None,
    importance: Sequence[Sequence[float]] = (),
    on_nonfinite: str = "stop",
    compile: bool = False,
    strategy: Strategy | None = None,
    pictures: bool = True,
    augment: bool = True,
    drop_out: DropOut = NOTHING_DROPPED,
    augmentation: Augmentation = NOTHING_CHANGED,
    satellite: Sequence[str] = (),
    static: Sequence[str] = (),
    reach: float = 2.0,
    workers: int = 0,
    seed: int = 0,
    start: str | None = None,
    end: str | None = None,
    weights: str | None = None,
) -> Trained | None:
    """Trains `model` on cubes to the trainer's limit; the same call again goes on where the last one ended.

    The prior of a network with advection is fitted first, unless all begins with `weights`. Of each cube, the
    lead times count that are multiples of its cadence.

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
        prior_samples: how many samples the prior is fitted on, and what is local beside it.
        prior_crop: side of these in cells: a pixel's neighbourhoods reach beyond `crop`.
        prior_steps: steps of fitting the prior, before the training.
        local_steps: steps of fitting what is local.
        check_every: steps from one checkpoint (and validation) to the next.
        leads_per_step: how many of the lead times, drawn anew, a step learns from; validation takes all.
        loss: what a forecast costs; None: the one that goes with the network's head.
        importance: pairs of a rate (mm/h), an edge of the network's bins, and how many pixels a pixel with so
            much rain counts as in the loss; the probabilities stay right.
        on_nonfinite: "stop" or "skip" a step whose loss or gradient is not finite.
        compile: compile what convolves and attends (`torch.compile`).
        strategy: Lightning's, where several processes train; None: one process.
        pictures: draw validation samples and their forecasts into the run folder.
        augment: turn and mirror the training samples at random.
        drop_out: how likely frames, radars and sources are missing in the training samples.
        augmentation: how often the training samples run backwards, are stronger or weaker, of another cadence
            or of coarser cells.
        satellite: groups of the cubes, one for each satellite channel or other radar of the network.
        static: fields of the cubes' group "static", one for each static field of the network.
        reach: how many crops wide the surroundings are.
        workers: processes that read samples; 0: the training itself.
        seed: of the weights and of the samples.
        start: the first valid time of the cube to use, ISO 8601; None: the cube's first.
        end: the last valid time to use, of targets too; None: the cube's last.
        weights: a finished run, or "pretrained", whose network and prior the training begins with.

    Returns:
        None in processes that help the first one.

    Raises:
        ValueError: if there is no cube or too little of it, a lead time is no multiple of its cadence, the
            run folder belongs to another call, or the loss stops being finite.
    """
    _check_counts(
        batch_size,
        crop,
        leads_per_step,
        check_every,
        prior_samples,
        prior_crop,
        prior_steps,
        local_steps,
        validation_samples,
        workers,
    )
    _check_learning(seed, learning_rate, on_nonfinite)
    folder = destination.folder("run", run)
    trainer, config = decided(trainer, config, begun_precision(folder))
    if (before := finished(folder, config)) is not None:
        _say_changed(folder)
        return before
    then = begun_snapshots(folder)
    learned = _opened([cube] if isinstance(cube, str) else cube, crop, then)
    kept = _opened(validation_cubes, crop, then)
    if not learned:
        raise ValueError("cube=[]: expected at least one to learn from")
    seed_everything(seed, verbose=False)
    network = model()
    resumed = begun_with(folder)
    begun = resumed
    if weights is not None and begun is None:
        begun = taken_over(network, weights, config, (satellite, static, reach))
    counts = tuple(tuple(float(number) for number in step) for step in importance)
    Importance(network.bins, counts)  # refuses wrong ones before any work
    skip: Literal["stop", "skip"] = "skip" if on_nonfinite == "skip" else "stop"
    habits = Habits(leads_per_step, seed, loss or _loss_of(network), counts, skip, compile)
    beside = Beside.of(network, satellite, static, reach)
    sampling = Sampling(
        frames=network.frames,
        lead_times=lead_times,
        all_leads=len(learned) + len(kept) == 1,
        crop=crop,
        beside=beside,
        seed=seed,
        augment=augment,
        drop_out=drop_out,
        augmentation=knowable(augmentation, network),
        validation_samples=validation_samples,
    )
    training, validating = samples_of(sampling, learned, kept, validation, start, end)
    leads = sorted({lead for each in training for lead in each.lead_times})
    _say_unlearned(lead_times, leads)
    _check_seen(network, crop, [*training, *validating], leads)
    _say_large(batch_size, training)
    data = RadarData(Mixed(training, batch_size, seed), validating, workers)
    if begun is not None:
        warn_of_seen(begun, [each.cube for each in validating])
    snapshots = {opened.path: opened.snapshot for opened in (*learned, *kept)}
    with quiet():
        made = _trainer(trainer, data, folder, check_every, strategy, pictures)
    with alone_in(folder):
        begin(folder, config, snapshots, begun)
        if begun is None:
            wide, wide_kept = ([each.of_crop(prior_crop) for each in some] for some in (training, validating))
            _say_refused(wide, training)
            around = RadarData(Mixed(wide, batch_size, seed), wide_kept)
            fitting = Fitting(prior_samples, prior_steps, local_steps)
            frames = fingerprint(config, [*snapshots.values()])
            fit_start(network, around, folder, fitting, seed, frames)
        elif resumed is None and not helps():
            keep_prior(network, folder)
        task = Task(network, Learning(learning_rate), habits, data, lead_times)
        with quiet():
            fitted = _fit(made, task, data, folder)
        if helps():
            return None
        network = model().eval()  # afresh: that of the task may be shared out among processes
        network.load_state_dict(fitted.weights)
        calibration = _calibrated(network, data.validation)
        return _finish(
            folder, config, learned, kept, crop, leads, beside, network, task, fitted, calibration, begun
        )


def _say_changed(folder: Path) -> None:
    """Says which of the cubes that a finished training learned from hold something else by now."""
    card = read_card(folder)
    assert card is not None
    for cube in card["cubes"]:
        with suppress(OSError, ValueError):  # it may be gone: nothing is wanted of it
            if rain_cube(cube["path"]).snapshot != cube["snapshot"]:
                log.warning(
                    "%s has changed since it was learned from; to learn from it as it is now, choose another "
                    "run folder",
                    cube["path"],
                )


def _say_unlearned(asked: Sequence[float], learned: Sequence[float]) -> None:
    """Says which of the lead times that are asked for no cube teaches."""
    none = [lead for lead in asked if not any(math.isclose(lead, other, abs_tol=1e-3) for other in learned)]
    if none:
        told = ", ".join(f"{lead:g}" for lead in none)
        log.info("no cube is of a cadence, and long enough, to learn from at lead times of %s min", told)


def _check_seen(
    network: nn.Module, crop: int, samples: Sequence[Samples], lead_times: Sequence[float]
) -> None:
    """Refuses lead times and sizes of samples that a network was not made for.

    Raises:
        ValueError: naming them.
    """
    told = network.network if isinstance(network, Coherent) else network  # the lead times
    if (planes := getattr(told, "planes", None)) is not None:
        planes.check(lead_times)
    if isinstance(told, MetNet2):
        told.covered(torch.tensor(lead_times))
    if not isinstance(told, Published):
        return
    for each in samples:
        if each.size != (told.side, told.side):
            rows, columns = each.size
            raise ValueError(
                f"crop={crop}: samples of {each.cube.path} have {rows} x {columns} cells, and this "
                f"{type(told).__name__} sees {told.side} x {told.side}; expected crop={told.side}, and cubes "
                "at least as large"
            )


def _say_large(batch_size: int, training: Sequence[Samples]) -> None:
    """Says of steps that may not fit into memory how large they are."""
    rows, columns = max((each.size for each in training), key=math.prod)
    if batch_size * rows * columns > MANY_CELLS:
        log.warning(
            "a step learns from %d samples of %d x %d cells, of which a million want some 15 GiB of memory; "
            "a smaller crop= or batch_size= wants less",
            batch_size,
            rows,
            columns,
        )


def _say_refused(wide: Sequence[Samples], training: Sequence[Samples]) -> None:
    """Says which changes the wider samples of the prior do without, while those of the training have them."""
    for prior, step in zip(wide, training, strict=True):
        for name in prior.leeway.refused.keys() - step.leeway.refused.keys():
            reason = prior.leeway.refused[name]
            log.info("%s: the prior's samples are without augmentation.%s: %s", step.cube.path, name, reason)


def _check_counts(
    batch_size: int,
    crop: int,
    leads_per_step: int,
    check_every: int,
    prior_samples: int,
    prior_crop: int,
    prior_steps: int,
    local_steps: int,
    validation_samples: int,
    workers: int,
) -> None:
    """Refuses a number of something that is too small, by its key."""
    for key, count, least in (
        ("batch_size", batch_size, 1),
        ("crop", crop, SMALLEST_CROP),
        ("leads_per_step", leads_per_step, 1),
        ("check_every", check_every, 1),
        ("prior_samples", prior_samples, 1),
        ("prior_crop", prior_crop, SMALLEST_CROP),
        ("prior_steps", prior_steps, 0),
        ("local_steps", local_steps, 0),
        ("validation_samples", validation_samples, 0),
        ("workers", workers, 0),
    ):
        if count < least:
            raise ValueError(f"{key}={count}: expected at least {least}")


def _check_learning(seed: int, learning_rate: float, on_nonfinite: str) -> None:
    """Refuses what nothing can be learned with, by its key."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: expected a whole number from 0 to {2**32 - 1}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate={learning_rate}: expected a number above 0, such as 0.001")
    if on_nonfinite not in ("stop", "skip"):
        raise ValueError(f"on_nonfinite={on_nonfinite}: expected stop or skip")


def _opened(paths: Sequence[str], crop: int, then: Mapping[str, str]) -> list[Observations]:
    """The cubes at these places, as they were `then`, each as quick to cut crops from as it can be."""
    return [stored(_as_then(rain_cube(path), then.get(path)), crop) for path in paths]


def _as_then(cube: Observations, snapshot: str | None) -> Observations:
    """The cube as it was when the training began that is gone on with: as long, and with the same samples.

    Else the scores of before would be of other samples, and the training no longer the same.
    """
    if snapshot is None or snapshot == cube.snapshot:
        return cube
    if isinstance(cube, Cube):
        with suppress(ValueError, IcechunkError):
            then = Cube(cube.path, snapshot, cube.group)
            log.info("%s has changed since: going on with it as it was, at snapshot %s", cube.path, snapshot)
            return then
    log.warning(
        "%s has changed since this training began, and what it was is gone: scores of before are of other "
        "samples; snapshot %s, then %s",
        cube.path,
        snapshot,
        cube.snapshot,
    )
    return cube


def by_head() -> None:
    """No loss but the one that goes with the network's head."""


def alone() -> None:
    """No strategy but one process."""


def _loss_of(network: nn.Module) -> Loss:
    """The loss that goes with a head: one that knows the order of the classes for a head that does."""
    return ordinal if isinstance(getattr(network, "link", None), Ordinal) else cross_entropy


def _trainer(
    make: Callable[..., Trainer],
    data: RadarData,
    folder: Path,
    check_every: int,
    strategy: Strategy | None,
    pictures: bool,
) -> Trainer:
    """Lightning's trainer with all that looks on: what it refuses, it refuses before a prior is fitted."""
    validated = bool(data.validation)
    callbacks: list[Callback] = [Progress(data.training.batch_size, sys.stderr.isatty())]
    callbacks += [Pictures(folder / "pictures")] if pictures and validated else []
    callbacks += [WriteScores(folder / VALIDATION)] if validated else []
    trainer = make_trainer(make, [*callbacks, Checkpoints(folder / FOLDER, check_every)], folder, strategy)
    trainer.val_check_interval = check_every * trainer.accumulate_grad_batches  # of batches
    return trainer


def _fit(trainer: Trainer, task: Task, data: RadarData, folder: Path) -> "Fitted":
    """Trains from the newest checkpoint, or from the start, to the limit; keeps what validates best.

    The network as it began counts too: a short training can spoil the fitted prior, or other weights.

    Raises:
        KeyboardInterrupt: if it was told to stop, once a checkpoint is written.
    """
    validated = bool(data.validation)
    last = newest(folder / FOLDER)
    try:
        if validated and last is None:
            _validate(trainer, task, data)
        trainer.fit(task, datamodule=data, ckpt_path=last, weights_only=True)
    except StoppedError as stop:
        log.info("%s: the same command goes on from there", stop)
        raise KeyboardInterrupt from stop
    except SystemExit as stop:  # what Lightning makes of Ctrl+C
        raise KeyboardInterrupt from stop
    steps = trainer.global_step
    if 0 <= trainer.max_steps < steps:
        log.warning(
            "trainer.max_steps=%d: %s has learned for %d steps already, which are kept; for fewer, choose "
            "another run folder",
            trainer.max_steps,
            folder,
            steps,
        )
    if validated and task.scored_at != steps:
        _validate(trainer, task, data)
    timer = next(callback for callback in trainer.callbacks if isinstance(callback, Timer))  # type: ignore[attr-defined]
    return Fitted(steps, timer.time_elapsed(), *_kept(task))


def _validate(trainer: Trainer, task: Task, data: RadarData) -> None:
    """Validates outside of the training.

    Raises:
        KeyboardInterrupt: if SIGTERM came meanwhile, which Lightning only writes down here.
    """
    trainer.validate(task, datamodule=data, verbose=False)
    if trainer.received_sigterm:
        raise KeyboardInterrupt


def _kept(task: Task) -> tuple[Mapping[str, Tensor], Mapping[str, float], Mapping[str, Any]]:
    """The averaged weights that validated best, how they did, and their table of scores.

    Without validation they are the last.

    Raises:
        ValueError: if no validation gave a finite score.
    """
    best = task.best
    if best is None and task.scored_at >= 0:
        raise ValueError(
            f"the network validates with {task.scores}: it has diverged, and no model is written; "
            "lower learning_rate and choose another run folder"
        )
    if best is None:
        return task.weights(), {}, {}
    if best.step == 0:
        log.warning("the network as it began validates better than after training, and is kept: train longer")
    return (
        best.weights,
        {**best.scores, **{f"{score}_prior": task.untrained[score] for score in ("val_crps", "val_loss")}},
        {"step": best.step, **best.table},
    )


@dataclass(frozen=True)
class Fitted:
    """How long it was trained, what came of it, and how well that validates."""

    steps: int
    seconds: float
    weights: Mapping[str, Tensor]
    scores: Mapping[str, float]
    table: Mapping[str, Any]  # scores of all forecasters by lead time, and the step they were found at


def _finish(
    folder: Path,
    config: Mapping[str, Any],
    learned: Sequence[Observations],
    kept: Sequence[Observations],
    crop: int,
    lead_times: Sequence[float],
    beside: Beside,
    network: nn.Module,
    task: Task,
    fitted: Fitted,
    calibration: Calibrated | None,
    begun: Mapping[str, Any] | None,
) -> Trained:
    """Writes weights, then card: a card is only ever beside its own weights."""
    weights = save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
    parameters = sum(parameter.numel() for parameter in network.parameters())
    card = {
        "config": config,
        "bins": {"edges": task.bins.edges, "top": task.bins.top},  # mm/h
        "scaling": network.scaling.card() if isinstance(network, MetNet) else None,
        "frames": network.frames,
        "cadence_minutes": sorted({cube.cadence.total_seconds() / 60 for cube in learned}),
        "lead_times": lead_times,
        "crop": crop,
        "satellite": beside.satellite,
        "static": beside.static,
        "reach": beside.reach,
        "cubes": [_told(cube) for cube in learned],
        "validation_cubes": [_told(cube) for cube in kept],
        "weights": begun,
        "steps": fitted.steps,
        "seconds": round(fitted.seconds, 1),
        "parameters": parameters,
        "loss": _name(task.habits.loss),
        "importance": task.importance.of_classes()
        if task.importance.steps
        else None,  # of each class, undone already
        "skipped_steps": task.skipped,
        "calibration": None if calibration is None else calibration.card(),
        "validation": fitted.scores or None,
        "scores": fitted.table or None,
        "software": f"metnet-nowcast {version()}",
        "forward": FORWARD,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    replace_file(folder / WEIGHTS, weights)
    replace_file(folder / CARD, json.dumps(card, indent=2).encode())
    return Trained(folder, fitted.steps, fitted.seconds, parameters, fitted.scores)


def _calibrated(network: nn.Module, validation: Sequence[Samples]) -> Calibrated | None:
    """A calibration of a trained network; None without validation."""
    if not validation or isinstance(network, Coherent):  # whose network was calibrated before
        return None
    if not isinstance(network, MetNet | Published):
        log.warning("not calibrated: expected a MetNet, MetNet1 or MetNet2, not a %s", type(network).__name__)
        return None
    found = calibrated(network, validation)
    log.info("%s", found)
    return found


def _name(loss: Loss) -> str:
    """What a loss is called in Python."""
    function = loss.func if isinstance(loss, partial) else loss
    return str(getattr(function, "__name__", function))


def _told(cube: Observations) -> dict[str, Any]:
    """What a card says of a cube."""
    return {"path": cube.path, "snapshot": cube.snapshot, "cell_size": cube.grid.cell_size}  # metres
