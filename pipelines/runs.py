"""`ForecastStore`: forecast runs in an Icechunk repository, each a CF-1.11 group named by its init time."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from pipelines import cf
from pipelines.coordinates import (
    CONVENTIONS,
    TIME_UNITS,
    chunks,
    located,
    provenance,
    read_grid,
    seconds,
    write_grid,
)
from pipelines.grid import Grid
from pipelines.repository import Repository, create_array, store_array

RUN_NAME = "%Y%m%dT%H%M%SZ"
CONTENT = "forecast runs"
INPUT_AGE = "input_age_minutes"  # the attribute that tells how old the newest frame was at the init time
OWN_ATTRIBUTES = ("Conventions", "title", "history")
LARGE = 1500 * 1500  # cells; beyond, a run is computed and stored one lead time after the other
CHUNK_BYTES = 16 * 2**20  # of all lead times and thresholds of the cells of one chunk
SIDE = 256  # cells of a chunk


@dataclass(frozen=True)
class RunHeader:
    """What a run is about, before any of its fields."""

    init_time: datetime  # UTC; what was observed later is not known to the forecast
    grid: Grid
    lead_times: tuple[float, ...]  # minutes
    thresholds: tuple[float, ...]  # mm/h
    quantiles: tuple[float, ...]  # within (0, 1)
    attributes: Mapping[str, str]  # provenance: what made the run, from what

    def __post_init__(self) -> None:
        """Refuses what cannot be a run.

        Raises:
            ValueError: for a time that is not UTC or not a whole second, no lead times or thresholds,
                numbers that do not rise, are equal in six figures or lie outside their range, or attributes
                that the store sets itself.
        """
        if self.init_time.utcoffset() != timedelta(0) or self.init_time.microsecond:
            raise ValueError(f"init_time={self.init_time}: expected whole seconds in UTC")
        for name, values, top, unit in (
            ("lead_times", self.lead_times, math.inf, "of minutes above 0"),
            ("thresholds", self.thresholds, math.inf, "of mm/h above 0"),
            ("quantiles", self.quantiles, 1.0, "within 0..1, both excluded"),
        ):
            if not values or any(b <= a for a, b in pairwise(values)):
                raise ValueError(f"{name}={values}: expected one or more rising numbers")
            if not all(0 < value < top for value in values):
                raise ValueError(f"{name}={values}: expected numbers {unit}")
            if len({f"{value:g}" for value in values}) < len(values):  # the names under which they are served
                raise ValueError(f"{name}={values}: expected numbers that differ in their first six figures")
        for name, value in self.attributes.items():
            if name in OWN_ATTRIBUTES or not isinstance(value, str):
                raise ValueError(f"attribute {name}={value!r}: expected text, and none of {OWN_ATTRIBUTES}")

    @property
    def name(self) -> str:
        """The name of the run's group."""
        return self.init_time.strftime(RUN_NAME)

    @property
    def observed_until(self) -> datetime:
        """The valid time (UTC) of the newest frame in it: before the init time where the source was late."""
        return self.init_time - timedelta(minutes=float(self.attributes.get(INPUT_AGE, "0")))


@dataclass(frozen=True, eq=False)
class RunBlock:
    """A part of a run: some lead times of some rows and columns. NaN is "no forecast"."""

    lead: slice
    y: slice
    x: slice
    exceedance: NDArray[np.float32]  # (lead, threshold, y, x), probability within 0..1
    quantile: NDArray[np.float32]  # (quantile, lead, y, x), mm/h
    median: NDArray[np.float32]  # (lead, y, x), mm/h
    mean: NDArray[np.float32]  # (lead, y, x), mm/h


