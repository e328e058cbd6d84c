"""`python -m benchmarks.tiles CUBE [--model RUN]`: a forecast of a grid at once, and in tiles.

What tiles change: probabilities, their change across the first border beside that from column to column
around it, Brier scores on the same pixels, and CPU time. The tiles are those of `pipelines.run_blocks` (its
`HALO` around each), of a side that makes several even of a small grid.
"""

import argparse
import time
from collections.abc import Sequence
from datetime import timedelta
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import machine
from metnet.batch import Batch
from pipelines.bench_skill import init_times
from pipelines.observations import Observations
from pipelines.past import past
from pipelines.plain import rain_cube
from pipelines.pretrained import run_folder
from pipelines.progress import track
from pipelines.run_blocks import tiled
from pipelines.runs import RunHeader
from pipelines.samples import Span
from pipelines.trained import TrainedModel, trained, with_motion

LEADS = (10.0, 30.0, 60.0)  # minutes
THRESHOLDS = (0.1, 1.0, 5.0)  # mm/h
BESIDE = 6  # columns on either side of a border that are looked at
HEADS = (
    "lead, threshold",
    "mean difference",
    "99.9 % below",
    "largest",
    "across",
    "beside",
    "at once",
    "Brier",
)
Fields = NDArray[np.float32]  # (lead, threshold, y, x)


def said(model: TrainedModel, batch: Batch, header: RunHeader, tile: int | None) -> tuple[Fields, float]:
    """The probabilities of exceedance, in tiles of a side or at once, and the CPU seconds they took."""
    fields = np.full((len(header.lead_times), len(THRESHOLDS), *header.grid.shape), np.nan, np.float32)
    begin = time.process_time()
    with patch.multiple("pipelines.run_blocks", WHOLE=0 if tile else fields[0, 0].size, TILE=tile):
        for block in tiled(model, batch, header):
            fields[block.lead, :, block.y, block.x] = block.exceedance
    return fields, time.process_time() - begin


def told(tiles: Fields, whole: Fields, observed: Fields, tile: int) -> list[list[float]]:
    """For each lead time and threshold the numbers behind `HEADS`; the last is a ratio of sums."""
    rows = []
    for lead, level in np.ndindex(tiles.shape[:2]):
        one, other = tiles[lead, level], whole[lead, level]
        difference = np.abs(one - other)
        change, smooth = _changes(one), _changes(other)
        around = [tile - 1 + step for step in range(-BESIDE, BESIDE + 1) if abs(step) > 2]
        fell = (observed[lead] >= THRESHOLDS[level]).astype(np.float32)
        fell[np.isnan(observed[lead])] = np.nan
        scores = [np.nanmean((field - fell) ** 2) for field in (one, other)]
        rows.append(
            [
                np.nanmean(difference),
                np.nanquantile(difference, 0.999),
                np.nanmax(difference),
                change[tile - 1],
                np.nanmean(change[around]),
                smooth[tile - 1],
                scores[0] / scores[1],
            ]
        )
    return rows


def _changes(field: NDArray[np.float32]) -> NDArray[np.float64]:
    """From each column to the next, the mean over the rows; NaN where nothing is known."""
    steps = np.abs(np.diff(field.astype(np.float64)))
    seen = (~np.isnan(steps)).sum(axis=0)
    means: NDArray[np.float64] = np.full(seen.size, np.nan)
    np.divide(np.nansum(steps, axis=0), seen, out=means, where=seen > 0)
    return means


def raced(model: TrainedModel, cube: Observations, count: int, tile: int) -> None:
    """Runs and prints all."""
    if cube.grid.x_size <= tile + BESIDE:
        raise ValueError(f"{cube.path}: {cube.grid.x_size} columns, which tiles of {tile} do not cut")
    span = Span.of_those(cube, model.frames, list(LEADS))
    leads = tuple(step * cube.cadence / timedelta(minutes=1) for step in span.leads)
    tables, taken = [], np.zeros(2)
    inits = init_times(cube, span, count)
    for init in track(inits, "forecasting", total=len(inits)):
        header = RunHeader(init, cube.grid, leads, THRESHOLDS, (0.5,), {})
        batch = with_motion(past(cube, init, model.frames, leads))
        observed = np.concatenate([cube.block(init + timedelta(minutes=lead), 1) for lead in leads])
        whole, at_once = said(model, batch, header, None)
        tiles, apart = said(model, batch, header, tile)
        tables.append(told(tiles, whole, observed, tile))
        taken += at_once, apart
    print(machine())
    rows, columns = cube.grid.shape
    print(f"{len(inits)} forecasts of {rows} x {columns} cells, tiles of {tile}\n")
    names = [f"{lead:g} min, {threshold:g} mm/h" for lead in leads for threshold in THRESHOLDS]
    cells = [
        [name, *(f"{value:.4f}" for value in row)]
        for name, row in zip(names, np.mean(tables, axis=0).tolist(), strict=True)
    ]
    for line in (HEADS, ("---",) * len(HEADS), *cells):
        print("| " + " | ".join(line) + " |")
    print(f"\nCPU s a forecast: {taken[0] / len(inits):.1f} at once, {taken[1] / len(inits):.1f} in tiles")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, runs and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__)
    parser.add_argument("cube", help="path of a cube whose grid is wider than a tile")
    parser.add_argument("--model", default="pretrained", help="a run folder of `metnet train`")
    parser.add_argument("--inits", type=int, default=2, help="init times")
    parser.add_argument("--side", type=int, default=512, help="cells a side of a tile, a multiple of 16")
    asked = parser.parse_args(arguments)
    raced(trained(run_folder(asked.model)), rain_cube(asked.cube), asked.inits, asked.side)


if __name__ == "__main__":
    main()
