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

from pipelines.cf import RAINFALL_RATE
from pipelines.construct import construct
from pipelines.cube import Cube
from pipelines.frame import Frame
from pipelines.grid import Grid
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
    "validation_samples": 3,
    "leads_per_step": 2,
    "learning_rate": 0.01,
    "pictures": False,
}


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
