"""Trainings small enough for a test, in this process or in others."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
from lightning import Trainer

from pipelines.cf import BRIGHTNESS_TEMPERATURE, ELEVATION, RAINFALL_RATE
from pipelines.construct import construct
from pipelines.cube import Cube
from pipelines.frame import ALWAYS, Frame
from pipelines.grid import Grid
from pipelines.static import write_static
from pipelines.train import train

ROOT = Path(__file__).parents[2]
START = datetime(2024, 6, 1, tzinfo=UTC)
FIVE = timedelta(minutes=5)
ATTENTION = {
    "_target_": "metnet.attention.axial.AxialAttention",
    "_partial_": True,
    "heads": 2,
    "dim_index": 1,
}
MODEL = {
    "_target_": "metnet.model.MetNet",
    "_partial_": True,
    "frames": 2,
    "channels": 8,
    "fine_channels": 4,
    "depth": 1,
    "attention": ATTENTION,
    "grid": [4, 4],
}
SMALL = {
    "lead_times": [5, 10, 15],
    "crop": 16,
    "batch_size": 2,
    "check_every": 3,
    "prior_steps": 0,
    "prior_samples": 8,
    "prior_crop": 16,
    "local_steps": 2,
    "validation_samples": 3,
    "leads_per_step": 2,
    "learning_rate": 0.01,
    "pictures": False,
}


GOES = ((250.0, 10.0), (260.0, 10.0))
PUBLISHED = {  # tiny ones, which see 64 x 64 cells
    "metnet1": {
        "_target_": "metnet.metnet1.MetNet1",
        "_partial_": True,
        "side": 64,
        "target": 4,
        "frames": 3,
        "satellite": GOES,
        "step": 5.0,
        "leads": 3,
        "first": 8,
        "channels": 8,
        "memory": 8,
        "width": 16,
        "heads": 2,
        "depth": 2,
    },
    "metnet2": {
        "_target_": "metnet.metnet2.MetNet2",
        "_partial_": True,
        "side": 64,
        "target": 16,
        "frames": 3,
        "satellite": GOES,
        "satellite_frames": 2,
        "step": 5.0,
        "leads": 3,
        "hour": 12,
        "told": 8,
        "memory": 8,
        "width": 8,
        "blocks": (1, 1),
        "fine_width": 8,
        "dense": 8,
    },
}
WIDE = {
    "crop": 64,
    "satellite": ["ir_087", "ir_108"],
    "static": ["elevation"],
}  # beside the rain of `made_wide_cube`


def drifting(count):
    """A shower of 3 mm/h that drifts east by two cells a frame, over a dry field with one blind corner."""
    for i in range(count):
        rain = np.zeros((24, 32), np.float32)
        rain[8:16, (2 * i) % 28 : (2 * i) % 28 + 4] = 3.0
        rain[:3, :3] = np.nan
        yield rain


def patchy(count):
    """The same; of every third frame more than half is not observed."""
    for i, rain in enumerate(drifting(count)):
        if i % 3 == 0:
            rain[:, (5 * i) % 16 :][:, :18] = np.nan
        yield rain


def made_cube(path, fields, start=START):
    """A cube of these fields, every five minutes."""
    grid = Grid("EPSG:3035", 4e6, 1000.0, 32, 3e6, -1000.0, 24)
    frames = [
        Frame(
            RAINFALL_RATE,
            start + i * FIVE,
            FIVE,
            grid,
            rain,
            "drifting",
            hashlib.sha256(bytes([i])).hexdigest(),
        )
        for i, rain in enumerate(fields)
    ]
    Cube.open_or_create(str(path), grid, RAINFALL_RATE, start, FIVE).write(frames)
    return str(path)


def made_wide_cube(path, side):
    """Radar, two satellite channels and elevation on side x side cells: two hours of noise."""
    grid = Grid("EPSG:3035", 4e6, 1000.0, side, 3e6, -1000.0, side)
    random = np.random.default_rng(0)

    def filled(group, variable, mean, spread):
        frames = [
            Frame(
                variable,
                START + i * FIVE,
                FIVE,
                grid,
                random.normal(mean, spread, grid.shape).clip(0).astype(np.float32),
                "noise",
                hashlib.sha256(f"{group}{i}".encode()).hexdigest(),
                group,
            )
            for i in range(24)
        ]
        Cube.open_or_create(str(path), grid, variable, START, FIVE, group).write(frames)

    filled("ir_087", BRIGHTNESS_TEMPERATURE, 250, 10)
    filled("ir_108", BRIGHTNESS_TEMPERATURE, 260, 10)
    height = np.full(grid.shape, 300.0, np.float32)
    write_static(str(path), Frame(ELEVATION, ALWAYS, None, grid, height, "hills", "ab" * 32, "static"))
    filled("radar", RAINFALL_RATE, 0, 2)
    return str(path)


def trained_on(cube, run, steps, trainer=None, model=MODEL, **changed):
    """`metnet train` with numbers small enough for a test."""
    settings = SMALL | changed
    trainer = {"max_steps": steps, **(trainer or {})}
    return train(
        cube=cube if isinstance(cube, list) else str(cube),
        run=str(run),
        model=construct(model, ("metnet.",)),
        trainer=partial(Trainer, **{"accelerator": "cpu", "gradient_clip_val": 1.0, **trainer}),
        config={
            "cube": cube if isinstance(cube, list) else str(cube),
            "run": str(run),
            "model": model,
            "trainer": trainer,
            **{key: value for key, value in settings.items() if isinstance(value, str | int | float | list)},
        },
        **settings,
    )


SERVER = textwrap.dedent(
    """
    import json, os, signal, sys, traceback, warnings
    import torch
    import pipelines.train
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from lightning.pytorch.utilities import rank_zero_only
    from pipelines.task import Task
    from tests.pipelines.training import trained_on

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pipelines.train._calibrated = lambda *_: None  # takes longer than the training
    step = Task.training_step


    def one(rank, cube, run, steps, number, at, environment, trainer, settings):
        seen = []

        def mortal(self, batch, batch_idx):
            seen.append(batch_idx)
            if len(seen) == at:
                os.kill(os.getpid(), number)
            return step(self, batch, batch_idx)

        Task.training_step = mortal
        if environment:
            os.environ.update({"LOCAL_RANK": str(rank), "NODE_RANK": "0", **environment})
            rank_zero_only.rank = rank
            copies = settings.pop("copies")
            settings["strategy"] = (
                DDPStrategy(broadcast_buffers=False) if copies
                else ModelParallelStrategy(trainer["devices"], 1, save_distributed_checkpoint=False)
            )
        trained_on(cube, run, steps, trainer, **settings)


    for line in sys.stdin:
        processes, *told = json.loads(line)
        children = []
        for rank in range(processes):
            children.append(os.fork())
            if not children[-1]:
                try:
                    one(rank, *told)
                except KeyboardInterrupt:
                    os._exit(130)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
        codes = {}
        while len(codes) < processes:
            child, status = os.wait()
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child]:  # the others would wait for it
                for other in set(children) - set(codes):
                    os.kill(other, signal.SIGKILL)
        print(json.dumps([codes[child] for child in children]), flush=True)
    """
)


class Elsewhere:
    """Trains in other processes, forked from one that has everything imported: that takes the longest."""

    def __init__(self, server: subprocess.Popen):
        self.server = server

    def __call__(
        self, cube, run, steps, number=0, at=0, processes=1, environment=None, trainer=None, **settings
    ):
        """The exit code of each; each gets the signal `number` in its micro-batch number `at`."""
        told = [processes, str(cube), str(run), steps, int(number), at, environment, trainer or {}, settings]
        self.server.stdin.write(json.dumps(told) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def together(self, cube, run, steps, processes, copies=True, trainer=None, **settings):
        """One training shared by several processes, as torchrun would start them.

        Each has a copy of the network, or a share of it.
        """
        settings = {**settings, "copies": copies}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        trainer = {"devices": processes, **(trainer or {})}
        return self(
            cube, run, steps, processes=processes, environment=environment, trainer=trainer, **settings
        )


@contextmanager
def elsewhere() -> Iterator[Elsewhere]:
    """The process that forks them."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    with server:
        yield Elsewhere(server)
        server.stdin.close()
