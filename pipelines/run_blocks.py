"""What a forecaster says of one init time, as the `RunBlock`s of a run, in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from metnet.batch import Batch
from metnet.forecaster import Forecaster
from metnet.rain import EnsembleForecast, RainForecast
from pipelines.runs import RunBlock, RunHeader

WHOLE = 1_400_000  # cells; a grid of no more is forecast at once
TILE = 1024  # cells a side of the tiles of a larger one; whole chunks of a forecast store, and of 16 cells
HALO = 272  # cells around a tile that the network sees too: half a widest area of `metnet.cascade`, and 8
LEADS_OF_CELLS = 8_000_000  # lead times times cells that a network forecasts at once
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

    A grid of no more than `WHOLE` cells is one tile. Of a larger one every tile is forecast with what lies
    around it on the grid. `batch` holds one sample; cells that it never observed are NaN.
    """
    unseen = _unseen(batch)
    for rows, columns in _tiles(*header.grid.shape):
        if unseen[rows, columns].all():
            continue  # what no block covers is NaN
        y, x = (_around(*part) for part in zip((rows, columns), header.grid.shape, strict=True))
        motion = None if batch.motion is None else batch.motion[..., y, x].contiguous()
        seen = replace(batch, radar=batch.radar[..., y, x].contiguous(), motion=motion)
        together = max(1, LEADS_OF_CELLS // seen.radar[0, 0].numel())
        parts = []
        for first in range(0, len(batch.lead_time), together):
            leads = slice(first, min(first + together, len(batch.lead_time)))
            forecast = forecaster(replace(seen, lead_time=batch.lead_time[leads]))
            place = _Place(leads, rows, columns, _within(rows, y), _within(columns, x))
            parts.append(_block(forecast, header, place, unseen))
        yield _joined(parts)


def _tiles(y_size: int, x_size: int) -> Iterator[tuple[slice, slice]]:
    """The rows and columns of each tile of a grid."""
    if y_size * x_size <= WHOLE:
        yield slice(0, y_size), slice(0, x_size)
        return
    for y in range(0, y_size, TILE):
        for x in range(0, x_size, TILE):
            yield slice(y, min(y + TILE, y_size)), slice(x, min(x + TILE, x_size))


def _joined(parts: Sequence[RunBlock]) -> RunBlock:
    """Blocks of lead times that follow each other, as one: all lie in the same chunks of a small grid."""
    if len(parts) == 1:
        return parts[0]
    tables = zip(*((part.exceedance, part.quantile, part.median, part.mean) for part in parts), strict=True)
    exceedance, quantile, median, mean = tables
    return replace(
        parts[0],
        lead=slice(parts[0].lead.start, parts[-1].lead.stop),
        exceedance=np.concatenate(exceedance),
        quantile=np.concatenate(quantile, axis=1),
        median=np.concatenate(median),
        mean=np.concatenate(mean),
    )


def _around(cells: slice, size: int) -> slice:
    """The same cells along an axis, and what lies around them on the grid."""
    return slice(max(0, cells.start - HALO), min(cells.stop + HALO, size))


def _within(cells: slice, seen: slice) -> slice:
    """The same cells, counted from the first that is seen."""
    return slice(cells.start - seen.start, cells.stop - seen.start)


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
