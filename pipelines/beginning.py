"""What a training begins with: a start fitted on single pixels, or the weights of a finished run."""

import hashlib
import inspect
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load, save
from torch import nn

from metnet.axial_head import Coherent
from metnet.batch import Batch
from metnet.forward import FORWARD
from metnet.model import MetNet
from metnet.prior import AdvectionPrior, Pixels
from pipelines.observations import Observations
from pipelines.progress import track
from pipelines.run_folder import has_learned, plain, replace_file, settings
from pipelines.samples import ENDLESS
from pipelines.task import RadarData
from pipelines.trained import PRIOR, Published, trained

FINGERPRINT = "fitted_for"  # among the metadata of `PRIOR`
LOCAL = "local.safetensors"
PRIOR_LEADS = 4  # of a batch that the prior is fitted on
PRIOR_PIXELS = 200  # of each sample and lead time
log = logging.getLogger(__name__)


def taken_over(
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
        reason = str(error).removeprefix(f"{weights}: ")
        raise ValueError(f"weights={weights}: {reason}") from error
    kinds = [type(each).__name__ for each in (network, begun.network)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"weights={weights}: expected a {kinds[0]}, as model= describes, got a {kinds[1]}")
    usual = {name: of.default for name, of in inspect.signature(type(network)).parameters.items()}
    usual["stochastic_depth"] = 0.0  # how it is trained, not what it is
    here, there = (dict(settings(each["model"])) for each in (plain(config), begun.card["config"]))
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


def warn_of_seen(begun: Mapping[str, Any], validated: Sequence[Observations]) -> None:
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


def keep_prior(network: nn.Module, folder: Path) -> None:
    """Writes down the prior that a training begins with, where it is not fitted; nothing older stays."""
    (folder / LOCAL).unlink(missing_ok=True)
    if isinstance(network, MetNet) and network.prior is not None:
        replace_file(folder / PRIOR, save(network.prior.state_dict()))


def fit_start(
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
            place.is_file() and (has_learned(folder) or _fingerprint_of(place) == fingerprint)
            for place in places
        )
        if not kept:
            _fit_on_pixels(network, network.prior, data, fitting, seed)
        for place, part in places.items():
            if kept:
                part.load_state_dict(load(place.read_bytes()))
            else:
                replace_file(place, save(part.state_dict(), {FINGERPRINT: fingerprint}))


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
    if not len(known):
        raise ValueError(
            "in none of the samples a pixel was observed together with what a forecast begins from: look at "
            "the cubes (metnet inspect), and ingest more of their frames"
        )
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


def fingerprint(config: Mapping[str, Any], snapshots: Sequence[str]) -> str:
    """Of the settings, the frames, and the computation, that a prior is fitted with."""
    told = json.dumps([sorted(settings(plain(config))), snapshots, FORWARD])
    return hashlib.sha256(told.encode()).hexdigest()


def _fingerprint_of(prior: Path) -> str | None:
    """That a prior was kept with; None: with none."""
    with safe_open(prior, framework="pt") as file:
        return (file.metadata() or {}).get(FINGERPRINT)
