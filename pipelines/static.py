"""`StaticFields`: what never changes beside a cube's frames, such as elevation: the group "static"."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from pipelines.cf import Variable, described
from pipelines.coordinates import chunks, located, provenance, read_grid, write_grid
from pipelines.cube import SIDE, STATIC, Written, check_place
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.repository import Repository, store_array


class StaticFields:
    """The fields without a time of a cube, as they were when it was opened."""

    def __init__(self, path: str, snapshot: str):
        """Use `open`."""
        self.path = path
        self.snapshot = snapshot
        self._repository = Repository.open(path)
        try:
            self._group = zarr.open_group(
                self._repository.reader(snapshot), path=STATIC, mode="r", zarr_format=3
            )
        except FileNotFoundError as error:
            raise ValueError(
                f"{path}: has no static fields; write some with metnet ingest source=etopo, for example"
            ) from error
        self.grid: Grid = read_grid(self._group)
        self.variables: dict[str, Variable] = {
            name: described(name, dict(array.attrs))
            for name, array in self._group.arrays()
            if "valid_range" in array.attrs
        }

    @classmethod
    def open(cls, path: str) -> "StaticFields":
        """The static fields of a cube at a local folder or URL, at its newest snapshot.

        Raises:
            ValueError: if there are none, saying what is there instead.
        """
        return cls(path, Repository.open(path).snapshot)

    def field(self, name: str) -> NDArray[np.float32]:
        """A field (y, x) in its variable's units; NaN where it is not known.

        Raises:
            ValueError: if there is none of that name.
        """
        if name not in self.variables:
            there = ", ".join(sorted(self.variables))
            raise ValueError(f"{self.path}: no static field {name!r}; it has {there}")
        return np.asarray(self._group[name][:], np.float32)  # type: ignore[index]

    def source(self, name: str) -> str:
        """Where a field came from, as a person would say it, with the SHA-256 of the file."""
        attributes = self._group[name].attrs
        return f"{attributes['source']} (sha256 {attributes['source_sha256']})"

    def dataset(self) -> xr.Dataset:
        """All fields as a CF dataset, read when it is used."""
        return self._repository.dataset(self.snapshot, STATIC)


def write_static(path: str, frame: Frame, restate: bool = False) -> Written:
    """Writes a field without a time in one commit; the first of a variable stays, or with `restate` the last.

    Raises:
        ValueError: if the frame has a time, if the cube there has another grid, or if it is no cube.
    """
    if frame.cadence is not None:
        raise ValueError(f"{path}: {frame.variable.name} changes with time; write it with Cube.write")
    repository = Repository.open_or_create(path)
    counts: dict[str, int] = {}

    def edit(store: Any) -> None:
        counts.update(new=0, unchanged=0, conflicting=0, restated=0)
        root = zarr.open_group(store, mode="a", zarr_format=3)
        check_place(path, root, frame.grid)
        if STATIC not in root:
            group = root.create_group(STATIC)
            group.update_attributes(provenance("fields that do not change"))
            write_grid(group, frame.grid)
        counts[_write(zarr.open_group(store, path=STATIC, mode="r+", zarr_format=3), frame, restate)] += 1

    repository.commit(f"{frame.variable.name} of {frame.source}", edit)
    return Written(repository.snapshot, **counts)


def _write(group: zarr.Group, frame: Frame, restate: bool) -> str:
    """Writes the field if it may; what became of it, as the fields of `Written` call it."""
    name = frame.variable.name
    became = "new"
    if name in group:
        if group[name].attrs["source_sha256"] == frame.sha256:
            return "unchanged"
        if not restate:
            return "conflicting"
        del group[name]
        became = "restated"
    attributes = {
        **frame.variable.attributes(),
        "valid_range": list(frame.variable.valid_range),
        "source": frame.source,
        "source_sha256": frame.sha256,
        "arrival_time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }
    store_array(group, name, ("y", "x"), frame.values, located(attributes), chunks(frame.grid, SIDE))
    return became
