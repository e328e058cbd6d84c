"""`export`: frames, static fields or a run, as one plain Zarr v3 store or one NetCDF-4 file (CF-1.11).

The numbers are the stored ones, bit for bit. Frames are laid out as the mlcast community asks of radar data
(mlcast-dataset-validator, source data, 0.2.0): time y x, one chunk a step, only steps that have a frame, and
the steps of the regular axis that have none in `missing_times`.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import netCDF4
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ZarrUserWarning

from pipelines.cf import SUMS
from pipelines.coordinates import TIME_UNITS, grid_mapping, seconds
from pipelines.counts import plain_attributes, unpacked
from pipelines.cube import RADAR, STATIC, STATISTICS, Cube
from pipelines.destination import folder, replace_folder, untaken
from pipelines.frame import parse_interval
from pipelines.manifest import NAME, Manifest
from pipelines.progress import track
from pipelines.repository import COMPRESSORS, Repository
from pipelines.runs import CONTENT, ForecastStore
from pipelines.version import version

SUFFIXES = {".zarr": "a Zarr store", ".nc": "a NetCDF file"}
SIDE = 256  # cells of a chunk of a NetCDF file
BOUNDS = "time_bounds"
TIME = "%Y-%m-%dT%H:%M:%SZ"
TYPED = ("valid_range", "flag_values", "flag_masks")  # attributes of the type of their array (CF-1.11, 2.5.1)

Region = tuple[int | slice, ...]


@dataclass(frozen=True)
class Exported:
    """What an export left behind."""

    path: str
    contents: str  # what is in it, in words
    size: int  # bytes

    def __str__(self) -> str:
        """For a person at a terminal."""
        return f"{self.path}: {self.contents}, {self.size / 1e6:.1f} MB"


def export(
    path: str,
    to: str,
    group: str = RADAR,
    run: str | None = None,
    start: str | None = None,
    end: str | None = None,
    license: str | None = None,
) -> Exported:
    """Writes a group of a cube, or a run of a forecast store, whole or not at all, to a place of its own.

    One field is in memory at a time.

    Args:
        path: folder or URL of a cube or of forecasts.
        to: a folder that ends in .zarr, or a file that ends in .nc.
        group: of a cube: frames such as "radar", or "static".
        run: of forecasts: the name of a run; None: the newest.
        start: the first valid time of frames, ISO 8601, UTC; None: the first there is.
        end: the last one; None: the last there is.
        license: SPDX identifier of the licence that the data are under, such as CC-BY-4.0.

    Raises:
        ValueError: if there is no such group, run or frame, or something is at `to` already.
    """
    target = _target(to)
    repository = Repository.open(path)
    snapshot = repository.snapshot
    try:
        root = zarr.open_group(repository.reader(snapshot), mode="r", zarr_format=3)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: nothing was written here yet; fill it with metnet ingest") from error
    holds_runs = root.attrs.get("content") == CONTENT
    if (holds_runs or group == STATIC) and (start is not None or end is not None):
        raise ValueError(f"start={start}, end={end}: choose from frames, and there are none in what is asked")
    if run is not None and not holds_runs:
        raise ValueError(f"run={run}: {path} holds no forecasts; choose a group of the cube by group=")
    if holds_runs:
        contents = _run(ForecastStore.open(path), run)
    elif group == STATIC:
        contents = _static(path, snapshot, root)
    else:
        contents = _frames(Cube.open(path, group), start, end)
    if license is not None:
        contents.attributes["license"] = license
    _write(contents, target)
    return Exported(to, contents.told, _size(target))


def export_run(store: ForecastStore, name: str, to: str) -> None:
    """Writes a run to a NetCDF file or Zarr store, whole or not at all; one there before is replaced.

    Raises:
        ValueError: if there is no such run, or `to` is no place for one (`place_of_run`).
    """
    _write(_run(store, name), place_of_run(to), replace=True)


def place_of_run(to: str) -> Path:
    """The place that `export=` names: nothing is there yet, or a file, or a store that holds a run.

    Raises:
        ValueError: if it is not of a kind that is written, or something else is there.
    """
    place = _of_a_kind("export", to)
    folder(f"export={to}: its folder", str(place.parent))
    if place.is_symlink() and not place.exists():
        raise ValueError(f"export={to}: is a link to nothing; remove it, or give another place")
    if place.exists() and place.is_dir() != (place.suffix == ".zarr"):
        raise ValueError(f"export={to}: is a {'folder' if place.is_dir() else 'file'}; give another place")
    if place.is_dir() and any(place.iterdir()) and not _holds_a_run(place):
        raise ValueError(f"export={to}: a folder without an exported run; remove it, or give another place")
    return place


def _holds_a_run(store: Path) -> bool:
    """Whether it is what `export_run` leaves."""
    try:
        root = json.loads((store / "zarr.json").read_bytes())
        return bool("chunk_list" in root["attributes"]) and (store / "forecast_reference_time").is_dir()
    except (OSError, ValueError, KeyError, TypeError):
        return False


@dataclass(frozen=True, eq=False)
class _Part:
    """One array to be written, and where its values come from, a field at most at a time."""

    name: str
    dimensions: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attributes: dict[str, Any]
    regions: Sequence[Region]
    read: Callable[[int], NDArray[Any]]  # the values of a region, by its number

    @property
    def is_field(self) -> bool:
        """Whether it lies on the grid and is no coordinate of it."""
        return self.dimensions[-2:] == ("y", "x") and self.name not in ("lat", "lon")


@dataclass(frozen=True, eq=False)
class _Contents:
    """All that is to be written."""

    told: str  # what it is, in words
    attributes: dict[str, Any]
    parts: list[_Part]


def _frames(cube: Cube, start: str | None, end: str | None) -> _Contents:
    """The frames of a cube within [start, end], their flags, and what is known of each."""
    times = np.array([seconds(time) for time in cube.times], np.int64)
    low, high = (None if time is None else seconds(time) for time in parse_interval(start, end))
    asked = np.ones(times.shape, np.bool_)
    asked &= (times >= low) if low is not None else True
    asked &= (times <= high) if high is not None else True
    held, missing = np.flatnonzero(asked & cube.observed), times[asked & ~cube.observed]
    if not held.size:
        span = f"{cube.times[0]:{TIME}} to {cube.times[-1]:{TIME}}" if cube.times else "no time at all"
        raise ValueError(
            f"{cube.path}: the group {cube.group!r} has no frame within start={start}, end={end}; "
            f"its time axis has {span}"
        )
    group = _group(cube.path, cube.snapshot, cube.group)
    parts = [
        _frames_part(name, array, held, cube.variable.name)
        for name, array in _arrays(group)
        if name not in STATISTICS
    ]
    if (interval := SUMS.get(cube.variable.name)) is not None:
        ends = times[held]
        bounds = np.stack([ends - int(interval.total_seconds()), ends], axis=1)
        parts.append(_made(BOUNDS, ("time", "bounds"), bounds, {}))  # in the units of the time itself
    if missing.size:
        about = {"standard_name": "time", "long_name": "steps of the time axis without a frame", **TIME_UNITS}
        parts.append(_made("missing_times", ("missing_times",), missing, about))
    step = f"PT{int(cube.cadence.total_seconds())}S"
    attributes = _attributes(group, cube.path, cube.snapshot)
    attributes |= {  # Attribute Convention for Data Discovery 1.3
        "time_coverage_start": _iso(times[asked][0]),
        "time_coverage_end": _iso(times[asked][-1]),
        "time_coverage_resolution": step,
    }
    told = f"{held.size} frames of {cube.variable.name}, {missing.size} steps without one"
    return _Contents(told, attributes, parts)


def _frames_part(name: str, array: "zarr.Array[Any]", held: NDArray[np.int64], field: str) -> _Part:
    """An array of a cube, at the steps that have a frame."""
    dimensions = _dimensions(array)
    attributes = dict(array.attrs)
    if name == "time":
        attributes = {key: value for key, value in attributes.items() if key not in ("start", "cadence")}
        attributes |= {"bounds": BOUNDS} if field in SUMS else {}
    if name == "arrival_time":
        attributes.pop("missing_value", None)  # every frame has arrived
    if name == field:
        # Not the checksums: their bytes are no dimension of the field (CF-1.11, appendix I).
        attributes["ancillary_variables"] = "quality_flag arrival_time decoder"
        attributes |= {"cell_methods": "time: sum"} if field in SUMS else {}
    if dimensions[:1] != ("time",):
        return _copied(name, array, attributes)
    if dimensions == ("time", "y", "x"):
        return _steps(name, array, attributes, 0, held)
    values = np.asarray(array[:])[held]
    # Time stands right of what is no place or time (CF-1.11, section 2.4).
    return _made(name, dimensions[::-1], values.T, attributes)


def _static(path: str, snapshot: str, root: zarr.Group) -> _Contents:
    """All fields without a time."""
    group = root.get(STATIC)
    if not isinstance(group, zarr.Group):
        raise ValueError(
            f"{path}: has no static fields; write some with metnet ingest source=etopo, for example"
        )
    parts = [_copied(name, array, dict(array.attrs)) for name, array in _arrays(group)]
    names = ", ".join(part.name for part in parts if part.is_field)
    return _Contents(f"static fields {names}", _attributes(group, path, snapshot), parts)


def _run(store: ForecastStore, run: str | None) -> _Contents:
    """A run, all of it."""
    if run is None and not store.names():
        raise ValueError(f"{store.path}: holds no run; make one with metnet forecast")
    name = store.names()[-1] if run is None else run
    header = store.header(name)
    group = _group(store.path, store.snapshot, name)
    leads = np.arange(len(header.lead_times))
    parts = [
        _steps(label, array, dict(array.attrs), dimensions.index("lead_time"), leads)
        if "lead_time" in (dimensions := _dimensions(array)) and dimensions[-2:] == ("y", "x")
        else _copied(label, array, dict(array.attrs))
        for label, array in _arrays(group)
    ]
    told = f"run {name}, {leads.size} lead times"
    return _Contents(told, _attributes(group, store.path, store.snapshot), parts)


def _copied(name: str, array: "zarr.Array[Any]", attributes: dict[str, Any]) -> _Part:
    """An array that is written at once."""
    if name == "crs":
        wkt = attributes["crs_wkt"]
        attributes |= {**grid_mapping(wkt), "spatial_ref": wkt}  # as GDAL calls it
    everything: Region = (slice(None),) * array.ndim
    return _Part(
        name,
        _dimensions(array),
        array.shape,
        array.dtype,
        attributes,
        [everything],
        lambda _: np.asarray(array[...]),
    )


def _made(name: str, dimensions: tuple[str, ...], values: NDArray[Any], attributes: dict[str, Any]) -> _Part:
    """An array of values that are at hand."""
    everything: Region = (slice(None),) * values.ndim
    return _Part(name, dimensions, values.shape, values.dtype, attributes, [everything], lambda _: values)


def _steps(
    name: str, array: "zarr.Array[Any]", attributes: dict[str, Any], axis: int, chosen: NDArray[np.int64]
) -> _Part:
    """An array that is written index by index of one dimension, those chosen; counts as their values."""
    before: Region = (slice(None),) * axis
    factor: Any = attributes.get("scale_factor")

    def read(number: int) -> NDArray[Any]:
        values = np.asarray(array[(*before, int(chosen[number]))])
        return values if factor is None else unpacked(values, factor)

    shape = (*array.shape[:axis], chosen.size, *array.shape[axis + 1 :])
    return _Part(
        name,
        _dimensions(array),
        shape,
        array.dtype if factor is None else np.dtype(np.float32),
        plain_attributes(attributes),
        [(*before, number) for number in range(chosen.size)],
        read,
    )


def _write(contents: _Contents, path: Path, replace: bool = False) -> None:
    """Writes everything aside and moves it into place, which a store there already may `replace`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with (_zarr if path.suffix == ".zarr" else _netcdf)(aside / path.name, contents.attributes) as create:
            targets = [create(part) for part in contents.parts]
            for target, part, number in track(
                _blocks(targets, contents.parts),
                "exporting",
                total=sum(len(part.regions) for part in contents.parts),
            ):
                target[part.regions[number]] = part.read(number)
        if replace and path.suffix == ".zarr":
            replace_folder(aside / path.name, path)
        else:
            (aside / path.name).replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _blocks(targets: Sequence[Any], parts: Sequence[_Part]) -> Iterator[tuple[Any, _Part, int]]:
    for target, part in zip(targets, parts, strict=True):
        for number in range(len(part.regions)):
            yield target, part, number


