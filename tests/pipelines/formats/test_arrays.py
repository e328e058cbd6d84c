"""Arrays out of stores and files that were made to hurt."""

import json
import math
import os
import struct
from pathlib import Path

import h5py
import netCDF4
import numpy as np
import pytest
import zarr
from scipy.io import netcdf_file
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from pipelines.formats.arrays import is_store, opened

VALUES = np.arange(60, dtype=np.float32).reshape(3, 4, 5)


def store(path: Path, **settings) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=settings.get("zarr_format", 3))
    told = {"chunks": (1, 4, 3), "dimension_names": ("time", "y", "x")} | settings
    if told.get("zarr_format") == 2:
        del told["dimension_names"]
    told.pop("zarr_format", None)
    array = group.create_array("rain", shape=VALUES.shape, dtype="f4", **told)
    array.attrs["_ARRAY_DIMENSIONS"] = ["time", "y", "x"]
    array[:] = VALUES
    return path


def read(path: Path, name: str = "rain", **fixed) -> np.ndarray:
    with opened(path) as arrays:
        array = arrays.array(name)
        assert array is not None
        return array.read(fixed).values


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CODECS = {
    "plain": {"compressors": None},
    "zstd and crc32c": {"compressors": [ZstdCodec(), Crc32cCodec()]},
    "gzip": {"compressors": GzipCodec()},
    "blosc": {"compressors": BloscCodec()},
    "shards": {"shards": (2, 4, 6)},
    "v2 names": {"chunk_key_encoding": {"name": "v2", "separator": "."}},
    "format 2": {"zarr_format": 2},
}


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_reads_as_zarr_reads_it(codec, tmp_path):
    path = store(tmp_path / "cube.zarr", **CODECS[codec])
    assert is_store(path)
    for fixed in ({}, {"time": 2}, {"x": 4}, {"time": 1, "y": 3}, {"time": 0, "y": 0, "x": 4}):
        place = tuple(fixed.get(name, slice(None)) for name in ("time", "y", "x"))
        assert np.array_equal(read(path, **fixed), VALUES[place])


def test_a_flipped_bit_is_an_error_where_there_is_a_checksum(tmp_path):
    path = store(tmp_path / "cube.zarr", **CODECS["zstd and crc32c"])
    chunk = path / "rain/c/1/0/0"
    content = chunk.read_bytes()
    for place in range(0, len(content), 7):
        chunk.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match="rain: a damaged Zarr array"):
            read(path, time=1)


def test_a_codec_that_unpickles_is_refused_before_it_runs(tmp_path):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    import pickle

    path = store(tmp_path / "cube.zarr", zarr_format=2)
    edit(path / "rain/.zarray", filters=[{"id": "pickle", "protocol": 4}], dtype="|O", compressor=None)
    (path / "rain/0.0.0").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="is packed by pickle, which is not read"):
        read(path, time=0)
    assert not canary.exists()


