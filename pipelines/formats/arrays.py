"""`Arrays`: the named arrays of a NetCDF file or a Zarr store from outside, with dimensions and attributes.

NetCDF-4 is read by h5py, NetCDF-3 by scipy, and Zarr (v2 and v3) by zarr, which sees only bytes that were
read here: it follows no link, takes apart no shard, and decodes by none but harmless codecs. Those that
compress are undone here (`codecs`), since they may make any size out of a few bytes.
Whoever writes arrays in chunks leaves out those that were never filled. They read as some fill value,
often 0, and so are told apart here (`absent`).
"""

import base64
import hashlib
import io
import itertools
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import zarr
from numpy.typing import NDArray
from scipy.io import netcdf_file
from zarr.storage import MemoryStore

from pipelines.formats import hdf5
from pipelines.formats.codecs import ALLOWED_CODECS, NO_CHUNK, Layout, Unpacked, codec_names, cut, layout_of

Attributes = Mapping[str, Any]
Number = tuple[int, ...]  # of a chunk, along each dimension

LARGEST_NETCDF4 = 2**38  # bytes; only the chunks of one field are read at a time
LARGEST_NETCDF3 = 2**31  # bytes; read whole
LARGEST_METADATA = 2**24  # bytes
LARGEST_CHUNK = 2**29  # bytes, stored or unpacked
LARGEST_READ = 2**30  # bytes unpacked at one time

SAFE_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}")  # what an array in a store may be called
BARE_DIMENSION = "This is a netCDF dimension but not a netCDF variable"
DEFAULT_FILLS = {  # what NetCDF fills with where an array does not say (netcdf.h); bytes have none
    "i2": -32767,
    "u2": 65535,
    "i4": -2147483647,
    "u4": 4294967295,
    "i8": -9223372036854775806,
    "u8": 18446744073709551614,
    "f4": 9.969209968386869e36,
    "f8": 9.969209968386869e36,
}


@dataclass(frozen=True)
class Read:
    """What an array holds at some place."""

    values: NDArray[Any]  # as stored: neither scaled nor masked
    absent: list[hdf5.Region]  # of the values: never written, and so made up by the library
    sha256: str  # of where they came from: see `opened`


class Array(Protocol):
    """An array in a file, of which only the head has been read."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Their names."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Their sizes."""
        ...

    @property
    def attributes(self) -> Attributes:
        """Plain values by name."""
        ...

    @property
    def fill(self) -> float | None:
        """What the format fills with where the attributes do not say `_FillValue`."""
        ...

    def read(self, fixed: Mapping[str, int]) -> Read:
        """The values at one index of the dimensions in `fixed`, and all of the others.

        Raises:
            ValueError: if they are damaged, or too many.
        """
        ...


class Arrays(Protocol):
    """What a file or store holds."""

    def attributes(self, group: str) -> Attributes:
        """Of a group; "" is the root."""
        ...

    def array(self, name: str) -> Array | None:
        """The array of this name, `group/name` where it lies in a group; None if there is none."""
        ...


def is_store(path: Path) -> bool:
    """Whether a folder is a Zarr group or array."""
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zarray"))


@contextmanager
def opened(path: Path) -> Iterator[Arrays]:
    """The arrays of a NetCDF file (3, 4), an HDF5 file with dimension scales, or a Zarr store (2, 3).

    The checksum (SHA-256) of a field out of a file is the file's. Of a field out of a store, which may hold
    years and grow, it is that of the array's metadata but for its shape, and of the chunks that hold it.

    Raises:
        ValueError: if it is none of these, is damaged, or leads out of itself.
        OSError: if it cannot be opened.
    """
    if path.is_dir():
        yield _Zarr(path)
        return
    with path.open("rb") as file:
        begin = file.read(8)
    if begin == hdf5.MAGIC:
        with hdf5.opened(path, LARGEST_NETCDF4) as contents:
            yield _Hdf5(contents, _file_sha256(path))
    elif begin[:4] in (b"CDF\1", b"CDF\2"):
        yield _Netcdf3(path)
    elif begin[:4] == b"CDF\5":
        raise ValueError(
            "a NetCDF file of the 64-bit data format (CDF-5), which is not read; turn it into NetCDF-4 "
            "by `nccopy -k nc4`"
        )
    else:
        raise ValueError(f"neither NetCDF nor HDF5: begins with {begin!r}; is it cut, or another format?")


