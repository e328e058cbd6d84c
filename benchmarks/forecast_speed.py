"""`python -m benchmarks.forecast_speed RUN CUBE`: a trained model's forecast beside STEPS and extrapolation.

One batch of real data, the window of the cube with the most rain at the time in the middle of those that can
be forecast, 12 lead times from 5 to 60 minutes. Each arm makes its forecast from the frames alone (motion,
and calibration where the run has one, are part of it) in a fresh process, whose memory is therefore its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median

import torch

from benchmarks.drills import cases
from metnet.batch import Batch
from metnet.forecaster import Forecaster
from pipelines.baselines.extrapolation import Extrapolation
from pipelines.baselines.steps import Steps, pysteps_nowcast
from pipelines.plain import rain_cube
from pipelines.trained import trained

LEADS = tuple(5.0 * step for step in range(1, 13))  # minutes
FRAMES = 4  # of the past, for a baseline
MIB = 1024  # of the KiB that Linux counts memory in
HEADS = ("forecaster", "wall s", "CPU s", "times the model's CPU", "peak MiB", "of which before", "wet cells")


def steps() -> Steps:
    """STEPS as published, with what it imports on first use, so that no forecast is timed with it."""
    pysteps_nowcast()
    return Steps(24)


ARMS: Mapping[str, Callable[[str], Forecaster]] = {
    "model": trained,
    "uncalibrated model": lambda run: trained(run).uncalibrated(),
    "STEPS, 24 members": lambda _: steps(),
    "extrapolation": lambda _: Extrapolation(FRAMES),
}


@dataclass(frozen=True)
class Cost:
    """What one forecast took."""

    wall: float  # seconds
    cpu: float  # seconds of all threads, in the process and in the kernel
    peak: float  # MiB, resident, of the whole process
    before: float  # MiB, resident at most before the forecast: programs, weights and the past
    wet: float  # share of the cells and lead times whose mean is 0.1 mm/h or more


def cost(forecaster: Forecaster, batch: Batch) -> Cost:
    """What it takes to forecast a batch, the first time in this process."""
    before = _peak()
    wall, cpu = time.perf_counter(), time.process_time()
    forecast = forecaster(batch)
    taken = time.perf_counter() - wall, time.process_time() - cpu
    peak = _peak()
    return Cost(*taken, peak, before, (forecast.mean() >= 0.1).float().mean().item())


def past(cube: str, side: int) -> Batch:
    """The past of the window with the most rain, at a time in the middle of the cube."""
    return cases(rain_cube(cube), FRAMES, 1, side, LEADS)[0].in_time


def alone(arm: str, run: str, cube: str, side: int, threads: int) -> Cost:
    """What an arm takes in a process of its own.

    Raises:
        subprocess.CalledProcessError: if the process fails; it has then said why.
    """
    command = [sys.executable, "-m", "benchmarks.forecast_speed", run, cube, "--arm", arm]
    sizes = ["--side", str(side), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    told = subprocess.run(command + sizes, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Cost(**json.loads(told.stdout.splitlines()[-1]))


def table(costs: Mapping[str, Cost]) -> str:
    """The arms as a Markdown table; the first is what the others are compared with."""
    first = next(iter(costs.values())).cpu
    lines = [HEADS, ("---",) * len(HEADS)]
    for arm, spent in costs.items():
        times, memory = f"{spent.cpu / first:.2f}", (f"{spent.peak:.0f}", f"{spent.before:.0f}")
        lines.append((arm, f"{spent.wall:.2f}", f"{spent.cpu:.2f}", times, *memory, f"{spent.wet:.1%}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def typical(rounds: list[Cost]) -> Cost:
    """The median of each number."""
    return Cost(*(median(column) for column in zip(*(asdict(each).values() for each in rounds), strict=True)))


def _peak() -> float:
    """The most memory this process has had resident so far (MiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def main() -> None:
    """Prints the table, or with `--arm` what that arm took in this process, as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder of metnet train")
    parser.add_argument("cube", help="cube of real data")
    parser.add_argument("--side", type=int, default=512, help="cells of the window's sides (default 512)")
    parser.add_argument("--threads", type=int, default=2, help="of each process (default 2)")
    parser.add_argument("--rounds", type=int, default=1, help="medians of so many, by turns (default 1)")
    parser.add_argument("--arm", choices=list(ARMS), help="only this one, in this process, as JSON")
    given = parser.parse_args()
    if given.arm:
        torch.set_num_threads(given.threads)
        print(json.dumps(asdict(cost(ARMS[given.arm](given.run), past(given.cube, given.side)))))
        return
    place = (given.run, given.cube, given.side, given.threads)
    rounds = [{arm: alone(arm, *place) for arm in ARMS} for _ in range(given.rounds)]
    print(table({arm: typical([each[arm] for each in rounds]) for arm in ARMS}))


if __name__ == "__main__":
    main()