def test_an_unknown_codec_inside_a_shard_is_refused(tmp_path):
    path = store(tmp_path / "cube.zarr", **CODECS["shards"])
    metadata = json.loads((path / "rain/zarr.json").read_text())
    metadata["codecs"][0]["configuration"]["codecs"].append({"name": "mystery", "configuration": {}})
    (path / "rain/zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="packed by mystery"):
        read(path)


def test_links_out_of_a_store_are_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(VALUES[0].tobytes())
    path = store(tmp_path / "cube.zarr", compressors=None, chunks=(1, 4, 5))
    chunk = path / "rain/c/0/0/0"
    chunk.unlink()
    chunk.symlink_to(secret)
    with pytest.raises(ValueError, match="is a link; refused"):
        read(path, time=0)
    (path / "other").symlink_to(path / "rain")
    with opened(path) as arrays, pytest.raises(ValueError, match="is a link; refused"):
        arrays.array("other")


@pytest.mark.parametrize("name", ["../secret", "..", "/etc/passwd", "a/../../b", ".hidden", "a\0b"])
def test_names_that_lead_out_of_a_store_are_none_of_its_arrays(name, tmp_path):
    store(tmp_path / "secret")
    store(tmp_path / "cube.zarr")
    with opened(tmp_path / "cube.zarr") as arrays:
        assert arrays.array(name) is None


BOMBS = {
    "a huge chunk": (
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 10**6, 10**5]}}},
        "a chunk",
    ),
    "a huge field": ({"shape": [3, 10**6, 10**6]}, "chunks, which is not read"),
    "a huge field in few chunks": (
        {
            "shape": [3, 40_000, 40_000],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 10_000, 10_000]}},
        },
        "read at once",
    ),
    "no chunks": (
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 4, 3]}}},
        "chunks of",
    ),
    "another rank": (
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 3]}}},
        "chunks of",
    ),
    "an uneven grid": ({"chunk_grid": {"name": "rectilinear"}}, "of the kind rectilinear"),
    "another separator": (
        {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/../"}}},
        "are parted by",
    ),
    "a transformer": ({"storage_transformers": [{"name": "x"}]}, "storage transformers"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_metadata_that_cannot_be_meant_is_refused_before_memory_is_spent(bomb, tmp_path):
    changes, reason = BOMBS[bomb]
    path = store(tmp_path / "cube.zarr")
    edit(path / "rain/zarr.json", **changes)
    with pytest.raises(ValueError, match=reason):
        read(path, time=0)


def test_damaged_metadata_is_refused(tmp_path):
    path = store(tmp_path / "cube.zarr")
    for content in ("", "[1]", "{", "[" * 100_000):
        (path / "rain/zarr.json").write_text(content)
        with pytest.raises(ValueError, match="a damaged Zarr store"):
            read(path)


def test_the_fill_value_that_xarray_hides_in_base_64_is_found(tmp_path):
    path = store(tmp_path / "cube.zarr")
    for hidden, fill in (("AAAAAAAA+H8=", math.nan), ("AAAAAACAWMA=", -98.0), ("text", "text"), (7, 7)):
        zarr.open_array(path / "rain").attrs["_FillValue"] = hidden
        with opened(path) as arrays:
            found = arrays.array("rain").attributes["_FillValue"]
        assert found == fill or (found != found and fill != fill)


def netcdf4(path: Path) -> Path:
    with netCDF4.Dataset(path, "w") as file:
        for name, size in (("time", None), ("y", 4), ("x", 5)):
            file.createDimension(name, size)
        file.createVariable("y", "f8", ("y",))[:] = range(4)
        rain = file.createVariable("rain", "f4", ("time", "y", "x"), chunksizes=(1, 4, 3), zlib=True)
        rain[:] = VALUES
        rain.title = "Größe"
    return path


def test_netcdf4_has_dimensions_by_name_and_bare_ones_have_no_coordinates(tmp_path):
    with opened(netcdf4(tmp_path / "a.nc")) as arrays:
        rain = arrays.array("rain")
        assert rain.dimensions == ("time", "y", "x")
        assert rain.attributes["title"] == "Größe"
        assert arrays.array("y").dimensions == ("y",)
        assert arrays.array("x") is None
        assert arrays.array("time") is None
        assert np.array_equal(rain.read({"time": 1}).values, VALUES[1])
        assert rain.read({"time": 1}).absent == []


def test_what_was_never_written_to_netcdf4_is_told_apart(tmp_path):
    path = tmp_path / "a.nc"
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("x", 9)
        file.createVariable("some", "i2", ("x",), chunksizes=(4,))[:4] = 1
        file.createVariable("none", "f4", ("x",))
    with opened(path) as arrays:
        assert arrays.array("some").read({}).absent == [(slice(4, 8),), (slice(8, 12),)]
        assert arrays.array("none").read({}).absent == [(slice(None),)]
        assert arrays.array("some").fill == -32767


def test_ways_out_of_an_hdf5_file_are_refused(tmp_path):
    path = tmp_path / "a.nc"
    with h5py.File(path, "w") as file:
        file["rain"] = h5py.ExternalLink("/etc/passwd", "/x")
    with pytest.raises(ValueError, match="external link"), opened(path):
        pass


def netcdf3(path: Path) -> Path:
    with netcdf_file(path, "w") as file:
        for name, size in (("time", None), ("y", 4), ("x", 5)):
            file.createDimension(name, size)
        rain = file.createVariable("rain", "f4", ("time", "y", "x"))
        rain[:] = VALUES
        rain.units = "mm h-1"
    return path


def test_netcdf3_reads_and_every_cut_is_refused(tmp_path):
    path = netcdf3(tmp_path / "a.nc")
    assert np.array_equal(read(path, time=2), VALUES[2])
    assert read(path).dtype == np.dtype("float32")
    content = path.read_bytes()
    for end in range(4, len(content), 9):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match="cut or damaged NetCDF-3"):
            read(path)


def test_netcdf3_that_declares_more_than_there_is_is_refused(tmp_path):
    path = netcdf3(tmp_path / "a.nc")
    content = path.read_bytes()
    path.write_bytes(content[:4] + struct.pack(">I", 2**31 - 1) + content[8:])
    with pytest.raises(ValueError, match="cut or damaged NetCDF-3"):
        read(path)


def test_other_formats_are_refused(tmp_path):
    for content, reason in ((b"CDF\5....", "nccopy"), (b"<html>", "neither NetCDF"), (b"", "neither NetCDF")):
        (tmp_path / "a.nc").write_bytes(content)
        with pytest.raises(ValueError, match=reason), opened(tmp_path / "a.nc"):
            pass