@contextmanager
def _zarr(path: Path, attributes: dict[str, Any]) -> Iterator[Callable[[_Part], Any]]:
    """A new store; when all is written, every array gets a list of its chunks."""
    group = zarr.open_group(path, mode="w-", zarr_format=3)
    group.update_attributes({**attributes, "chunk_list": NAME})
    lists: list[tuple[str, tuple[int, ...]]] = []

    def create(part: _Part) -> Any:
        chunks = _chunks(part, None)
        counts = (-(-size // side) for size, side in zip(part.shape, chunks, strict=True))
        lists.append((part.name, tuple(counts)))
        return group.create_array(
            part.name,
            shape=part.shape,
            chunks=chunks,
            dtype=part.dtype,
            fill_value=np.nan if part.dtype.kind == "f" else 0,
            compressors=COMPRESSORS,
            dimension_names=part.dimensions,
            attributes=part.attributes,
            config={"write_empty_chunks": True},  # what is all NaN is there too: a chunk that is not, is lost
        )

    yield create
    for name, shape in lists:
        Manifest.of(path / name, shape).write()
    with catch_warnings():  # that Zarr v3 does not yet define it; readers are slow, and warn, without
        simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(group.store)


@contextmanager
def _netcdf(path: Path, attributes: dict[str, Any]) -> Iterator[Callable[[_Part], Any]]:
    """A new NetCDF-4 file; every chunk has a checksum."""
    with netCDF4.Dataset(path, "w", format="NETCDF4") as file:
        file.setncatts(attributes)

        def create(part: _Part) -> Any:
            for dimension, size in zip(part.dimensions, part.shape, strict=True):
                if dimension not in file.dimensions:
                    file.createDimension(dimension, size)
            dtype = part.dtype.newbyteorder("=")
            packing: dict[str, Any] = {"fill_value": None}
            if part.is_field and dtype.kind == "f":
                packing["fill_value"] = dtype.type(np.nan)
            if part.shape:
                packing |= {"zlib": True, "complevel": 1, "fletcher32": True}
                packing["chunksizes"] = _chunks(part, SIDE)
            variable: Any = file.createVariable(part.name, dtype, part.dimensions, **packing)
            variable.set_auto_maskandscale(False)
            variable.setncatts(
                {
                    key: np.asarray(value, dtype) if key in TYPED else value
                    for key, value in part.attributes.items()
                }
            )
            return variable

        yield create


def _chunks(part: _Part, side: int | None) -> tuple[int, ...]:
    """One field of at most `side` cells along y and x; what is not on the grid lies together."""
    if part.dimensions[-2:] != ("y", "x"):
        return tuple(max(1, size) for size in part.shape)
    cells = (size if side is None else min(size, side) for size in part.shape[-2:])
    return (*(1 for _ in part.shape[:-2]), *cells)


def _attributes(group: zarr.Group, path: str, snapshot: str) -> dict[str, Any]:
    """The group's own, and where it was exported from."""
    own = dict(group.attrs)
    now = datetime.now(UTC).strftime(TIME)
    line = f"{now}: exported from {path}, snapshot {snapshot}, by metnet-nowcast {version()}"
    return {**own, "history": "\n".join(filter(None, (str(own.get("history", "")), line)))}


def _group(path: str, snapshot: str, name: str) -> zarr.Group:
    return zarr.open_group(Repository.open(path).reader(snapshot), path=name, mode="r", zarr_format=3)


def _arrays(group: zarr.Group) -> "Iterable[tuple[str, zarr.Array[Any]]]":
    return sorted(group.arrays())


def _dimensions(array: "zarr.Array[Any]") -> tuple[str, ...]:
    return tuple(array.metadata.dimension_names or ())  # type: ignore[union-attr, arg-type]


def _target(to: str) -> Path:
    """The place to write to.

    Raises:
        ValueError: if it is not of a kind that is written, or taken.
    """
    _of_a_kind("to", to)
    return untaken("to", to)


def _of_a_kind(key: str, to: str) -> Path:
    """A local path whose end names what is written there."""
    if "://" in to or Path(to).suffix not in SUFFIXES:
        kinds = " or ".join(f"{kind} that ends in {suffix}" for suffix, kind in SUFFIXES.items())
        raise ValueError(f"{key}={to}: expected {kinds}, on this machine")
    return Path(to)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _iso(time: int | np.integer[Any]) -> str:
    return datetime.fromtimestamp(int(time), UTC).strftime(TIME)
