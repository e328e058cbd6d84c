"""The benchmark of a forecast's speed: every arm forecasts the same past, and what is counted is what is said."""

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from benchmarks.forecast_speed import ARMS, LEADS, Cost, alone, cost, past, table, typical
from metnet.batch import Batch
from metnet.rain import EnsembleForecast
from pipelines.cf import RAINFALL_RATE
from pipelines.cube import Cube
from pipelines.frame import Frame
from pipelines.grid import Grid

SIDE, START, CADENCE = 64, datetime(2024, 6, 1, tzinfo=UTC), timedelta(minutes=5)


def a_batch():
    return Batch(
        torch.zeros(1, 4, 8, 8),
        torch.tensor([[15.0, 10.0, 5.0, 0.0]]),
        torch.tensor([0]),
        torch.tensor(LEADS),
        torch.tensor([1000.0]),
    )


def test_work_counts_as_cpu_time_and_what_is_kept_as_memory():
    def busy(batch):
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
        filled = torch.ones(1, 12, 1024, 1024) * 0.1
        return EnsembleForecast(filled[None, :, :, :8, :8])

    spent = cost(busy, a_batch())
    assert spent.cpu >= 0.05
    assert spent.peak >= spent.before > 0
    assert spent.wet == 1.0
    assert cost(lambda _: EnsembleForecast(torch.zeros(1, 1, 12, 8, 8)), a_batch()).wet == 0.0


def test_the_table_compares_cpu_times_with_the_first_arm_by_medians():
    ours = typical([Cost(3.0, 5.0, 900.0, 250.0, 0.25), Cost(9.0, 4.0, 800.0, 260.0, 0.25)])
    assert ours == Cost(6.0, 4.5, 850.0, 255.0, 0.25)
    lines = table({"model": ours, "STEPS": replace(ours, cpu=90.0)}).splitlines()
    assert lines[2] == "| model | 6.00 | 4.50 | 1.00 | 850 | 255 | 25.0% |"
    assert lines[3].split(" | ")[1:4] == ["6.00", "90.00", "20.00"]


@pytest.fixture
def cube(tmp_path):
    """Two hours of showers that drift."""
    grid = Grid("EPSG:3035", 4e6, 1000.0, SIDE, 3e6, -1000.0, SIDE)
    made = Cube.open_or_create(str(tmp_path / "cube"), grid, RAINFALL_RATE, START, CADENCE)
    noise = gaussian_filter(np.random.default_rng(0).normal(size=(SIDE, SIDE)), 3, mode="wrap")
    rain = np.maximum(60 * noise, 0).astype(np.float32)
    frames = [np.roll(rain, i, axis=1) for i in range(24)]
    made.write(
        [
            Frame(RAINFALL_RATE, START + i * CADENCE, CADENCE, grid, field, "noise", f"{i + 1:064x}")
            for i, field in enumerate(frames)
        ]
    )
    return made.path


def test_the_past_has_the_frames_and_lead_times_of_all_arms_and_the_side_that_is_asked_for(cube):
    batch = past(cube, 40)
    assert batch.radar.shape == (1, 4, 40, 40)
    assert batch.age.tolist() == [[15.0, 10.0, 5.0, 0.0]]
    assert tuple(batch.lead_time.tolist()) == LEADS
    assert batch.motion is None, "which every arm has to find"


@pytest.mark.slow
def test_an_arm_in_a_process_of_its_own_makes_the_forecast_that_it_makes_here(cube):
    here = cost(ARMS["extrapolation"](""), past(cube, 48))
    there = alone("extrapolation", "", cube, 48, 1)
    assert 0 < there.wet < 1
    assert there.wet == pytest.approx(here.wet)
    assert there.cpu > 0
