"""`train`: a cube, a network and a trainer -> a run folder with `model.safetensors` and `model.json`."""

import hashlib
import inspect
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning import Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from metnet.axial_head import Coherent
from metnet.batch import Batch
from metnet.head import Ordinal
from metnet.loss import Loss, cross_entropy, ordinal
from metnet.model import MetNet
from metnet.prior import AdvectionPrior, Pixels
from pipelines import destination
from pipelines.augmentation import NOTHING_CHANGED, Augmentation
from pipelines.beside import Beside, Sides
from pipelines.calibrating import Calibrated, calibrated
from pipelines.checkpoints import FOLDER, Checkpoints, StoppedError, newest
from pipelines.drop_out import DropOut
from pipelines.frame import parse_time
from pipelines.observations import Observations
from pipelines.plain import rain_cube
from pipelines.progress import track
from pipelines.sample_store import stored
from pipelines.samples import ENDLESS, SMALLEST_CROP, Mixed, Samples, Span, check_apart, split
from pipelines.task import Habits, Importance, Learning, RadarData, Task
from pipelines.trained import CARD, PRIOR, WEIGHTS, Published, read_card, trained
from pipelines.training_log import Progress, WriteScores
from pipelines.training_pictures import Pictures
from pipelines.version import version

CONFIG = "config.json"
NOTHING_DROPPED = DropOut()
VALIDATION = "validation.jsonl"
PRECISIONS = ("32-true", "bf16-mixed")  # 16 bits would want losses that are scaled
FINGERPRINT = "fitted_for"  # among the metadata of `PRIOR`
LOCAL = "local.safetensors"
PRIOR_LEADS = 4  # of a batch that the prior is fitted on
PRIOR_PIXELS = 200  # of each sample and lead time
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
        compile: compile the network.
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
    if (finished := _finished(folder, config)) is not None:
        return finished
    learned, kept = _opened([cube] if isinstance(cube, str) else cube, crop), _opened(validation_cubes, crop)
    if not learned:
        raise ValueError("cube=[]: expected at least one to learn from")
    seed_everything(seed, verbose=False)
    network = model()
    resumed = _begun_with(folder)
    begun = resumed
    if weights is not None and begun is None:
        begun = _taken_over(network, weights, config, (satellite, static, reach))
    counts = tuple(tuple(float(number) for number in step) for step in importance)
    Importance(network.bins, counts)  # refuses wrong ones before any work
    skip: Literal["stop", "skip"] = "skip" if on_nonfinite == "skip" else "stop"
    habits = Habits(leads_per_step, seed, loss or _loss_of(network), counts, skip, compile)
    beside = Beside.of(network, satellite, static, reach)
    sampling = _Sampling(
        frames=network.frames,
        lead_times=lead_times,
        all_leads=len(learned) + len(kept) == 1,
        crop=crop,
        beside=beside,
        seed=seed,
        augment=augment,
        drop_out=drop_out,
        augmentation=_knowable(augmentation, network),
        validation_samples=validation_samples,
    )
    training, validating = _samples(sampling, learned, kept, validation, start, end)
    data = RadarData(Mixed(training, batch_size, seed), validating, workers)
    if begun is not None:
        _warn_of_seen(begun, [each.cube for each in validating])
    snapshots = [opened.snapshot for opened in learned]
    with _alone(folder):
        _begin(folder, config, snapshots, begun)
        if begun is None:
            wide, wide_kept = ([each.of_crop(prior_crop) for each in some] for some in (training, validating))
            _say_refused(wide, training)
            around = RadarData(Mixed(wide, batch_size, seed), wide_kept)
            fitting = Fitting(prior_samples, prior_steps, local_steps)
            _fit_start(network, around, folder, fitting, seed, _fingerprint(config, snapshots))
        elif resumed is None and not _helps():
            _keep_prior(network, folder)
        task = Task(network, Learning(learning_rate), habits, data, lead_times)
        with _quiet():
            fitted = _fit(trainer, task, data, folder, check_every, strategy, pictures)
        if _helps():
            return None
        network = model().eval()  # afresh: that of the task may be shared out among processes
        network.load_state_dict(fitted.weights)
        calibration = _calibrated(network, data.validation)
        return _finish(
            folder, config, learned, kept, crop, lead_times, beside, network, task, fitted, calibration, begun
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


def _opened(paths: Sequence[str], crop: int) -> list[Observations]:
    """The cubes at these places, each as quick to cut crops from as it can be."""
    return [stored(rain_cube(path), crop) for path in paths]


@dataclass(frozen=True)
class _Sampling:
    """How samples are drawn from a cube, whichever it is."""

    frames: int
    lead_times: Sequence[float]  # minutes
    all_leads: bool  # each must fit the cube; else those count that do
    crop: int
    beside: Beside
    seed: int
    augment: bool  # what is learned from
    drop_out: DropOut  # of what is learned from
    augmentation: Augmentation  # of what is learned from
    validation_samples: int

    def parted(
        self, cube: Observations, share: float, start: str | None, end: str | None
    ) -> tuple[Samples, Samples | None]:
        """What is learned from within [start, end], and its end to validate on; None if that is too short."""
        span, used = self._span(cube), _between(cube, start, end)
        parts = split(cube.observed[used], span, share).later(used.start)
        learned = Samples(
            cube,
            parts.training,
            span,
            self.crop,
            seed=self.seed,
            augment=self.augment,
            beside=self.beside,
            drop_out=self.drop_out,
            augmentation=self.augmentation,
        )
        for name, reason in learned.leeway.refused.items():
            log.info("%s: its samples are without augmentation.%s: %s", cube.path, name, reason)
        if len(parts.validation):
            return learned, self._validating(cube, parts.validation, span)
        if share:
            log.warning(
                "%s has %d frames: too few to keep some for validation, all are trained on",
                cube.path,
                cube.observed.sum(),
            )
        return learned, None

    def event(self, cube: Observations) -> Samples:
        """A whole cube to validate on."""
        span = self._span(cube)
        return self._validating(cube, split(cube.observed, span, 0.0).training, span)

    def _validating(self, cube: Observations, inits: NDArray[np.int64], span: Span) -> Samples:
        """Always the same samples, as they are."""
        count, seed = self.validation_samples, self.seed + 1
        return Samples(cube, inits, span, self.crop, count, seed, beside=self.beside)

    def _span(self, cube: Observations) -> Span:
        """What a sample of the cube covers."""
        made = (
            Span.of(cube.cadence, self.frames, self.lead_times)
            if self.all_leads
            else Span.of_those(cube, self.frames, self.lead_times)
        )
        return replace(made, back=Sides(cube, self.beside).back)


def _knowable(augmentation: Augmentation, network: nn.Module) -> Augmentation:
    """Without other cadences and cells for a published network, which is told neither ages nor cell sizes."""
    if not isinstance(network, Published):
        return augmentation
    if augmentation.stride or augmentation.coarsen:
        log.info(
            "samples are without augmentation.stride and augmentation.coarsen: a published network is told "
            "neither ages nor cell sizes"
        )
    return replace(augmentation, stride=0.0, coarsen=0.0)


def _samples(
    sampling: _Sampling,
    learned: Sequence[Observations],
    kept: Sequence[Observations],
    share: float,
    start: str | None,
    end: str | None,
) -> tuple[list[Samples], list[Samples]]:
    """What is learned from, and what is validated on: whole events that are kept, or the end of each cube.

    Raises:
        ValueError: if there is too little of a cube, or the same rain is in both.
    """
    parts = [sampling.parted(cube, 0.0 if kept else share, start, end) for cube in learned]
    training = [learning for learning, _ in parts]
    ends = [validating for _, validating in parts if validating is not None]
    validating = [*ends, *(sampling.event(cube) for cube in kept)]
    check_apart(training, validating)
    if validating and not sampling.validation_samples:
        log.warning(
            "validation_samples=0: nothing is validated or calibrated, and the last weights are kept; "
            "to learn from what is held back for validation, set validation=0 and validation_cubes=[]"
        )
        return training, []
    return training, validating


def _helps() -> bool:
    """Whether this process is one that helps a first one, which alone writes."""
    return int(getattr(rank_zero_only, "rank", 0)) > 0


def by_head() -> None:
    """No loss but the one that goes with the network's head."""


def alone() -> None:
    """No strategy but one process."""


def _loss_of(network: nn.Module) -> Loss:
    """The loss that goes with a head: one that knows the order of the classes for a head that does."""
    return ordinal if isinstance(getattr(network, "link", None), Ordinal) else cross_entropy


def _taken_over(
    network: MetNet | Published | Coherent,
    weights: str,
    config: Mapping[str, Any],
    shown: tuple[Sequence[str], Sequence[str], float],
) -> Mapping[str, Any]:
    """Gives a network the weights of a finished run of the very same one; what is to be told of that run.

    Raises:
        ValueError: if there is none, or its network is another one, naming what differs.
    """
    try:
        begun = trained(weights)
    except ValueError as error:
        raise ValueError(f"weights={weights}: {error}") from error
    kinds = [type(each).__name__ for each in (network, begun.network)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"weights={weights}: expected a {kinds[0]}, as model= describes, got a {kinds[1]}")
    usual = {name: of.default for name, of in inspect.signature(type(network)).parameters.items()}
    usual["stochastic_depth"] = 0.0  # how it is trained, not what it is
    here, there = (dict(_settings(each["model"])) for each in (_plain(config), begun.card["config"]))
    differing = ", ".join(
        f"model.{key}={here.get(key)} (there {there.get(key)})"
        for key in sorted({*here, *there} - {"stochastic_depth"})
        if here.get(key, usual.get(key)) != there.get(key, usual.get(key))
    )
    if differing:
        raise ValueError(f"weights={weights}: expected the network that model= describes, got {differing}")
    card, (satellite, static, reach) = begun.card, shown
    for key, now in (("satellite", [*satellite]), ("static", [*static]), ("reach", reach)):
        if (before := card.get(key, now)) != now:
            log.warning("weights=%s: learned with %s=%s, and goes on with %s", weights, key, before, now)
    network.load_state_dict(begun.network.state_dict())
    return {
        "sha256": begun.sha256,
        **{key: card.get(key) for key in ("cubes", "validation_cubes", "weights")},
    }


def _begun_with(folder: Path) -> Mapping[str, Any] | None:
    """What is told of the weights that a training began with, if it left a checkpoint to go on from."""
    started = folder / CONFIG
    if not started.is_file() or newest(folder / FOLDER) is None:
        return None
    told: Mapping[str, Any] | None = json.loads(started.read_text()).get("weights")
    return told


def _warn_of_seen(begun: Mapping[str, Any], validated: Sequence[Observations]) -> None:
    """Says of cubes to validate on that the weights, or those they began with, may have learned from them."""
    seen, each = set(), begun
    while each:
        cubes = [*(each.get("cubes") or ()), *(each.get("validation_cubes") or ())]
        seen |= {cube.get("snapshot") for cube in cubes}
        each = each.get("weights") or {}
    for cube in validated:
        if cube.snapshot in seen:
            log.warning(
                "%s: weights= may have learned from what is validated on: scores promise too much", cube.path
            )


def _keep_prior(network: nn.Module, folder: Path) -> None:
    """Writes down the prior that a training begins with, where it is not fitted; nothing older stays."""
    (folder / LOCAL).unlink(missing_ok=True)
    if isinstance(network, MetNet) and network.prior is not None:
        _replace(folder / PRIOR, save(network.prior.state_dict()))


def _fit_start(
    network: nn.Module, data: RadarData, folder: Path, fitting: "Fitting", seed: int, fingerprint: str
) -> None:
    """Gives a network with advection the prior, and what is local beside it, that fit the samples best.

    They are kept in the run folder, so that a training that goes on starts from the same; of several
    processes one fits them, and the others wait. Where nothing was learned yet, those of another fingerprint
    are fitted anew: whichever process comes first sees by itself that they are left over.
    """
    if not isinstance(network, MetNet) or network.prior is None or not fitting.prior_steps:
        return
    places: dict[Path, nn.Module] = {folder / PRIOR: network.prior}
    if network.local is not None:
        places[folder / LOCAL] = network.local
    with FileLock(folder / "prior.lock"):
        kept = all(
            place.is_file() and (_has_learned(folder) or _fingerprint_of(place) == fingerprint)
            for place in places
        )
        if not kept:
            _fit_on_pixels(network, network.prior, data, fitting, seed)
        for place, part in places.items():
            if kept:
                part.load_state_dict(load(place.read_bytes()))
            else:
                _replace(place, save(part.state_dict(), {FINGERPRINT: fingerprint}))


@dataclass(frozen=True)
class Fitting:
    """How the start of a network is fitted on single pixels."""

    samples: int = 64  # that the pixels are drawn from
    prior_steps: int = 150
    local_steps: int = 900


def _fit_on_pixels(
    network: MetNet, prior: AdvectionPrior, data: RadarData, fitting: Fitting, seed: int
) -> None:
    """Fits the prior, then what is local; of the latter nothing is kept where it makes validation worse."""
    random = torch.Generator().manual_seed(seed)
    learned, samples = data.training, fitting.samples
    # none that a step learns from
    drawn = (learned[ENDLESS // 2 + number * learned.batch_size] for number in range(samples))
    known = _pixels(network, track(drawn, "fitting the prior", total=samples), random)
    prior.fit(known, fitting.prior_steps, seed=seed)
    if network.local is None or not fitting.local_steps:
        return
    start = {name: value.clone() for name, value in network.local.state_dict().items()}
    network.local.fit(known, prior, fitting.local_steps, seed=seed)
    if not data.validation:
        return
    held_back = (each[number] for each in data.validation for number in range(len(each)))
    checked = _pixels(network, held_back, random)
    if len(checked) and (gain := network.local.gain(checked, prior)) < 0:
        log.warning("what is local makes the validation worse by %.4f nats a pixel and is left out", -gain)
        network.local.load_state_dict(start)


def _pixels(network: MetNet, batches: Iterable[Batch], random: torch.Generator) -> Pixels:
    """Pixels of each batch, at a few of its lead times."""
    drawn = []
    for batch in batches:
        assert batch.target is not None
        count = len(batch.lead_time)
        some = torch.randperm(count, generator=random)[:PRIOR_LEADS].sort().values
        few = replace(batch, lead_time=batch.lead_time[some], target=batch.target[:, some])
        drawn.append(network.pixels(few, PRIOR_PIXELS, random))
    return Pixels.joined(drawn)


def _fingerprint(config: Mapping[str, Any], snapshots: Sequence[str]) -> str:
    """Of the settings, and of the frames, that a prior is fitted with."""
    told = json.dumps([sorted(_settings(_plain(config))), snapshots])
    return hashlib.sha256(told.encode()).hexdigest()


def _fingerprint_of(prior: Path) -> str | None:
    """That a prior was kept with; None: with none."""
    with safe_open(prior, framework="pt") as file:
        return (file.metadata() or {}).get(FINGERPRINT)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second training out of a run folder; processes that help the first one may come in.

    Raises:
        ValueError: if one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = nullcontext() if _helps() else FileLock(folder / "train.lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout as error:
        raise ValueError(f"run={folder}: another training is at work there; wait for it") from error


def _between(cube: Observations, start: str | None, end: str | None) -> slice:
    """The steps of the cube's time axis within [start, end].

    Raises:
        ValueError: if there is none.
    """
    low = parse_time(start) if start else cube.times[0]
    high = parse_time(end) if end else cube.times[-1]
    before = sum(time < low for time in cube.times)
    used = slice(before, before + sum(low <= time <= high for time in cube.times))
    if used.start == used.stop:
        raise ValueError(
            f"start={start}, end={end}: nothing of {cube.path} lies there, which reaches from "
            f"{cube.times[0]:%Y-%m-%dT%H:%MZ} to {cube.times[-1]:%Y-%m-%dT%H:%MZ}"
        )
    return used


def _finished(folder: Path, config: Mapping[str, Any]) -> Trained | None:
    """The result of a run that this very call has finished before.

    A folder in which no training has left anything yet belongs to nobody: a wrong setting may be put right.

    Raises:
        ValueError: if the folder belongs to a call with other settings than how long to train.
    """
    if _has_learned(folder) and (differing := _differing(folder, config)):
        raise ValueError(
            f"run={folder} was started with other settings: {', '.join(differing)}; choose another run folder"
        )
    card = read_card(folder)
    if card is None or card["config"].get("trainer") != _plain(config).get("trainer"):
        return None
    return Trained(
        folder, card["steps"], card["seconds"], card["parameters"], card["validation"], before=True
    )


def _has_learned(folder: Path) -> bool:
    """Whether a training left anything in a run folder that another one could go on from."""
    return any((folder / FOLDER).glob("*.ckpt")) or (folder / CARD).is_file()


def _differing(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The settings of a call that a run folder was not begun with, each with what it was."""
    started = folder / CONFIG
    if not started.is_file():
        return []
    before, wanted = (
        dict(_settings(call)) for call in (json.loads(started.read_text())["config"], _plain(config))
    )
    return [
        f"{key}={wanted.get(key)} (it was {before.get(key)})"
        for key in sorted({*before, *wanted})
        if before.get(key) != wanted.get(key) and (key in before or wanted[key])  # a new one may be off
    ]


FREE = ("run", "pictures", "strategy")  # where, what is shown, and by whom
FREE_OF_TRAINER = (
    "max_steps",
    "max_time",
    "accelerator",
    "devices",
    "num_nodes",
    "log_every_n_steps",
)  # how long, and on what


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings that make a run what it is, each with its dotted key; not where, nor how long."""
    free = {"": FREE, "trainer.": FREE_OF_TRAINER}.get(prefix, ())
    for key, value in config.items():
        if key in free:
            continue
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _begin(
    folder: Path, config: Mapping[str, Any], snapshots: list[str], begun: Mapping[str, Any] | None
) -> None:
    """Writes down what the run was started with; warns if a cube that it learned from has changed since."""
    if _helps():
        return
    started = folder / CONFIG
    if started.is_file() and _has_learned(folder):
        before = json.loads(started.read_text())["cube_snapshots"]
        for old, new in zip(before, snapshots, strict=True):
            if old != new:
                log.warning("%s goes on with a cube that has changed: snapshot %s, then %s", folder, old, new)
    told = {"config": config, "cube_snapshots": snapshots, "weights": begun}
    _replace(started, json.dumps(told, indent=2).encode())


def _fit(
    make: Callable[..., Trainer],
    task: Task,
    data: RadarData,
    folder: Path,
    check_every: int,
    strategy: Strategy | None,
    pictures: bool,
) -> "Fitted":
    """Trains from the newest checkpoint, or from the start, to the limit; keeps what validates best.

    The network as it began counts too: a short training can spoil the fitted prior, or other weights.

    Raises:
        KeyboardInterrupt: if it was told to stop, once a checkpoint is written.
    """
    validated = bool(data.validation)
    callbacks: list[Callback] = [Progress(data.training.batch_size, sys.stderr.isatty())]
    callbacks += [Pictures(folder / "pictures")] if pictures and validated else []
    callbacks += [WriteScores(folder / VALIDATION)] if validated else []
    trainer = _made(make, [*callbacks, Checkpoints(folder / FOLDER, check_every)], folder, strategy)
    trainer.val_check_interval = check_every * trainer.accumulate_grad_batches  # of batches
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


def _made(
    make: Callable[..., Trainer], callbacks: Sequence[Callback], folder: Path, strategy: Strategy | None
) -> Trainer:
    """The trainer, with a clock if it has none.

    Raises:
        ValueError: if it would never end, or refuses its arguments.
    """
    _check_precision(make)
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
    except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
        raise ValueError(f"trainer: {error}") from error
    except AttributeError as error:  # what Lightning makes of max_time=5
        raise ValueError("trainer.max_time: expected days:hours:minutes:seconds") from error
    _check(trainer, strategy)
    timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if any(isinstance(callback, Timer) and callback.time_remaining() == 0 for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError("trainer.max_time: expected more than no time at all")
    if trainer.max_steps < 0 and not timed:
        raise ValueError("trainer.max_steps=-1 and trainer.max_time=null: give one of them, or it never ends")
    if not timed:
        trainer.callbacks.append(Timer())  # type: ignore[attr-defined]
    return trainer


def _check_precision(make: Callable[..., Trainer]) -> None:
    """Refuses 16 bits of little range before Lightning takes others for them, as it does on a CPU.

    Raises:
        ValueError: saying what to take.
    """
    asked = str(make.keywords.get("precision", "")) if isinstance(make, partial) else ""
    if asked.startswith("16"):
        raise ValueError(
            f"trainer.precision={asked}: expected one of {', '.join(PRECISIONS)}; "
            "take bf16-mixed, which needs no scaling of the loss"
        )


def _check(trainer: Trainer, strategy: Strategy | None) -> None:
    """Refuses what Lightning would take and get wrong: a norm below 0 turns every gradient around.

    Raises:
        ValueError: naming the key.
    """
    clip, every = trainer.gradient_clip_val, trainer.log_every_n_steps  # type: ignore[attr-defined]
    alone = "1 with strategy=alone; for several processes, set strategy=ddp"
    for key, value, expected, is_right in (
        ("precision", trainer.precision, f"one of {', '.join(PRECISIONS)}", trainer.precision in PRECISIONS),
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
        "lead_times": [float(lead) for lead in lead_times],
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
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    _replace(folder / WEIGHTS, weights)
    _replace(folder / CARD, json.dumps(card, indent=2).encode())
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