def _check_size(shape: tuple[int, ...], itemsize: int, what: str, largest: int) -> None:
    if math.prod(shape) * itemsize > largest:
        raise ValueError(f"{what} of shape {shape} has more than the {largest} bytes that are read at once")


def _chunks(
    shape: tuple[int, ...], chunk: tuple[int, ...], index: tuple[int | None, ...]
) -> Iterator[tuple[Number, hdf5.Region]]:
    """The chunks (by number) that hold an index of some dimensions (None: all of one), and where they go."""
    numbers = [
        range(-(-size // step)) if at is None else range(at // step, at // step + 1)
        for size, step, at in zip(shape, chunk, index, strict=True)
    ]
    if math.prod(map(len, numbers)) > hdf5.MOST_CHUNKS:
        raise ValueError(f"one field lies in more than {hdf5.MOST_CHUNKS} chunks, which is not read")
    for number in itertools.product(*numbers):
        yield (
            number,
            tuple(
                slice(part * step, (part + 1) * step)
                for part, step, at in zip(number, chunk, index, strict=True)
                if at is None
            ),
        )


def _index(dimensions: tuple[str, ...], fixed: Mapping[str, int]) -> tuple[int | None, ...]:
    return tuple(fixed.get(name) for name in dimensions)


def _picked(index: tuple[int | None, ...]) -> tuple[int | slice, ...]:
    return tuple(slice(None) if at is None else at for at in index)


def _size(shape: tuple[int, ...], index: tuple[int | None, ...]) -> tuple[int, ...]:
    return tuple(size for size, at in zip(shape, index, strict=True) if at is None)


def _file_sha256(path: Path) -> str:
    """Of a whole file, computed once while it stays as it is: it may hold a thousand fields."""
    now = path.stat()
    return _sha256_of(path, now.st_ino, now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256_of(path: Path, inode: int, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Hdf5:
    file: h5py.File
    sha256: str
    found: "dict[str, _Hdf5Array | None]" = field(default_factory=dict)  # what was asked for, by name

    def attributes(self, group: str) -> Attributes:
        node = self.file.get(group or "/")
        return {} if node is None else _hdf5_attributes(node)

    def array(self, name: str) -> Array | None:
        if name not in self.found:
            node = self.file.get(name)
            is_array = isinstance(node, h5py.Dataset) and not _is_bare_dimension(node)
            self.found[name] = _Hdf5Array(node, self.sha256) if is_array else None
        return self.found[name]


@dataclass(frozen=True)
class _Hdf5Array:
    dataset: h5py.Dataset
    file_sha256: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.dataset.shape or ())

    @cached_property
    def dimensions(self) -> tuple[str, ...]:
        own = str(self.dataset.name).rsplit("/", 1)[-1]
        if self.dataset.is_scale and self.dataset.ndim == 1:
            return (own,)
        return tuple(
            str(scales[0].name).rsplit("/", 1)[-1] if len(scales) else f"{own}_{place}"
            for place, scales in enumerate(self.dataset.dims)
        )

    @cached_property
    def attributes(self) -> Attributes:
        return _hdf5_attributes(self.dataset)

    @property
    def fill(self) -> float | None:
        return DEFAULT_FILLS.get(self.dataset.dtype.str[1:])

    def read(self, fixed: Mapping[str, int]) -> Read:
        index = _index(self.dimensions, fixed)
        dtype = self.dataset.dtype
        if dtype.kind not in "iufbSU" and h5py.check_string_dtype(dtype) is None:
            raise ValueError(f"{self.dataset.name} has the type {dtype}: expected numbers")
        if self.dataset.shape is None:
            raise ValueError(f"{self.dataset.name} holds nothing")
        _check_size(_size(self.shape, index), dtype.itemsize, str(self.dataset.name), LARGEST_READ)
        values, absent = hdf5.part(self.dataset, _picked(index))
        return Read(values, absent, self.file_sha256)


def _is_bare_dimension(node: h5py.Dataset) -> bool:
    """Whether NetCDF keeps only the size of a dimension there, and no coordinates."""
    if not node.is_scale or "NAME" not in node.attrs:
        return False
    return str(hdf5.attribute(node, "NAME")).startswith(BARE_DIMENSION)


def _hdf5_attributes(node: h5py.HLObject) -> Attributes:
    references = ("DIMENSION_LIST", "REFERENCE_LIST", "PALETTE")
    return {name: hdf5.attribute(node, name) for name in node.attrs if name not in references}


class _Netcdf3:
    """Read whole by scipy, which fails where the file is shorter than its header says."""

    def __init__(self, path: Path):
        with path.open("rb") as stored:
            contents = stored.read(LARGEST_NETCDF3 + 1)
        if len(contents) > LARGEST_NETCDF3:
            raise ValueError(f"a NetCDF-3 file of more than {LARGEST_NETCDF3} bytes; turn it into NetCDF-4")
        try:
            self.file = netcdf_file(io.BytesIO(contents), mmap=False, maskandscale=False)
        except Exception as error:  # whatever scipy trips over
            raise ValueError(f"a cut or damaged NetCDF-3 file, fetch it again ({error})") from error
        self.sha256 = hashlib.sha256(contents).hexdigest()

    def attributes(self, group: str) -> Attributes:
        return _netcdf3_attributes(self.file)

    def array(self, name: str) -> Array | None:
        variable = self.file.variables.get(name)
        return None if variable is None else _Netcdf3Array(variable, self.sha256)


@dataclass(frozen=True)
class _Netcdf3Array:
    variable: Any  # of scipy.io.netcdf_file
    file_sha256: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.data.shape)

    @property
    def dimensions(self) -> tuple[str, ...]:
        return tuple(self.variable.dimensions)

    @property
    def attributes(self) -> Attributes:
        return _netcdf3_attributes(self.variable)

    @property
    def fill(self) -> float | None:
        return DEFAULT_FILLS.get(self.variable.data.dtype.str[1:])

    def read(self, fixed: Mapping[str, int]) -> Read:
        values = self.variable.data[_picked(_index(self.dimensions, fixed))]
        return Read(values.astype(values.dtype.newbyteorder("=")), [], self.file_sha256)


def _netcdf3_attributes(node: Any) -> Attributes:
    return {
        name: value.decode("utf-8", errors="replace") if isinstance(value, bytes) else _plain(value)
        for name, value in node._attributes.items()
    }


def _plain(value: Any) -> Any:
    array = np.asarray(value)
    return array.item() if array.size == 1 else array


@dataclass(frozen=True)
class _Zarr:
    root: Path

    def attributes(self, group: str) -> Attributes:
        found = _json(self.root, f"{group}/zarr.json" if group else "zarr.json")
        if found is not None:
            return dict(found.get("attributes", {}))
        return _json(self.root, f"{group}/.zattrs" if group else ".zattrs") or {}

    def array(self, name: str) -> Array | None:
        parts = [part for part in name.split("/") if part]
        if not all(SAFE_KEY.fullmatch(part) for part in parts):
            return None
        place = self.root.joinpath(*parts)
        for file in ("zarr.json", ".zarray"):
            metadata = _json(self.root, "/".join((*parts, file)))
            if metadata is not None and metadata.get("node_type", "array") == "array":
                return _ZarrArray(self.root, place, file, metadata)
        return None


@dataclass(frozen=True)
class _ZarrArray:
    root: Path
    place: Path
    file: str  # that holds the metadata: zarr.json (v3) or .zarray (v2)
    metadata: Mapping[str, Any]

    @property
    def is_v3(self) -> bool:
        return self.file == "zarr.json"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.metadata["shape"])

    @cached_property
    def attributes(self) -> Attributes:
        if not self.is_v3:
            return _json(self.root, self._key(".zattrs")) or {}
        told = dict(self.metadata.get("attributes", {}))
        if isinstance(told.get("_FillValue"), str):
            told["_FillValue"] = _unwrapped(told["_FillValue"])
        return told

    @property
    def dimensions(self) -> tuple[str, ...]:
        named = (
            self.metadata.get("dimension_names") if self.is_v3 else self.attributes.get("_ARRAY_DIMENSIONS")
        )
        names = list(named) if named else [None] * len(self.shape)
        if len(names) != len(self.shape):
            raise ValueError(f"{self.place.name} has {len(self.shape)} dimensions, but {len(names)} names")
        return tuple(
            f"{self.place.name}_{place}" if name is None else str(name) for place, name in enumerate(names)
        )

    @property
    def fill(self) -> float | None:
        value = None if self.is_v3 else self.metadata.get("fill_value")  # xarray's `_FillValue` of Zarr 2
        return float(value) if isinstance(value, int | float) else None

    def read(self, fixed: Mapping[str, int]) -> Read:
        index = _index(self.dimensions, fixed)
        self._check()
        regions = dict(_chunks(self.shape, self._layout.chunk, index))
        stored = self._stored(index)
        try:
            held = self._held(stored, index)
            array = zarr.open_array(self._store(held), mode="r", zarr_format=3 if self.is_v3 else 2)
            _check_size(self._chunk, array.dtype.itemsize, "a chunk", LARGEST_CHUNK)
            _check_size(_size(array.shape, index), array.dtype.itemsize, "a field", LARGEST_READ)
            values = np.asarray(array[_picked(index)] if array.shape else array[()])
        except MemoryError:
            raise
        except Exception as error:  # whatever a codec trips over
            raise ValueError(f"{self.place.name}: a damaged Zarr array ({error})") from error
        absent = [region for number, region in regions.items() if number not in held]
        files = {self._chunk_key(number): content for number, content in stored.items()}
        return Read(values, absent, self._sha256(files))

    def _sha256(self, stored: Mapping[str, bytes]) -> str:
        """Of the metadata but for the shape, which grows with every field appended, and of the chunks."""
        lasting = {key: value for key, value in self.metadata.items() if key != "shape"}
        digest = hashlib.sha256(json.dumps([lasting, self.attributes], sort_keys=True).encode())
        for key, value in stored.items():
            digest.update(f"\n{key} {len(value)}\n".encode() + value)
        return digest.hexdigest()

    def _stored(self, index: tuple[int | None, ...]) -> dict[Number, bytes]:
        """The files of the chunks or shards that hold an index, but for those that are not there."""
        stored: dict[Number, bytes] = {}
        total = 0
        for number, _ in _chunks(self.shape, self._chunk, index):
            read = _bytes(self.root, self._key(self._chunk_key(number)), LARGEST_CHUNK)
            if read is None:
                continue
            total += len(read)
            if total > LARGEST_READ:
                raise ValueError(f"{self.place.name}: one field lies in more than {LARGEST_READ} bytes")
            stored[number] = read
        return stored

    def _held(self, stored: Mapping[Number, bytes], index: tuple[int | None, ...]) -> Mapping[Number, bytes]:
        """The chunks that hold an index, taken out of their shards, but for those that are not there."""
        outer = self._chunk
        for shard in self._layout.shards:
            parts = tuple(size // step for size, step in zip(outer, shard.chunk, strict=True))
            places = {number: shard.places(content, parts) for number, content in stored.items()}
            found = {}
            for number, _ in _chunks(self.shape, shard.chunk, index):
                whole = tuple(at // count for at, count in zip(number, parts, strict=True))
                inside = tuple(at % count for at, count in zip(number, parts, strict=True))
                place = tuple(places[whole][inside].tolist()) if whole in places else NO_CHUNK
                if place != NO_CHUNK:
                    found[number] = cut(stored[whole], *place)
            stored, outer = found, shard.chunk
        return stored

    def _store(self, held: Mapping[Number, bytes]) -> MemoryStore:
        """What zarr reads: the array without shards and compression, its chunks unpacked when read."""
        layout = self._layout
        told: dict[str, Any]
        if self.is_v3:
            grid = {"name": "regular", "configuration": {"chunk_shape": layout.chunk}}
            told = {"codecs": layout.kept, "chunk_grid": grid, "chunk_key_encoding": {"name": "default"}}
            head = {self.file: json.dumps({**self.metadata, **told}).encode()}
            names = {"/".join(["c", *map(str, number)]): content for number, content in held.items()}
        else:
            head = {".zattrs": json.dumps(self.attributes).encode()}
            told = {"filters": layout.kept[:-1] or None, "compressor": layout.kept[-1]}
            head[self.file] = json.dumps({**self.metadata, **told, "dimension_separator": "."}).encode()
            names = {".".join(map(str, number)) or "0": content for number, content in held.items()}
        return MemoryStore(Unpacked(head, names, layout), read_only=True)  # type: ignore[arg-type]

    @cached_property
    def _layout(self) -> Layout:
        try:
            return layout_of(self.metadata, self._chunk, self.place.name)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self.place.name}: its metadata do not say how it is packed ({error!r}); a damaged store"
            ) from error

    def _key(self, name: str) -> str:
        return (self.place.relative_to(self.root) / name).as_posix()

    @property
    def _chunk(self) -> tuple[int, ...]:
        grid = self.metadata["chunk_grid"] if self.is_v3 else None
        if grid is not None and grid.get("name") != "regular":
            raise ValueError(f"{self.place.name}: a chunk grid of the kind {grid.get('name')}, not regular")
        sizes = self.metadata["chunks"] if grid is None else grid["configuration"]["chunk_shape"]
        return tuple(int(size) for size in sizes)

    def _chunk_key(self, number: tuple[int, ...]) -> str:
        parts = [str(part) for part in number]
        if not self.is_v3:
            return self._separator(self.metadata.get("dimension_separator", ".")).join(parts) or "0"
        encoding = self.metadata.get("chunk_key_encoding", {})
        configured = encoding.get("configuration") or {}
        if encoding.get("name", "default") == "v2":
            return self._separator(configured.get("separator", ".")).join(parts) or "0"
        return self._separator(configured.get("separator", "/")).join(["c", *parts])

    def _separator(self, text: object) -> str:
        if text not in (".", "/"):
            raise ValueError(f"{self.place.name}: the chunk names are parted by {text!r}, not by . or /")
        return str(text)

    def _check(self) -> None:
        """Refuses what could not be an array, and codecs that are not known to be harmless."""
        if len(self._chunk) != len(self.shape) or min((*self._chunk, 1)) < 1 or min((*self.shape, 0)) < 0:
            raise ValueError(f"{self.place.name}: chunks of {self._chunk} in an array of {self.shape}")
        _check_size(self._chunk, 1, f"{self.place.name}: a chunk", LARGEST_CHUNK)
        used = set(codec_names(self.metadata))
        if used - ALLOWED_CODECS:
            raise ValueError(
                f"{self.place.name}: is packed by {', '.join(sorted(used - ALLOWED_CODECS))}, which is not "
                f"read; expected one of {', '.join(sorted(ALLOWED_CODECS))}"
            )
        if self.metadata.get("storage_transformers"):
            raise ValueError(f"{self.place.name}: has storage transformers, which are not read")


def _unwrapped(fill: str) -> object:
    """The number that xarray writes as the base 64 of a double into the JSON of Zarr 3; else the text."""
    try:
        return float(struct.unpack("<d", base64.b64decode(fill, validate=True))[0])
    except (ValueError, struct.error):
        return fill


def _json(root: Path, key: str) -> dict[str, Any] | None:
    """An object in a store; None if there is none."""
    read = _bytes(root, key, LARGEST_METADATA)
    if read is None:
        return None
    try:
        found = json.loads(read)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is not JSON ({error}); a damaged Zarr store") from error
    if not isinstance(found, dict):
        raise ValueError(f"{key} is not a JSON object; a damaged Zarr store")
    return found


def _bytes(root: Path, key: str, largest: int) -> bytes | None:
    """A file of a store; None if there is none.

    Raises:
        ValueError: if it is larger than `largest`, or is reached over a symbolic link.
    """
    path = root
    for part in key.split("/"):
        path = path / part
        if path.is_symlink():
            raise ValueError(f"{key} is a link; refused, since it may lead to any file here")
    try:
        with path.open("rb") as file:
            read = file.read(min(os.fstat(file.fileno()).st_size, largest) + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    if len(read) > largest:
        raise ValueError(f"{key} is larger than {largest} bytes")
    return read
