"""`TrainedModel`: a run folder's `model.safetensors` and `model.json`, opened without pickle and checked."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from metnet.batch import Batch
from metnet.calibration import Calibration
from metnet.decision import Cuts
from metnet.model import MetNet
from metnet.rain import BinnedForecast, RainBins
from pipelines.construct import construct
from pipelines.motion import FRAMES, motion

WEIGHTS, CARD, PRIOR = "model.safetensors", "model.json", "prior.safetensors"


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A `Forecaster` with what it was made from: its network and the card of its run."""

    network: MetNet
    card: Mapping[str, Any]  # `model.json`
    sha256: str  # of the weights
    calibration: Calibration | None = None  # of its probabilities; None: as the network says them
    cuts: Cuts | None = None  # from which probability on it means yes, of calibrated probabilities

    @property
    def frames(self) -> int:
        """How many past frames, the one at init_time included, it wants to see."""
        return self.network.frames

    @property
    def cadences(self) -> tuple[timedelta, ...]:
        """From one frame to the next in the cubes it learned from."""
        return tuple(timedelta(minutes=float(minutes)) for minutes in self.card["cadence_minutes"])

    @property
    def lead_times(self) -> tuple[float, ...]:
        """Minutes; the lead times it learned from."""
        return tuple(float(lead) for lead in self.card["lead_times"])

    def __call__(self, batch: Batch) -> BinnedForecast:
        """The network's forecast, calibrated, without gradients."""
        with torch.inference_mode():
            forecast: BinnedForecast = self.network(with_motion(batch))
            return forecast if self.calibration is None else self.calibration(forecast, batch.lead_time)

    def uncalibrated(self) -> "TrainedModel":
        """The same with the network's own probabilities."""
        return replace(self, calibration=None, cuts=None)


def with_motion(batch: Batch) -> Batch:
    """The batch with the motion of its newest frames that hold anything, if nobody has told it yet."""
    if batch.motion is not None:
        return batch
    each = []
    for radar, age in zip(batch.radar.cpu(), batch.age.cpu(), strict=True):
        there = (~radar.isnan()).flatten(1).any(dim=1).nonzero()[-FRAMES:, 0]
        each.append(motion(radar[there].numpy(), age[there].tolist()))
    return replace(batch, motion=torch.from_numpy(np.stack(each)).to(batch.radar))


def trained(path: str | Path) -> TrainedModel:
    """The model of a run folder, ready to forecast.

    Raises:
        ValueError: if the folder holds no finished run, the weights are not those of its card, or the card
            asks for anything outside `metnet`.
    """
    folder = Path(path)
    card = read_card(folder)
    if card is None:
        raise ValueError(f"{path}: no {CARD} there; expected the run folder of a finished `metnet train`")
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{path}: {CARD} is there but {WEIGHTS} is not; train it again")
    data = weights.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != card.get("sha256"):
        raise ValueError(
            f"{weights}: its sha256 is {sha256}, {CARD} says {card.get('sha256')}; "
            "the file is damaged or not of this run"
        )
    network = _built(folder, card)
    try:
        network.load_state_dict(load(data), strict=True)
    except (RuntimeError, SafetensorError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ValueError(f"{weights}: not the weights of the model in {CARD}: {detail} ...") from error
    calibration, cuts = _calibration(folder, card, network.bins)
    return TrainedModel(network.eval(), card, sha256, calibration, cuts)


def untrained(path: str | Path) -> TrainedModel:
    """The network of a run folder as its training began: the prior that was fitted, and nothing else.

    Raises:
        ValueError: if the folder holds no finished run, or one of a network without a prior.
    """
    folder = Path(path)
    card, fitted = read_card(folder), folder / PRIOR
    if card is None or not fitted.is_file():
        raise ValueError(
            f"{path}: expected the run folder of a finished `metnet train` of a network with advection, "
            f"with {CARD} and {PRIOR} in it"
        )
    network = _built(folder, card)
    if network.prior is None:
        raise ValueError(f"{path}: its network has no prior; expected one trained with model.advection=true")
    network.prior.load_state_dict(load(fitted.read_bytes()))
    return TrainedModel(network.eval(), card, hashlib.sha256(fitted.read_bytes()).hexdigest())


def read_card(folder: Path) -> dict[str, Any] | None:
    """What `model.json` says, or None where there is none.

    Raises:
        ValueError: if it is not a JSON object.
    """
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        card = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(card, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(card).__name__}")
    return card


def _calibration(
    folder: Path, card: Mapping[str, Any], bins: RainBins
) -> tuple[Calibration | None, Cuts | None]:
    """The calibration and the cuts that the card tells; None where a run has none."""
    told = card.get("calibration")
    if told is None:
        return None, None
    try:
        return Calibration.from_card(told, len(bins.edges)), Cuts.from_card(told["cuts"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CARD}: {error}") from error


def _built(folder: Path, card: Mapping[str, Any]) -> MetNet:
    """The network that the card describes, with fresh weights."""
    try:
        made = construct(card["config"]["model"], ("metnet.",))
        bins = RainBins(tuple(float(edge) for edge in card["bins"]["edges"]), float(card["bins"]["top"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CARD}: incomplete: {error}") from error
    network = made() if isinstance(made, partial) else made
    if not isinstance(network, MetNet):
        raise ValueError(f"{folder / CARD}: its model is a {type(network).__name__}, expected a MetNet")
    if network.bins != bins:
        raise ValueError(f"{folder / CARD}: its bins are not those of its model: {bins} and {network.bins}")
    return network
