"""`Forecasts`: the only reader of a forecast store; every answer comes from one snapshot of it."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pipelines import cf
from pipelines.frame import iso
from pipelines.runs import ForecastStore, RunHeader
from serve import geometry
from serve.outline import Ring, bounds_of, outline_of
from serve.problems import Problem

logger = logging.getLogger(__name__)

LATEST = "latest"
"""The name under which clients ask for the newest run."""

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Quantity:
    """One field of a run at each lead time."""

    name: str
    label: str  # as a person would say it
    kind: Literal["rate", "probability"]
    units: str  # of CF: mm h-1, or 1 for a probability
    array: str  # the store's array that holds it
    member: tuple[str, int] | None = None  # dimension and index within that array, where it has more


@dataclass(frozen=True)
class Cell:
    """The cell of a grid that holds a place."""

    row: int
    column: int
    lon: float  # degrees, of the cell's centre
    lat: float


@dataclass(frozen=True, eq=False)
class Run:
    """One run, as one snapshot of the store holds it."""

    name: str
    snapshot: str
    stale: bool  # its newest observation is older than the server's limit
    header: RunHeader
    view: "_View" = field(repr=False)

    @property
    def dataset(self) -> xr.Dataset:
        """The run's arrays, read when they are used.

        Raises:
            Problem: 503 if the store cannot be read.
        """
        with _reading():
            return self.view.dataset(self.name)

    @property
    def degraded(self) -> bool:
        """Whether past frames were missing when it was made."""
        return self.header.attributes.get("degraded") == "true"

    @property
    def stamp(self) -> dict[str, str | bool]:
        """What every answer of it tells: which run, and what it rests on."""
        return {
            "run": self.name,
            "init_time": iso(self.header.init_time),
            "observed_until": iso(self.header.observed_until),
            "stale": self.stale,
            "degraded": self.degraded,
        }

    @cached_property
    def quantities(self) -> Mapping[str, Quantity]:
        """What can be asked for, by name."""
        listed = [
            *(_exceedance(index, value) for index, value in enumerate(self.header.thresholds)),
            _rate(cf.RAINFALL_RATE_MEDIAN, "Median rain rate"),
            _rate(cf.RAINFALL_RATE_MEAN, "Mean rain rate"),
            *(_quantile(index, level) for index, level in enumerate(self.header.quantiles)),
        ]
        return {quantity.name: quantity for quantity in listed}

    @cached_property
    def valid_times(self) -> list[datetime]:
        """UTC, one for each lead time."""
        return [self.header.init_time + timedelta(minutes=lead) for lead in self.header.lead_times]

    @cached_property
    def outline(self) -> Ring:
        """The rim of the domain: a closed ring of longitude and latitude, running on past 180 degrees."""
        return outline_of(self.header.grid)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east and north of the domain, in degrees; west is above east across 180 degrees."""
        return bounds_of(self.outline)

    def quantity(self, name: str) -> Quantity:
        """The quantity of that name.

        Raises:
            Problem: 404 if the run has none.
        """
        if name not in self.quantities:
            raise Problem(404, f"no such quantity; this run has {', '.join(self.quantities)}")
        return self.quantities[name]

    def lead(self, minutes: str) -> int:
        """The index of a lead time that a client wrote in minutes.

        Raises:
            Problem: 404 if the run has none.
        """
        leads = [f"{lead:g}" for lead in self.header.lead_times]
        if minutes not in leads:
            raise Problem(404, f"no such lead time; this run has {', '.join(leads)} (minutes)")
        return leads.index(minutes)

    def cell(self, lon: float, lat: float) -> Cell:
        """The cell that holds a place (degrees).

        Raises:
            Problem: 400 if the place is outside the domain.
        """
        grid = self.header.grid
        row, column = (float(part) for part in geometry.cells(grid, lon, lat))
        inside = -0.5 <= row < grid.y_size - 0.5 and -0.5 <= column < grid.x_size - 0.5
        if not inside:
            west, south, east, north = self.bounds
            across = " (across 180)" if west > east else ""
            raise Problem(
                400,
                "the place is outside the domain of the forecast, which lies within "
                f"{west:.2f}..{east:.2f} east{across} and {south:.2f}..{north:.2f} north",
            )
        row_index, column_index = int(np.floor(row + 0.5)), int(np.floor(column + 0.5))
        centre_lon, centre_lat = geometry.lonlat(grid.window(row_index, column_index, 1, 1))
        return Cell(
            row_index, column_index, round(float(centre_lon[0, 0]), 5), round(float(centre_lat[0, 0]), 5)
        )

    def series(self, cell: Cell) -> dict[str, Values]:
        """Every quantity by lead time at one cell; NaN is "no forecast".

        Raises:
            Problem: 503 if the store cannot be read.
        """
        arrays = self.dataset.variables
        with _reading():
            here = {
                array: arrays[array].isel(y=cell.row, x=cell.column).load()
                for array in {quantity.array for quantity in self.quantities.values()}
            }
        return {
            name: _member(here[quantity.array], quantity).values for name, quantity in self.quantities.items()
        }


