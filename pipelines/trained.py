"""`TrainedModel`: a run folder's `model.safetensors` and `model.json`, opened without pickle and checked."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from metnet.axial_head import Coherent
from metnet.batch import Batch
from metnet.calibration import Calibration
from metnet.forward import FORWARD
from metnet.metnet1 import MetNet1
from metnet.metnet2 import MetNet2
from metnet.model import MetNet
from metnet.rain import BinnedForecast, RainBins, RainForecast
from pipelines.construct import construct
from pipelines.motion import FRAMES, motion_and_doubt
from pipelines.pretrained import run_folder
from pipelines.version import version

WEIGHTS, CARD, PRIOR = "model.safetensors", "model.json", "prior.safetensors"
ANOTHER = "it was changed, or is of another state of the software: train the model again, into another folder"
Published = MetNet1 | MetNet2  # they forecast the middle of what they see
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A `Forecaster` with what it was made from: its network and the card of its run."""

    network: MetNet | Published | Coherent
    card: Mapping[str, Any]  # `model.json`
    sha256: str  # of the weights
    calibration: Calibration | None = None  # of its probabilities; None: as the network says them

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

    def __call__(self, batch: Batch) -> RainForecast:
        """The network's forecast, calibrated, without gradients.

        Of a published network it is NaN towards the edges of the grid, where too little surrounds a cell.

        Raises:
            ValueError: if the grid is smaller than what a published network must see.
        """
        with torch.inference_mode():
            if isinstance(self.network, Published):
                inner = self._calibrated(tile_by_tile(self.network, as_if_new(batch)), batch)
                return Framed(inner, self.network.side - self.network.target)
            if isinstance(self.network, Coherent):
                return self.network(with_motion(batch))  # which calibrates before it draws
            return self._calibrated(self.network(with_motion(batch)), batch)

    def warn_of_unlearned(self, lead_times: Sequence[float]) -> None:
        """Says of lead times (minutes) beyond those it learned from that it never saw any."""
        if lead_times and max(lead_times) > max(self.lead_times):
            log.warning("lead times beyond %g min: the model never saw any", max(self.lead_times))

    def _calibrated(self, forecast: BinnedForecast, batch: Batch) -> BinnedForecast:
        """The forecast, which nobody else holds, as validation data put it right, if they did."""
        return forecast if self.calibration is None else self.calibration.in_place(forecast, batch.lead_time)

    @property
    def is_calibrated(self) -> bool:
        """Whether what it says was put right by validation data, before a head drew from it or after."""
        own = self.network.calibration if isinstance(self.network, Coherent) else None
        return (own or self.calibration) is not None

    def uncalibrated(self) -> "TrainedModel":
        """The same with the network's own probabilities."""
        network = copy(self.network)  # of the same weights
        if isinstance(network, Coherent):
            network.calibration = None
        return replace(self, network=network, calibration=None)


@dataclass(frozen=True)
class Framed:
    """A forecast of the middle of a grid; around it there is none (NaN)."""

    inner: RainForecast
    less: int  # cells that the middle is smaller than the grid, along each side

    def probability_above(self, threshold: float) -> Tensor:
        """As it was said."""
        return self._framed(self.inner.probability_above(threshold))

    def quantile(self, level: float) -> Tensor:
        """As it was said."""
        return self._framed(self.inner.quantile(level))

    def mean(self) -> Tensor:
        """As it was said."""
        return self._framed(self.inner.mean())

    def crps(self, observed: Tensor) -> Tensor:
        """As it was said."""
        before, after = self._edges
        rows, columns = (slice(before, size - after) for size in observed.shape[-2:])
        return self._framed(self.inner.crps(observed[..., rows, columns]))

    @property
    def _edges(self) -> tuple[int, int]:
        """Cells in the north and west, and in the south and east: as `metnet.downsampler.middle` has them."""
        return self.less // 2, self.less - self.less // 2

    def _framed(self, field: Tensor) -> Tensor:
        return F.pad(field, self._edges * 2, value=torch.nan)


