"""`python -m benchmarks.motion CUBE [CUBE...]`: what a motion is worth, beside none and that of pysteps.

The same pasts are carried along three motions: none, that of pysteps (dense Lucas-Kanade, with its usual
settings, of its usual three frames) and ours, by the plain extrapolation and by a model, and scored on the
pixels for which all three extrapolations have a forecast. A model that has learned from the cube is no
better for it here: it is the same for all three.
"""

import argparse
import io
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import timedelta

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.drills import Case, cases
from metnet.advection import advect
from pipelines.baselines.steps import DRY_DECIBEL, WET
from pipelines.motion import motion
from pipelines.plain import rain_cube
from pipelines.progress import track
from pipelines.trained import TrainedModel, trained

WANTED = (5, 15, 30, 60)  # minutes; of a slower cube its nearest steps
Field = NDArray[np.float32]
Estimate = Callable[[Field, Sequence[float]], Field]


def none(rain: Field, age: Sequence[float]) -> Field:
    """Nothing moves."""
    return np.zeros((2, *rain.shape[1:]), np.float32)


def lucas_kanade(rain: Field, age: Sequence[float]) -> Field:
    """That of pysteps, in cells per minute."""
    from pysteps.motion.lucaskanade import dense_lucaskanade

    decibel = 10 * np.log10(np.maximum(np.nan_to_num(rain[-3:]), WET))
    decibel[~(rain[-3:] >= WET)] = DRY_DECIBEL
    with redirect_stdout(io.StringIO()):
        flow = dense_lucaskanade(decibel)
    return (flow / (age[-2] - age[-1])).astype(np.float32)


MOTIONS: Mapping[str, Estimate] = {"none": none, "pysteps Lucas-Kanade": lucas_kanade, "ours": motion}


def scores(case: Case, model: TrainedModel) -> tuple[dict[str, Tensor], dict[str, float]]:
    """By motion: absolute error of the extrapolation and CRPS of the model by lead time; seconds."""
    radar, age = case.in_time.radar[0].numpy(), case.in_time.age[0].tolist()
    flows, seconds = {}, {}
    for name, estimate in MOTIONS.items():
        start = time.process_time()
        flows[name] = torch.from_numpy(np.ascontiguousarray(estimate(radar, age)))[None]
        seconds[name] = time.process_time() - start
    newest, leads = case.in_time.radar[:, -1], case.in_time.lead_time
    carried = {name: advect(newest, flow, leads + age[-1]) for name, flow in flows.items()}
    target = case.target
    for field in carried.values():
        target = target.masked_fill(field.isnan(), torch.nan)
    found = {}
    for name, flow in flows.items():
        crps = model(replace(case.in_time, motion=flow)).crps(target)
        found[name] = torch.stack([(carried[name] - target).abs(), crps]).nanmean(dim=(1, 3, 4))
    return found, seconds


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cube", nargs="+", help="cubes of radar frames")
    parser.add_argument("--run", default="pretrained", help="run folder of metnet train, or pretrained")
    parser.add_argument("--inits", type=int, default=5, help="init times of a cube")
    parser.add_argument("--side", type=int, default=320, help="cells of the window's sides")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = trained(given.run)
    lucas_kanade(np.ones((3, 64, 64), np.float32), (10, 5, 0))  # what it imports on first use is not timed
    print(
        "| cube | lead times min | motion | error of extrapolation mm/h | CRPS of the model mm/h | ms CPU |"
    )
    print("|---|---|---|---|---|---|")
    for path in given.cube:
        cube = rain_cube(path)
        leads = sorted({max(1, round(timedelta(minutes=lead) / cube.cadence)) for lead in WANTED})
        minutes = [step * cube.cadence.total_seconds() / 60 for step in leads]
        chosen = cases(cube, model.frames, given.inits, given.side, leads=minutes)
        told = [scores(case, model) for case in track(chosen, path, total=len(chosen))]
        for name in MOTIONS:
            means = torch.stack([found[name] for found, _ in told]).nanmean(dim=0)
            spent = 1000 * float(np.median([seconds[name] for _, seconds in told]))
            error, crps = (", ".join(f"{value:.3f}" for value in row) for row in means.tolist())
            at = ", ".join(f"{lead:g}" for lead in minutes)
            print(f"| {path} | {at} | {name} | {error} | {crps} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    main()