class ForecastStore:
    """Forecast runs at one place, as they were when it was opened or last refreshed."""

    def __init__(self, repository: Repository):
        """Use `open` or `open_or_create`."""
        self.path = repository.path
        self._repository = repository
        self.snapshot = ""
        self.refresh()

    @classmethod
    def open(cls, path: str) -> "ForecastStore":
        """The forecasts at a local folder or URL.

        Raises:
            ValueError: if there are none, saying what is there instead.
        """
        return cls(Repository.open(path))

    @classmethod
    def open_or_create(cls, path: str) -> "ForecastStore":
        """The forecasts at a local folder or URL; a new store where nothing is.

        Raises:
            ValueError: if something else is there.
        """
        repository = Repository.open_or_create(path)

        def create(store: Any) -> None:
            root = zarr.open_group(store, mode="a", zarr_format=3)
            if "content" not in root.attrs and next(iter(root.group_keys()), None) is None:
                root.update_attributes({"content": CONTENT, "Conventions": CONVENTIONS})

        repository.commit("a forecast store", create)
        return cls(repository)

    def refresh(self) -> str:
        """Moves on to the newest snapshot and gives its id; later reads see it."""
        newest = self._repository.snapshot
        if newest != self.snapshot:
            try:
                root = zarr.open_group(self._repository.reader(newest), mode="r", zarr_format=3)
                content = root.attrs.get("content")
            except FileNotFoundError:
                content = None
            if content != CONTENT:
                raise ValueError(
                    f"{self.path}: an Icechunk repository, but not of forecasts; "
                    "give the path of forecasts that `metnet forecast` made"
                )
            self._root, self.snapshot = root, newest
            self._names = sorted(root.group_keys())
        return self.snapshot

    def names(self) -> list[str]:
        """The names of all runs, oldest first."""
        return list(self._names)

    def __contains__(self, name: str) -> bool:
        """Whether there is a run of this name."""
        return name in self._names

    def header(self, name: str) -> RunHeader:
        """What a run is about.

        Raises:
            ValueError: if there is no such run.
        """
        group = self._group(name)
        attributes = {key: str(value) for key, value in group.attrs.items() if key not in OWN_ATTRIBUTES}
        lead_times, thresholds, quantiles = (
            tuple(float(value) for value in np.asarray(group[axis][:]))  # type: ignore[index]
            for axis in ("lead_time", "threshold", "quantile")
        )
        init_time = datetime.strptime(name, RUN_NAME).replace(tzinfo=UTC)
        return RunHeader(init_time, read_grid(group), lead_times, thresholds, quantiles, attributes)

    def dataset(self, name: str) -> xr.Dataset:
        """A run as a CF dataset, read when it is used; `lead_time` is in minutes.

        Raises:
            ValueError: if there is no such run.
        """
        self._group(name)
        return self._repository.dataset(self.snapshot, name)

    def write_run(self, header: RunHeader, blocks: Iterable[RunBlock], replace: bool = False) -> str | None:
        """Writes a run in one commit and gives the snapshot id; None if the run is there already.

        With `replace` it takes the place of the one that is there, which earlier snapshots keep.

        Nobody sees a part of a run. Blocks may be of any size and come in any order, one at a time in
        memory; the fastest are whole chunks: all lead times of 256 x 256 cells or, on grids of more than
        1500 x 1500 cells, all cells of one lead time. What no block covers is NaN.

        Raises:
            ValueError: if a block does not fit the header; nothing is visible then.
        """

        def fill(group: zarr.Group) -> None:
            _create(group, header)
            for block in blocks:
                _store(group, header, block)

        snapshot = self._repository.add_group(header.name, f"run {header.name}", fill, replace)
        self.refresh()
        return snapshot

    def _group(self, name: str) -> zarr.Group:
        if name not in self._names:
            newest = f"the newest is {self._names[-1]}" if self._names else "there are none yet"
            raise ValueError(f"{self.path}: no run {name!r}; {newest}")
        group = self._root[name]
        if not isinstance(group, zarr.Group):
            raise ValueError(f"{self.path}: {name!r} is an array: expected a run")
        return group