def as_if_new(batch: Batch) -> Batch:
    """The batch at the time of its newest frame, for a network that is told of no ages.

    What is asked for `lead_time` after the init time lies further from that frame, by its age.

    Raises:
        ValueError: if the newest frames of its samples are not of one age.
    """
    late = batch.age[:, -1]
    if (late != late[0]).any():
        raise ValueError(
            f"newest frames that are {late.tolist()} minutes old: this network wants samples of one age"
        )
    return replace(
        batch,
        age=batch.age - late[:, None],
        init_time=batch.init_time - (60 * late).to(batch.init_time),
        lead_time=batch.lead_time + late[0],
        satellite_age=None if batch.satellite_age is None else batch.satellite_age - late[0],
    )


def tile_by_tile(network: Published, batch: Batch) -> BinnedForecast:
    """What a network says of all cells that have as much around them as it must see.

    It sees a window of the grid for each tile that it forecasts; the last of a row or a column overlaps.

    Raises:
        ValueError: if the grid is smaller than a window.
    """
    rows, columns = batch.radar.shape[-2:]
    side, target = network.side, network.target
    if min(rows, columns) < side:
        raise ValueError(
            f"the grid has {rows} x {columns} cells: a {type(network).__name__} that sees {side} x {side} "
            f"cells and forecasts the {target} x {target} in their middle wants at least as many; forecast "
            "from a larger cube, or with model=small"
        )
    shape = len(batch.radar), len(batch.lead_time), len(network.bins)
    said = batch.radar.new_empty(*shape, rows - side + target, columns - side + target)
    for y in (*range(0, rows - side, target), rows - side):
        for x in (*range(0, columns - side, target), columns - side):
            seen = _cut(batch, slice(y, y + side), slice(x, x + side))
            said[..., y : y + target, x : x + target] = network(seen).probability
    return BinnedForecast(said, network.bins)


def _cut(batch: Batch, rows: slice, columns: slice) -> Batch:
    """All that a batch holds of some cells."""
    held = {field.name: getattr(batch, field.name) for field in fields(batch)}
    maps = {name: value for name, value in held.items() if value is not None and value.ndim >= 4}
    return replace(batch, **{name: value[..., rows, columns] for name, value in maps.items()})


def with_motion(batch: Batch) -> Batch:
    """The batch with motion and its doubt, of its newest frames that hold anything, if nobody told it yet."""
    if batch.motion is not None:
        return batch
    each = []
    for radar, age in zip(batch.radar.cpu(), batch.age.cpu(), strict=True):
        there = (~radar.isnan()).flatten(1).any(dim=1).nonzero()[-FRAMES:, 0]
        each.append(motion_and_doubt(radar[there].numpy(), age[there].tolist()))
    return replace(batch, motion=torch.from_numpy(np.stack(each)).to(batch.radar))


def trained(path: str | Path) -> TrainedModel:
    """The model of a run folder, or the one that ships (`run_folder`), ready to forecast.

    Raises:
        ValueError: if the folder holds no finished run, the weights are not those of its card, they were
            learned by another computation (`metnet.forward`), or the card asks for anything outside `metnet`.
    """
    folder = run_folder(path)
    card = read_card(folder)
    if card is None:
        raise ValueError(f"{path}: no {CARD} there; expected the run folder of a finished `metnet train`")
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ValueError(
            f"{path}: {CARD} is there but {WEIGHTS} is not; the training's command makes it again"
        )
    data = weights.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if "sha256" not in card:
        raise ValueError(f"{folder / CARD}: incomplete: it does not tell the sha256 of {WEIGHTS}")
    if sha256 != card["sha256"]:
        raise ValueError(
            f"{weights}: its sha256 is {sha256}, {CARD} says {card['sha256']}; "
            "the file is damaged or not of this run; the training's command makes it again"
        )
    network = _built(folder, card)
    _load(network, data, weights, card)
    return TrainedModel(network.eval(), card, sha256, _calibration(folder, card, network.bins))


