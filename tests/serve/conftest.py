"""A forecast store with known numbers, and the service over it."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from pipelines.grid import Grid
from pipelines.runs import ForecastStore, RunBlock, RunHeader
from serve.app import create_app
from serve.forecasts import Forecasts

INIT = datetime(2019, 6, 10, 0, 30, tzinfo=UTC)
LEADS = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0)  # minutes
THRESHOLDS = (0.1, 1.0, 2.0, 5.0, 10.0)  # mm/h
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)

EUROPE = Grid("EPSG:3035", 3_900_000.0, 8000.0, 128, 3_300_000.0, -8000.0, 128)


def storm(grid: Grid, lead: int, seed: int = 0) -> np.ndarray:
    """Rain cells (mm/h) that drift east and grow, on (y, x); NaN in the south-east corner: not forecast."""
    y, x = np.mgrid[0 : grid.y_size, 0 : grid.x_size] / np.array(grid.shape)[:, None, None]
    dice = np.random.default_rng(seed)
    rate = np.zeros(grid.shape)
    for _ in range(40):
        row, column = dice.uniform(0, 1, 2)
        size, strength = dice.uniform(0.012, 0.06), dice.gamma(2.0, 4.0)
        distance = (y - row - 0.006 * lead) ** 2 + (0.6 * (x - column - 0.02 * lead)) ** 2
        rate += strength * (1 + 0.05 * lead) * np.exp(-distance / (2 * size**2))
    rate[rate < 0.02] = 0.0
    rate[(y > 0.8) & (x > 0.75)] = np.nan
    return rate.astype(np.float32)


def block(grid: Grid, seed: int = 0) -> RunBlock:
    """A whole run whose rain is exponentially distributed about `storm`."""
    mean = np.stack([storm(grid, lead, seed) for lead in range(len(LEADS))])
    scale = np.where(mean > 0, mean, 1)
    wet = np.where(np.isnan(mean), np.nan, mean > 0)
    above = [wet * np.exp(-threshold / scale) for threshold in THRESHOLDS]
    below = [-mean * np.log1p(-level) for level in QUANTILES]
    everywhere = slice(0, len(LEADS)), slice(0, grid.y_size), slice(0, grid.x_size)
    return RunBlock(
        *everywhere,
        exceedance=np.stack(above, axis=1).astype(np.float32),
        quantile=np.stack(below).astype(np.float32),
        median=(mean * np.log(2)).astype(np.float32),
        mean=mean,
    )


def write(
    path: Path,
    init_time: datetime = INIT,
    grid: Grid = EUROPE,
    seed: int = 0,
    facts: Mapping[str, str] | None = None,
) -> RunBlock:
    """Writes a run to the store at `path`, made if need be, and gives what was written."""
    attributes = {"model": "a test", "input_cube": "/home/me/cube", **(facts or {})}
    header = RunHeader(init_time, grid, LEADS, THRESHOLDS, QUANTILES, attributes)
    written = block(grid, seed)
    ForecastStore.open_or_create(str(path)).write_run(header, [written])
    return written


@dataclass
class Clock:
    """A clock that the test sets."""

    now: datetime

    def __call__(self) -> datetime:
        return self.now


@dataclass(frozen=True)
class Client:
    """Asks the app without a socket."""

    app: FastAPI

    def get(self, url: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """The answer to a GET."""
        return self.request("GET", url, headers)

    def request(self, method: str, url: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """The answer to any request."""
        return asyncio.run(self._request(method, url, headers))

    async def _request(self, method: str, url: str, headers: Mapping[str, str] | None) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, url, headers=headers)


@dataclass(frozen=True, repr=False)
class Service:
    """The service over one known run."""

    path: Path
    written: RunBlock
    clock: Clock
    forecasts: Forecasts
    client: Client


def service_at(path: Path, grid: Grid = EUROPE) -> Service:
    """A store with one run, and the service over it."""
    written = write(path, grid=grid)
    clock = Clock(INIT + timedelta(minutes=12))
    forecasts = Forecasts(str(path), poll=timedelta(0), clock=clock)
    return Service(path, written, clock, forecasts, Client(create_app(forecasts)))


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    """For tests that only ask."""
    return service_at(tmp_path_factory.mktemp("serve") / "forecasts")


@pytest.fixture
def own_service(tmp_path: Path) -> Service:
    """For tests that write runs or set the clock."""
    return service_at(tmp_path / "forecasts")
