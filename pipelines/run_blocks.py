"""What a forecaster says of one init time, as the `RunBlock`s of a run, in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from metnet.batch import Batch
from metnet.forecaster import Forecaster
from metnet.rain import EnsembleForecast, RainForecast
from pipelines.runs import RunBlock, RunHeader

TILE = 512  # cells a side that a network forecasts at once; whole chunks of a forecast store
HALO = 128  # cells around a tile that the network sees too
CELLS_AT_ONCE = 1500 * 1500  # an ensemble of more is tabulated one lead time after the other, as it is stored
RATES_AT_ONCE = 2**28  # of all lead times of a member in one call: 1 GiB

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class _Place:
    """A block's lead times, rows and columns in the run, and its rows and columns in the forecast."""

    lead: slice
    y: slice
    x: slice
    rows: slice
    columns: slice


def whole(forecaster: Forecaster, batch: Batch, header: RunHeader) -> Iterator[RunBlock]:
    """The blocks of a forecaster that must see the whole grid at once, as motion does.

    `batch` holds one sample; cells that it never observed are NaN.
    """
    y_size, x_size = header.grid.shape
    unseen, rows, columns = _unseen(batch), slice(0, y_size), slice(0, x_size)
    together = max(1, RATES_AT_ONCE // (y_size * x_size))
    for first in range(0, len(batch.lead_time), together):
        leads = slice(first, min(first + together, len(batch.lead_time)))
        forecast = forecaster(replace(batch, lead_time=batch.lead_time[leads]))
        for lead, apart in _apart(forecast, leads, y_size * x_size):
            yield _block(apart, header, _Place(lead, rows, columns, rows, columns), unseen)


def tiled(forecaster: Forecaster, batch: Batch, header: RunHeader) -> Iterator[RunBlock]:
    """The blocks of a forecaster that needs to see no more than the surroundings: tile by tile.

    A grid no larger than a tile is one block. Otherwise every tile is forecast with its surroundings,
    which beyond the grid are unobserved. `batch` holds one sample; cells that it never observed are NaN.
    """
    y_size, x_size = header.grid.shape
    leads, unseen = slice(0, len(batch.lead_time)), _unseen(batch)
    if max(y_size, x_size) <= TILE:
        rows, columns = slice(0, y_size), slice(0, x_size)
        yield _block(forecaster(batch), header, _Place(leads, rows, columns, rows, columns), unseen)
        return
    beyond = (HALO, HALO + -x_size % TILE, HALO, HALO + -y_size % TILE)
    surrounded = F.pad(batch.radar, beyond, value=torch.nan)
    moving = None if batch.motion is None else F.pad(batch.motion, beyond, mode="replicate")
    for y in range(0, y_size, TILE):
        for x in range(0, x_size, TILE):
            rows, columns = slice(y, min(y + TILE, y_size)), slice(x, min(x + TILE, x_size))
            if unseen[rows, columns].all():
                continue  # what no block covers is NaN
            seen = (..., slice(y, y + TILE + 2 * HALO), slice(x, x + TILE + 2 * HALO))
            motion = None if moving is None else moving[seen].contiguous()
            forecast = forecaster(replace(batch, radar=surrounded[seen].contiguous(), motion=motion))
            place = _Place(leads, rows, columns, _inner(rows), _inner(columns))
            yield _block(forecast, header, place, unseen)


def _inner(cells: slice) -> slice:
    """The same cells, counted from the corner of a tile's halo."""
    return slice(HALO, HALO + cells.stop - cells.start)


def _unseen(batch: Batch) -> Mask:
    """The cells that no past frame observed (y, x)."""
    mask: Mask = batch.radar[0].isnan().all(dim=0).numpy()
    return mask


def _apart(forecast: RainForecast, leads: slice, cells: int) -> Iterator[tuple[slice, RainForecast]]:
    """A large ensemble lead by lead, as views of it; anything else as it is."""
    if cells > CELLS_AT_ONCE and isinstance(forecast, EnsembleForecast):
        for index, lead in enumerate(range(leads.start, leads.stop)):
            yield slice(lead, lead + 1), EnsembleForecast(forecast.members[:, :, index : index + 1])
    else:
        yield leads, forecast


def _block(forecast: RainForecast, header: RunHeader, place: _Place, unseen: Mask) -> RunBlock:
    """The table of a forecast, without the cells never observed."""
    hidden = unseen[place.y, place.x]
    thresholds, levels = header.thresholds, header.quantiles

    def field(values: torch.Tensor) -> NDArray[np.float32]:
        cut = values[0, :, place.rows, place.columns].numpy()
        return np.where(hidden, np.float32(np.nan), cut) if hidden.any() else cut

    exceedance = np.stack([field(forecast.probability_above(level)) for level in thresholds], axis=1)
    if isinstance(forecast, EnsembleForecast) and forecast.members.shape[1] == 1:
        rate = field(forecast.members[:, 0])  # the only member is the mean and every quantile
        same = np.broadcast_to(rate, (len(levels), *rate.shape))
        return RunBlock(place.lead, place.y, place.x, exceedance, same, rate, rate)
    quantile = np.stack([field(forecast.quantile(level)) for level in levels])
    median = quantile[levels.index(0.5)] if 0.5 in levels else field(forecast.quantile(0.5))
    mean = field(forecast.mean())
    return RunBlock(place.lead, place.y, place.x, exceedance, quantile, median, mean)
