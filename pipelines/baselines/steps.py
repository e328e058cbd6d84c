"""STEPS: extrapolations with noise where motion tells no more (Bowler et al. 2006), by pysteps."""

import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metnet.advection import advect
from metnet.batch import Batch
from metnet.rain import EnsembleForecast
from pipelines.motion import motion

WET = 0.1  # mm/h
DRY_DECIBEL = -15.0  # dB, what stands for dry where WET is -10 dB

Nowcast = Callable[..., NDArray[np.float64]]


@dataclass(frozen=True)
class Steps:
    """pysteps' STEPS with its usual settings: 6 cascade levels, AR(2), nonparametric noise, cdf matching.

    Unobserved cells count as dry inside pysteps; where plain extrapolation has no forecast there is none
    (NaN). If a frame is missing, the two newest that are there serve, with AR(1). Where there is too little
    to tell how rain changes (a single frame, or frames that repeat each other) every member is the plain
    extrapolation.
    """

    members: int = 24  # equally likely forecasts
    seed: int = 0  # the same seed gives the same members

    def __post_init__(self) -> None:
        """Refuses an ensemble of one."""
        if self.members < 2:
            raise ValueError(f"members={self.members}: an ensemble needs at least 2")

    @property
    def frames(self) -> int:
        """How many past frames it wants to see."""
        return 3

    def __call__(self, batch: Batch) -> EnsembleForecast:
        """The forecast at `batch.lead_time`.

        Raises:
            ValueError: if pysteps is not installed.
        """
        nowcast = pysteps_nowcast()
        samples = [self._sample(nowcast, batch, index) for index in range(len(batch.radar))]
        return EnsembleForecast(torch.stack(samples))

    def _sample(self, nowcast: Nowcast, batch: Batch, index: int) -> torch.Tensor:
        """The members (member, lead, y, x) of one sample."""
        radar, age = _even(batch.radar[index, -3:], batch.age[index, -3:])
        flow = motion(radar.numpy(), age.tolist())
        lead_time = batch.lead_time + age[-1]
        plain = advect(radar[-1:], torch.from_numpy(flow)[None], lead_time)[0]
        if not (radar[-1] >= WET).any() or len(radar) < 2:
            return plain.repeat(self.members, 1, 1, 1)
        gap = float(age[-2] - age[-1])  # minutes
        cell_size = float(batch.cell_size[index])
        rates = self._members(nowcast, radar, flow * gap, lead_time / gap, gap, cell_size)
        rates = plain.repeat(self.members, 1, 1, 1) if rates is None else rates
        return rates.where(~plain.isnan(), torch.nan)

    def _members(
        self,
        nowcast: Nowcast,
        radar: torch.Tensor,
        motion_a_step: NDArray[np.float32],
        steps: torch.Tensor,
        gap: float,
        cell_size: float,
    ) -> torch.Tensor | None:
        """The members (mm/h) without gaps; None if frames tell no change (flat, or a singular AR model)."""
        decibel = 10 * np.log10(np.maximum(np.nan_to_num(radar.numpy().astype(np.float64)), WET))
        decibel[~(radar.numpy() >= WET)] = DRY_DECIBEL
        if (np.ptp(decibel, axis=(1, 2)) == 0).any():
            return None
        try:
            with redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                members = nowcast(
                    decibel,
                    motion_a_step.astype(np.float64),
                    steps.tolist(),
                    n_ens_members=self.members,
                    precip_thr=10 * np.log10(WET),
                    kmperpixel=cell_size / 1000,
                    timestep=gap,
                    ar_order=len(radar) - 1,
                    seed=self.seed,
                )
        except np.linalg.LinAlgError:
            return None
        rates = torch.from_numpy(10 ** (members / 10)).to(radar.dtype)
        rates[~(rates >= WET * (1 - 1e-6))] = 0  # NaN too: what came in from outside
        return rates if (rates >= WET).any() else None


def _even(radar: torch.Tensor, age: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The frames that hold anything, and their ages: all if evenly spaced, else the two newest."""
    there = [i for i in range(len(radar)) if not radar[i].isnan().all()] or [len(radar) - 1]
    gaps = age[there].diff()
    kept = there if bool((gaps == gaps[:1]).all()) else there[-2:]
    return radar[kept], age[kept]


def pysteps_nowcast() -> Nowcast:
    """The nowcast of pysteps, imported on first use: it is optional, slow to import and prints.

    Raises:
        ValueError: if pysteps is not installed.
    """
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pysteps.nowcasts import steps
    except ImportError as error:
        raise ValueError("model=steps needs pysteps: pip install 'metnet-nowcast[verify]'") from error
    forecast: Any = steps.forecast
    return forecast
