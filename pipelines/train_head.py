"""`train_head`: a finished run and cubes -> a run of the same network with a head that draws whole maps.

The head is trained by `train`, as a network is: its logits are those of each pixel given what fell before it,
so the cross-entropy that `train` lowers is -log P of the maps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies import Strategy

from metnet.axial_head import AxialHead, Coherent
from metnet.loss import cross_entropy
from metnet.model import MetNet
from metnet.rain import RainBins
from pipelines.construct import construct
from pipelines.drop_out import DropOut
from pipelines.plain import rain_cube
from pipelines.run_folder import Trained
from pipelines.samples import Span
from pipelines.train import NOTHING_DROPPED, train
from pipelines.trained import TrainedModel, trained


@dataclass(frozen=True)
class TrainedHead:
    """What a call of `train_head` leaves behind."""

    run: Path
    steps: int
    seconds: float  # of training, over all calls that shared the run
    parameters: int  # of the head
    validation: Mapping[str, float]  # those of `Trained`, of each pixel given what fell before it
    before: bool = False  # the run was finished already and nothing was done

    @property
    def coherent(self) -> float:
        """-log P of a pixel given those before it (nats), on the validation samples."""
        return self.validation["val_loss"]

    @property
    def independent(self) -> float:
        """-log P of a pixel by the network alone (nats): what draws cost that know nothing of each other."""
        return self.validation["val_loss_prior"]

    def __str__(self) -> str:
        """For a person at a terminal."""
        did = "finished before, nothing to do" if self.before else "trained"
        lines = [
            f"{self.run}: {did}",
            f"  a head of {self.parameters:,} parameters, {self.steps} steps in {self.seconds:.0f} s",
            "  no validation",
        ]
        if self.validation:
            lines[2] = (
                f"  validation: {self.coherent:.4f} nats a pixel given those before it, "
                f"{self.independent:.4f} by the network alone"
            )
        return "\n".join(lines)


def train_head(
    cube: str | Sequence[str],
    run: str,
    network: str,
    trainer: Callable[..., Trainer],
    lead_times: Sequence[float],
    config: Mapping[str, Any],
    crop: int = 32,
    dim: int = 64,
    heads: int = 4,
    layers: int = 2,
    dropout: float = 0.0,
    learning_rate: float = 3e-3,
    batch_size: int = 4,
    validation: float = 0.15,
    validation_samples: int = 16,
    validation_cubes: Sequence[str] = (),
    check_every: int = 100,
    on_nonfinite: str = "stop",
    strategy: Strategy | None = None,
    augment: bool = True,
    drop_out: DropOut = NOTHING_DROPPED,
    workers: int = 0,
    seed: int = 0,
    start: str | None = None,
    end: str | None = None,
) -> TrainedHead | None:
    """Trains a head on top of a finished run; the same call again goes on where the last one ended.

    The run folder is opened by `trained`, as any other: a forecast is members on a grid of `crop` x `crop`
    cells, drawn around the probabilities that the network says, calibrated if its run is.

    Args:
        cube: folder or URL, or several: each is drawn from as often as any other.
        run: folder for checkpoints, logs, and network and head together.
        network: run folder of a finished `metnet train` of a MetNet, which stays as it is.
        trainer: makes Lightning's trainer, as for `train`.
        lead_times: minutes, multiples of the cadence of each cube; the head is for these.
        config: the whole call as it was resolved.
        crop: side in cells of the maps that the head draws, and of the samples.
        dim: channels of the head.
        heads: of each of its attentions.
        layers: of its encoder, outer and inner decoder each; an even number.
        dropout: the share of what a layer adds that is dropped in training.
        learning_rate: of AdamW, at its highest.
        batch_size: samples of a step, each with all its lead times.
        validation: as for `train`, like all arguments that follow.
        validation_samples: how many are drawn from each cube to validate on.
        validation_cubes: whole events to validate on.
        check_every: steps from one checkpoint and validation to the next.
        on_nonfinite: "stop" or "skip".
        strategy: Lightning's, where several processes train.
        augment: turn and mirror the training samples at random.
        drop_out: how likely frames, radars and sources are missing in the training samples.
        workers: processes that read samples.
        seed: of the weights and of the samples.
        start: the first valid time of the cubes to use.
        end: the last valid time to use.

    Returns:
        None in processes that help the first one.

    Raises:
        ValueError: if `network` is no finished run of a MetNet, a cube does not go with it or is too small or
            too short, the run folder belongs to another call, or the loss stops being finite.
    """
    base, leads = trained(network), tuple(float(lead) for lead in lead_times)
    if not isinstance(base.network, MetNet):
        raise ValueError(
            f"network={network}: is a {type(base.network).__name__}; expected the run folder of a MetNet, "
            "such as metnet train model=small leaves, which forecasts all of the grid that it sees"
        )
    paths = [cube] if isinstance(cube, str) else list(cube)
    several = len(paths) + len(validation_cubes) > 1
    for path in (*paths, *validation_cubes):
        _check(path, base, leads, crop, several)
    base.warn_of_unlearned(leads)
    call = _call(base, leads, crop, dim, heads, layers, dropout)
    beside = {key: base.card[key] for key in ("satellite", "static", "reach")}
    done = train(
        cube=paths,
        run=run,
        model=partial(_around, base.network, call),
        trainer=trainer,
        lead_times=leads,
        config={**config, **beside, "model": call, "network_sha256": base.sha256},
        learning_rate=learning_rate,
        batch_size=batch_size,
        crop=crop,
        validation=validation,
        validation_samples=validation_samples,
        validation_cubes=validation_cubes,
        check_every=check_every,
        leads_per_step=len(leads),  # a map is told those of the lead times before it
        loss=cross_entropy,
        on_nonfinite=on_nonfinite,
        strategy=strategy,
        pictures=False,  # no forecast is made while it learns
        augment=augment,
        drop_out=drop_out,
        workers=workers,
        seed=seed,
        start=start,
        end=end,
        **beside,
    )
    return None if done is None else _told(done, base.network)


def _check(path: str, base: TrainedModel, lead_times: Sequence[float], crop: int, several: bool) -> None:
    """Refuses a cube that the network or the head cannot learn from, before any work.

    Raises:
        ValueError: naming it.
    """
    cube = rain_cube(path)
    if cube.cadence not in base.cadences:
        learned = " or ".join(f"{cadence.total_seconds() / 60:g}" for cadence in base.cadences)
        raise ValueError(
            f"cube={path}: has a frame every {cube.cadence.total_seconds() / 60:g} min, and the network "
            f"learned from one every {learned} min; take a network that was trained on such a cube"
        )
    if min(cube.grid.shape) < crop:
        rows, columns = cube.grid.shape
        raise ValueError(
            f"crop={crop}: the grid of {path} has {rows} x {columns} cells; expected a crop that lies in it"
        )
    span = Span.of(cube.cadence, base.frames, lead_times)
    if several and Span.of_those(cube, base.frames, lead_times) != span:
        raise ValueError(
            f"lead_times: {path} has {len(cube.times)} frames, too few for {max(lead_times):g} min beside "
            "others; a head wants all its lead times of every cube: ask for shorter ones, or leave it out"
        )


def _call(
    base: TrainedModel,
    lead_times: Sequence[float],
    crop: int,
    dim: int,
    heads: int,
    layers: int,
    dropout: float,
) -> dict[str, Any]:
    """The network with its head, as a call that is written down in the card."""
    network = {**base.card["config"]["model"], "_partial_": False}
    usual = {"_target_": f"{RainBins.__module__}.{RainBins.__name__}.preferred"}
    calibration = None
    if base.calibration is not None:
        calibration = {
            "_target_": "metnet.calibration.Calibration.from_card",
            "card": base.calibration.card(),
            "edges": len(base.network.bins.edges),
        }
    return {
        "_target_": f"{Coherent.__module__}.{Coherent.__name__}",
        "network": network,
        "head": {
            "_target_": f"{AxialHead.__module__}.{AxialHead.__name__}",
            "bins": network.get("bins") or usual,
            "grid": [crop, crop],
            "leads": len(lead_times),
            "dim": dim,
            "heads": heads,
            "encoder_layers": layers,
            "outer_layers": layers,
            "inner_layers": layers,
            "dropout": dropout,
        },
        "lead_times": list(lead_times),
        "calibration": calibration,
    }


def _around(network: MetNet, call: Mapping[str, Any]) -> Coherent:
    """What the call makes, with the weights that the network has learned."""
    made = construct(call, ("metnet.",))
    assert isinstance(made, Coherent)
    made.network.load_state_dict(network.state_dict())
    return made


def _told(done: Trained, network: MetNet) -> TrainedHead:
    """What is told of a run of `train`: of the parameters, those that were learned."""
    learned = done.parameters - sum(each.numel() for each in network.parameters())
    return TrainedHead(done.run, done.steps, done.seconds, learned, done.validation or {}, done.before)