def _create(group: zarr.Group, header: RunHeader) -> None:
    """An empty run: coordinates, and arrays of NaN."""
    title = f"rain forecast from {header.init_time:%Y-%m-%dT%H:%M:%SZ}"
    group.update_attributes({**header.attributes, **provenance(title)})
    write_grid(group, header.grid)
    _write_axes(group, header)
    leads, thresholds, quantiles = len(header.lead_times), len(header.thresholds), len(header.quantiles)
    lead_chunk, cells = _chunks(header)
    times = ("valid_time", "forecast_reference_time")
    field = (("lead_time", "y", "x"), (leads, *header.grid.shape), (lead_chunk, *cells))
    for variable in (cf.RAINFALL_RATE_MEDIAN, cf.RAINFALL_RATE_MEAN):
        dimensions, shape, chunk = field
        create_array(
            group, variable.name, dimensions, shape, "f4", located(variable.attributes(), *times), chunk
        )
    create_array(
        group,
        cf.RAINFALL_RATE_QUANTILE.name,
        ("quantile", "lead_time", "y", "x"),
        (quantiles, leads, *header.grid.shape),
        "f4",
        located(cf.RAINFALL_RATE_QUANTILE.attributes(), *times),
        (quantiles, lead_chunk, *cells),
    )
    create_array(
        group,
        cf.PROBABILITY_OF_EXCEEDANCE.name,
        ("lead_time", "threshold", "y", "x"),
        (leads, thresholds, *header.grid.shape),
        "f4",
        located(cf.PROBABILITY_OF_EXCEEDANCE.attributes(), *times),
        (lead_chunk, thresholds, *cells),
    )


def _write_axes(group: zarr.Group, header: RunHeader) -> None:
    """Lead times, thresholds, quantiles and times."""
    init = seconds(header.init_time)
    leads = np.array(header.lead_times, np.float64)
    store_array(
        group,
        "lead_time",
        ("lead_time",),
        leads,
        {
            "standard_name": "forecast_period",
            "long_name": "time from the init time to the valid time",
            "units": "minutes",
        },
    )
    threshold = {
        "standard_name": "rainfall_rate",
        "long_name": "threshold of the rain rate",
        "units": "mm h-1",
    }
    store_array(group, "threshold", ("threshold",), np.array(header.thresholds, np.float64), threshold)
    quantile = {"long_name": "probability that the rain rate is at or below the value", "units": "1"}
    store_array(group, "quantile", ("quantile",), np.array(header.quantiles, np.float64), quantile)
    store_array(
        group,
        "valid_time",
        ("lead_time",),
        init + np.rint(60 * leads).astype("i8"),
        {"standard_name": "time", "long_name": "time that the forecast is for", **TIME_UNITS},
    )
    store_array(
        group,
        "forecast_reference_time",
        (),
        np.array(init, "i8"),
        {
            "standard_name": "forecast_reference_time",
            "long_name": "init time",
            **TIME_UNITS,
        },
    )


def _chunks(header: RunHeader) -> tuple[int, tuple[int, int]]:
    """Lead times, and rows and columns, of a chunk: all lead times of a place lie together on small grids."""
    if header.grid.y_size * header.grid.x_size > LARGE:
        return 1, chunks(header.grid, 2 * SIDE)
    leads, side = len(header.lead_times), SIDE
    layers = leads * max(len(header.thresholds), len(header.quantiles))
    while 4 * layers * side**2 > CHUNK_BYTES and side > 32:
        side //= 2
    return leads, chunks(header.grid, side)


def _store(group: zarr.Group, header: RunHeader, block: RunBlock) -> None:
    """Writes one block."""
    leads = len(range(len(header.lead_times))[block.lead])
    cells = (len(range(header.grid.y_size)[block.y]), len(range(header.grid.x_size)[block.x]))
    places = (block.y, block.x)
    for variable, values, shape, region in (
        (
            cf.PROBABILITY_OF_EXCEEDANCE,
            block.exceedance,
            (leads, len(header.thresholds), *cells),
            (block.lead, slice(None), *places),
        ),
        (
            cf.RAINFALL_RATE_QUANTILE,
            block.quantile,
            (len(header.quantiles), leads, *cells),
            (slice(None), block.lead, *places),
        ),
        (cf.RAINFALL_RATE_MEDIAN, block.median, (leads, *cells), (block.lead, *places)),
        (cf.RAINFALL_RATE_MEAN, block.mean, (leads, *cells), (block.lead, *places)),
    ):
        if values.shape != shape:
            raise ValueError(f"{variable.name} of shape {values.shape} in a block of {shape}")
        group[variable.name][region] = values  # type: ignore[index]