def untrained(path: str | Path) -> TrainedModel:
    """The prior of a run folder as it was before the training, and nothing else: not what is local beside it.

    Raises:
        ValueError: if the folder holds no finished run, one of a network without a prior, or not its weights.
    """
    folder = Path(path)
    card, fitted = read_card(folder), folder / PRIOR
    if card is None or not fitted.is_file():
        raise ValueError(
            f"{path}: expected the run folder of a finished `metnet train` of a network with advection, "
            f"with {CARD} and {PRIOR} in it"
        )
    network = _built(folder, card)
    if not isinstance(network, MetNet) or network.prior is None:
        raise ValueError(f"{path}: its network has no prior; expected one trained with model.advection=true")
    data = fitted.read_bytes()
    _load(network.prior, data, fitted, card)
    return TrainedModel(network.eval(), card, hashlib.sha256(data).hexdigest())


def _load(part: nn.Module, data: bytes, place: Path, card: dict[str, Any]) -> None:
    """Gives a network, or its prior, the weights of a file.

    Raises:
        ValueError: if they are those of another one.
    """
    try:
        part.load_state_dict(load(data), strict=True)
    except (RuntimeError, SafetensorError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{place}: not the weights that this metnet-nowcast {version()} wants for the model in {CARD}; "
            f"most probably another state of the software trained it; {_again(card)}. In detail: {detail} ..."
        ) from error


def check_forward(place: Path, card: Mapping[str, Any]) -> None:
    """Refuses weights that were learned by another computation, which would make other forecasts of them.

    Raises:
        ValueError: naming the place that tells it.
    """
    if (number := card.get("forward")) != FORWARD:
        raise ValueError(
            f"{place}: expected forward={FORWARD}, got {number}: another state of the software, which made "
            f"other forecasts of the same weights, trained it; {_again(card)}"
        )


def _again(card: Mapping[str, Any]) -> str:
    """What to do with a model of another state of the software."""
    software, created = card.get("software", "an unknown one"), card.get("created", "an unknown time")
    return f"train it again, into another folder, or open it with its own software ({software}, {created})"


def has_its_weights(folder: Path, card: Mapping[str, Any]) -> bool:
    """Whether the weights beside a card are those that it was written for."""
    weights = folder / WEIGHTS
    if not weights.is_file():
        return False
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == card.get("sha256")


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
        raise ValueError(
            f"{path}: not JSON: {error}; remove it, and the training's command makes it again"
        ) from error
    if not isinstance(card, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(card).__name__}")
    return card


def _calibration(folder: Path, card: Mapping[str, Any], bins: RainBins) -> Calibration | None:
    """The calibration that the card tells; None where a run has none."""
    told = card.get("calibration")
    if told is None:
        return None
    try:
        return Calibration.from_card(told, len(bins.edges))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CARD}: {error}") from error


def _built(folder: Path, card: Mapping[str, Any]) -> MetNet | Published | Coherent:
    """The network that the card describes, with fresh weights."""
    check_forward(folder / CARD, card)
    try:
        made = construct(card["config"]["model"], ("metnet.",))
        bins = RainBins(tuple(float(edge) for edge in card["bins"]["edges"]), float(card["bins"]["top"]))
        network = made() if isinstance(made, partial) else made
        for key in ("lead_times", "cadence_minutes"):
            if not card[key] or not all(0 < float(minutes) < math.inf for minutes in card[key]):
                raise ValueError(f"{key}={card[key]}: expected one or more minutes above 0")
    except KeyError as error:
        raise ValueError(f"{folder / CARD}: incomplete: no {error}; {ANOTHER}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CARD}: {error}; {ANOTHER}") from error
    if not isinstance(network, MetNet | Published | Coherent):
        raise ValueError(
            f"{folder / CARD}: its model is a {type(network).__name__}; expected a MetNet, MetNet1, "
            "MetNet2 or Coherent"
        )
    if network.bins != bins:
        raise ValueError(f"{folder / CARD}: its bins are not those of its model: {bins} and {network.bins}")
    return network