class Forecasts:
    """The runs of a forecast store, newest snapshot first, fields kept decoded."""

    def __init__(
        self,
        path: str,
        stale_after: timedelta = timedelta(hours=1),
        poll: timedelta = timedelta(seconds=1),
        cache_bytes: int = 512 * 2**20,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Opens the store.

        A run is stale when the newest observation in it is longer ago than `stale_after`; the store is asked
        for a newer snapshot at most once in each `poll`.

        Raises:
            ValueError: if there is no forecast store at `path`.
        """
        self._path = path
        self._stale_after = stale_after
        self._poll = poll.total_seconds()
        self._clock = clock
        self._watch = ForecastStore.open(path)  # moves on with the store; the view's own one never does
        self._view = _View.of(ForecastStore.open(path))
        self._next_poll = time.monotonic() + self._poll
        self._polling = threading.Lock()
        self._fields = _FieldCache(cache_bytes)
        self.reachable = True  # whether the last look at the store succeeded

    def run(self, name: str = LATEST) -> Run:
        """The run of that name, or the newest.

        Raises:
            Problem: 404 if there is none, 503 if the store cannot be read.
        """
        view = self._current()
        if name == LATEST and view.names:
            name = view.names[-1]
        if name not in view.names:
            raise Problem(404, "no such run; /runs lists those there are")
        return self._run(view, name)

    def newest(self, count: int) -> tuple[str, list[Run]]:
        """The snapshot's id, and its newest runs, the newest first."""
        view = self._current()
        return view.snapshot, [self._run(view, name) for name in reversed(view.names[-count:])]

    def field(self, run: Run, quantity: Quantity, lead: int) -> Values:
        """A quantity of the run at the lead time of that index, (y, x); NaN is "no forecast".

        Raises:
            Problem: 503 if the store cannot be read.
        """
        key = (run.snapshot, run.name, quantity.name, lead)
        return self._fields.get(key, lambda: _read(run, quantity, lead, self._fields.limit // 4))

    def _run(self, view: "_View", name: str) -> Run:
        with _reading():
            header = view.header(name)
        stale = self._clock() - header.observed_until > self._stale_after
        return Run(name, view.snapshot, stale, header, view)

    def _current(self) -> "_View":
        """The newest snapshot that was seen; one caller looks for a newer one, the others do not wait."""
        if time.monotonic() >= self._next_poll and self._polling.acquire(blocking=False):
            try:
                if self._watch.refresh() != self._view.snapshot:
                    self._view = _View.of(ForecastStore.open(self._path))
                if not self.reachable:
                    logger.warning("the forecast store can be read again")
                self.reachable = True
            except Exception as error:  # whatever a disk or an object store may raise
                if self.reachable:  # told once; the last snapshot still holds
                    _tell("the forecast store cannot be read; serving its last snapshot", error)
                self.reachable = False
            finally:
                self._next_poll = time.monotonic() + self._poll
                self._polling.release()
        return self._view


@dataclass(frozen=True, eq=False)
class _View:
    """One snapshot of the store; what was read of its runs is kept as long as it is.

    The newest run's header is read at once, so that its age can be told without the store.
    """

    snapshot: str
    names: tuple[str, ...]
    store: ForecastStore
    headers: dict[str, RunHeader] = field(default_factory=dict)
    datasets: dict[str, xr.Dataset] = field(default_factory=dict)

    @classmethod
    def of(cls, store: ForecastStore) -> "_View":
        view = cls(store.snapshot, tuple(store.names()), store)
        for name in view.names[-1:]:
            view.header(name)
        return view

    def header(self, name: str) -> RunHeader:
        if name not in self.headers:
            self.headers[name] = self.store.header(name)
        return self.headers[name]

    def dataset(self, name: str) -> xr.Dataset:
        if name not in self.datasets:
            self.datasets[name] = self.store.dataset(name)
        return self.datasets[name]


FieldKey = tuple[str, str, str, int]


class _FieldCache:
    """Fields by (snapshot, run, quantity, lead); the longest unused go first; each is read once at a time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes
        self._held = 0
        self._fields: OrderedDict[FieldKey, Values] = OrderedDict()
        self._reading: dict[FieldKey, Future[Values]] = {}
        self._lock = threading.Lock()

    def get(self, key: FieldKey, read: Callable[[], dict[FieldKey, Values]]) -> Values:
        with self._lock:
            if key in self._fields:
                self._fields.move_to_end(key)
                return self._fields[key]
            reader = key not in self._reading
            answer = self._reading.setdefault(key, Future())
        if reader:
            self._fill(key, answer, read)
        return answer.result()

    def _fill(
        self, key: FieldKey, answer: "Future[Values]", read: Callable[[], dict[FieldKey, Values]]
    ) -> None:
        try:
            fields = read()
            with self._lock:
                self._keep(fields)
            answer.set_result(fields[key])
        except Exception as error:
            answer.set_exception(error)
        finally:
            with self._lock:
                del self._reading[key]

    def _keep(self, fields: dict[FieldKey, Values]) -> None:
        for key, values in fields.items():
            if key not in self._fields:
                self._fields[key] = values
                self._held += values.nbytes
        while self._held > self.limit and self._fields:
            _, dropped = self._fields.popitem(last=False)
            self._held -= dropped.nbytes


def _read(run: Run, quantity: Quantity, lead: int, budget: int) -> dict[FieldKey, Values]:
    """The field, and with it the others that lie in the same chunks, if all fit into `budget` bytes."""
    array = run.dataset.variables[quantity.array]
    chunks = dict(zip(array.dims, array.encoding.get("chunks") or array.shape, strict=True))
    leads = _chunk_around(lead, chunks["lead_time"], array.sizes["lead_time"])
    siblings = [q for q in run.quantities.values() if q.array == quantity.array]
    if array.sizes["y"] * array.sizes["x"] * 4 * len(leads) * len(siblings) > budget:
        leads, siblings = range(lead, lead + 1), [quantity]
    block = array.isel(lead_time=slice(leads.start, leads.stop))
    if len(siblings) == 1:
        block = _member(block, quantity)
    with _reading():
        block = block.load()
    fields = {}
    for sibling in siblings:
        member = block if len(siblings) == 1 else _member(block, sibling)
        for index, values in zip(leads, member.values, strict=True):
            fields[run.snapshot, run.name, sibling.name, index] = np.array(values, np.float32)
    return fields


@contextmanager
def _reading() -> Iterator[None]:
    """Tells clients, and the log in one line, what a store does not give at this moment.

    Raises:
        Problem: 503, whatever the disk or the object store raised.
    """
    try:
        yield
    except Exception as error:
        _tell("a forecast cannot be read from its store", error)
        raise Problem(503, "the forecast cannot be read from its store at this moment; ask again") from error


def _tell(what: str, error: Exception) -> None:
    """A warning of one line; with --debug the traceback too."""
    debugging = logger.isEnabledFor(logging.DEBUG)
    logger.warning("%s (%s: %s)", what, type(error).__name__, error, exc_info=debugging)


def _chunk_around(index: int, chunk: int, size: int) -> range:
    first = index - index % chunk
    return range(first, min(first + chunk, size))


def _member(array: xr.Variable, quantity: Quantity) -> xr.Variable:
    """The part of an array that is one quantity; (lead_time, y, x), as far as these are left."""
    return array if quantity.member is None else array.isel({quantity.member[0]: quantity.member[1]})


def _exceedance(index: int, threshold: float) -> Quantity:
    variable = cf.PROBABILITY_OF_EXCEEDANCE
    name, label = f"{variable.name}_{threshold:g}", f"Probability of {threshold:g} mm/h or more"
    return Quantity(name, label, "probability", variable.units, variable.name, ("threshold", index))


def _quantile(index: int, level: float) -> Quantity:
    variable = cf.RAINFALL_RATE_QUANTILE
    name, label = f"{variable.name}_{level:g}", f"{100 * level:g} % quantile of the rain rate"
    return Quantity(name, label, "rate", variable.units, variable.name, ("quantile", index))


def _rate(variable: cf.Variable, label: str) -> Quantity:
    return Quantity(variable.name, label, "rate", variable.units, variable.name)


def number(value: float) -> float | None:
    """A float32 in six figures for JSON; None is "no forecast"."""
    return None if np.isnan(value) else float(f"{value:.6g}")
