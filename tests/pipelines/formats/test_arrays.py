"""Arrays out of stores and files that were made to hurt."""

import itertools
import json
import lzma
import math
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import h5py
import netCDF4
import numcodecs
import numpy as np
import pytest
import zarr
from scipy.io import netcdf_file
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

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


LZMA2 = {"id": "lzma", "format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "dict_size": 2**20}]}
COMPRESSORS = [
    *({"id": name} for name in ("gzip", "zlib", "bz2", "lzma", "zstd", "blosc", "lz4")),
    LZMA2,
]


def named(config: dict) -> str:
    return config["id"] + ("-raw" if "filters" in config else "")


def packed(path: Path, kind: str, config: dict, content: np.ndarray = VALUES) -> Path:
    """A store of one chunk a time, packed by a codec of numcodecs: of format 2, or of 3 without or in shards."""
    path.mkdir()
    (path / ("zarr.json" if kind != "v2" else ".zgroup")).write_text(
        json.dumps({"zarr_format": 2} if kind == "v2" else {"zarr_format": 3, "node_type": "group"})
    )
    (path / "rain").mkdir()
    if kind == "v2":
        told = {
            "zarr_format": 2,
            "shape": VALUES.shape,
            "chunks": (1, 4, 5),
            "dtype": "<f4",
            "compressor": config,
            "fill_value": 0,
            "filters": None,
            "order": "C",
        }
        (path / "rain/.zarray").write_text(json.dumps(told))
        (path / "rain/.zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": ["time", "y", "x"]}))
    else:
        settings = {key: value for key, value in config.items() if key != "id"}
        codecs = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": f"numcodecs.{config['id']}", "configuration": settings},
            {"name": "crc32c"},
        ]
        index = [codecs[0], codecs[2]]
        shard = {"chunk_shape": (1, 4, 5), "codecs": codecs, "index_codecs": index}
        told = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": VALUES.shape,
            "data_type": "float32",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": (1, 4, 5)}},
            "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
            "fill_value": 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": shard}] if kind == "shards" else codecs,
            "dimension_names": ["time", "y", "x"],
        }
        (path / "rain/zarr.json").write_text(json.dumps(told))
    for time, field in enumerate(content):
        put(path, kind, time, bytes(numcodecs.get_codec(config).encode(np.ascontiguousarray(field))))
    return path


def put(path: Path, kind: str, time: int, content: bytes) -> None:
    """Writes what a compressor gave into the place of a chunk, with the checksums around it."""
    checksum = numcodecs.CRC32C(location="end")
    if kind != "v2":
        content = bytes(checksum.encode(content))
    if kind == "shards":
        content += bytes(checksum.encode(struct.pack("<QQ", 0, len(content))))
    (path / f"rain/{time}.0.0").write_bytes(content)


KINDS = ("v2", "v3", "shards")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", COMPRESSORS, ids=named)
def test_what_any_codec_packed_comes_back(kind, config, tmp_path):
    path = packed(tmp_path / "cube.zarr", kind, config)
    assert np.array_equal(read(path), VALUES)
    assert np.array_equal(read(path, time=1, y=2), VALUES[1, 2])
    with opened(path) as arrays:
        assert arrays.array("rain").read({}).absent == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", COMPRESSORS, ids=named)
def test_a_chunk_of_another_size_is_refused_before_memory_is_spent(kind, config, tmp_path):
    path = packed(tmp_path / "cube.zarr", kind, config)
    pack = numcodecs.get_codec(config).encode
    whole = bytes(pack(VALUES[1].copy()))
    for content in (
        bytes(pack(VALUES[1, 0])),
        bytes(pack(VALUES[1].ravel()[:-1])),
        bytes(pack(np.append(VALUES[1], np.float32(0)))),
        bytes(pack(np.zeros(2**24, np.float32))),
        whole[:-3],
        whole + bytes(3),
    ):
        put(path, kind, 1, content)
        assert np.array_equal(read(path, time=0), VALUES[0])
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="rain: a damaged Zarr array"):
                read(path, time=1)
            assert tracemalloc.get_traced_memory()[1] < 2**25  # a dictionary of lzma has 8 MiB
        finally:
            tracemalloc.stop()


FILTERS = {
    "shuffle": [{"id": "shuffle", "elementsize": 4}],
    "delta": [{"id": "delta", "dtype": "<f4"}],
    "scaled": [{"id": "fixedscaleoffset", "dtype": "<f4", "astype": "<i2", "scale": 4, "offset": 1}],
    "another type": [{"id": "astype", "encode_dtype": "<f8", "decode_dtype": "<f4"}],
    "a checksum": [{"id": "crc32"}],
    "two": [
        {"id": "astype", "encode_dtype": "<f8", "decode_dtype": "<f4"},
        {"id": "shuffle", "elementsize": 8},
    ],
    "the compressor": [{"id": "shuffle", "elementsize": 4}, {"id": "zlib", "level": 1}],
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_before_a_compressor_are_undone_and_what_it_gives_is_bounded(name, tmp_path):
    path = tmp_path / "cube.zarr"
    compressor = None if name == "the compressor" else numcodecs.Zstd()
    array = zarr.open_group(path, mode="w", zarr_format=2).create_array(
        "rain",
        shape=VALUES.shape,
        chunks=(1, 4, 5),
        dtype="f4",
        filters=[numcodecs.get_codec(dict(each)) for each in FILTERS[name]],
        compressors=compressor,
    )
    array.attrs["_ARRAY_DIMENSIONS"] = ["time", "y", "x"]
    array[:] = VALUES
    assert np.array_equal(read(path), VALUES)
    for count in (10, 10_000_000):
        content = bytes(count) if name == "the compressor" else numcodecs.Zstd().encode(bytes(count))
        packing = zlib.compress(content) if name == "the compressor" else content
        (path / "rain/1.0.0").write_bytes(packing)
        with pytest.raises(ValueError, match=r"damaged Zarr array \(\d+ bytes.*; expected"):
            read(path, time=1)


def test_what_is_compressed_twice_is_refused(tmp_path):
    path = packed(tmp_path / "cube.zarr", "v2", {"id": "zstd"})
    edit(path / "rain/.zarray", filters=[{"id": "zlib", "level": 1}])
    with pytest.raises(ValueError, match="is packed by zlib and then zstd, which is not read"):
        read(path)


@pytest.mark.parametrize("kind", [2, 3])
def test_texts_are_bounded_in_bytes_and_number(kind, tmp_path):
    labels = np.array(["rain", "snow", "Größe"], object if kind == 2 else np.dtypes.StringDType())
    path = tmp_path / "cube.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=kind)
    settings = {"compressors": numcodecs.Zstd()} if kind == 2 else {}
    group.create_array("label", shape=3, chunks=3, dtype=str, **settings)[:] = labels
    assert read(path, "label").tolist() == labels.tolist()
    chunk = path / "label" / ("0" if kind == 2 else "c/0")
    whole = numcodecs.VLenUTF8().encode(np.array(labels.tolist(), object))
    for content, reason in (
        (struct.pack("<I", 2**31) + whole[4:], "other than 3 texts"),
        (whole + bytes(2**25), "expected 16777216"),
    ):
        chunk.write_bytes(numcodecs.Zstd().encode(content))
        with pytest.raises(ValueError, match=reason):
            read(path, "label")


def sharded(path: Path, place: str, codecs: list, inner: tuple | None = None) -> Path:
    """A store with shards of 2 x 4 x 6 in chunks of 1 x 2 x 3, of which half were never written."""
    chunks = [BytesCodec(), ZstdCodec()]
    if inner:
        chunks = [ShardingCodec(chunk_shape=inner, codecs=chunks)]
    sharding = ShardingCodec(
        chunk_shape=(1, 2, 6) if inner else (1, 2, 3),
        codecs=chunks,
        index_codecs=codecs,
        index_location=place,
    )
    group = zarr.open_group(path, mode="w", zarr_format=3)
    array = group.create_array(
        "rain",
        shape=VALUES.shape,
        dtype="f4",
        chunks=(2, 4, 6),
        serializer=sharding,
        compressors=None,
        dimension_names=("time", "y", "x"),
        fill_value=0.0,
    )
    array[0, :2] = VALUES[0, :2] + 1
    array[1, 2:, 3:] = VALUES[1, 2:, 3:] + 1
    return path


@pytest.mark.parametrize("inner", [None, (1, 2, 3)])
@pytest.mark.parametrize("place", ["start", "end"])
@pytest.mark.parametrize(
    "codecs", [[BytesCodec()], [BytesCodec(), Crc32cCodec()], [BytesCodec(endian="big")]]
)
def test_chunks_that_were_never_written_into_a_shard_are_told_apart(place, codecs, inner, tmp_path):
    path = sharded(tmp_path / "cube.zarr", place, codecs, inner)
    written = np.zeros(VALUES.shape, bool)
    written[0, :2] = written[1, 2:, 3:] = True
    with opened(path) as arrays:
        for time, y in itertools.product((0, 1, 2), (None, 0, 3)):
            found = arrays.array("rain").read({"time": time} if y is None else {"time": time, "y": y})
            told = np.ones(found.values.shape, bool)
            for region in found.absent:
                told[region] = False
            expected = (time,) if y is None else (time, y)
            assert np.array_equal(told, written[expected])
            assert np.array_equal(found.values, np.where(told, VALUES[expected] + 1, 0))


def test_a_damaged_index_of_a_shard_is_refused(tmp_path):
    path = sharded(tmp_path / "cube.zarr", "end", [BytesCodec(), Crc32cCodec()])
    shard = path / "rain/c/0/0/0"
    content = shard.read_bytes()
    for damaged in (content[:-1], content[:50], content[:-20] + b"\x01" + content[-19:], b""):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match="rain: a damaged Zarr array"):
            read(path, time=0)
    path = sharded(tmp_path / "unchecked.zarr", "start", [BytesCodec()])
    shard = path / "rain/c/0/0/0"
    for offset, length in ((2**62, 4), (4, 2**62), (2**64 - 1, 4), (0, 2**64 - 1)):
        shard.write_bytes(struct.pack("<QQ", offset, length) + content[16:])
        with pytest.raises(ValueError, match=r"a shard of \d+ bytes has a chunk at"):
            read(path, time=0)


def test_shards_that_are_packed_again_or_lie_deep_in_each_other_are_refused(tmp_path):
    path = sharded(tmp_path / "cube.zarr", "end", [BytesCodec()])
    metadata = json.loads((path / "rain/zarr.json").read_text())
    (shards,) = metadata["codecs"]
    for further in ({"name": "gzip", "configuration": {"level": 1}}, shards):
        edit(path / "rain/zarr.json", codecs=[shards, further])
        with pytest.raises(ValueError, match="its shards, or their indexes, are packed once more"):
            read(path, time=0)
    for _ in range(3):
        again = {**shards["configuration"], "codecs": [shards]}
        shards = {"name": "sharding_indexed", "configuration": again}
    edit(path / "rain/zarr.json", codecs=[shards])
    with pytest.raises(ValueError, match="shards in shards, more than 2 deep"):
        read(path, time=0)
    edit(path / "rain/zarr.json", codecs=[{"name": "sharding_indexed", "configuration": {"codecs": []}}])
    with pytest.raises(ValueError, match="do not say how it is packed"):
        read(path, time=0)


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
        assert arrays.array("some").read({}).absent == [(slice(4, 8),), (slice(8, 9),)]
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


def test_a_chunk_of_netcdf4_of_another_size_is_refused_and_never_filled_with_what_lies_in_memory(tmp_path):
    path = tmp_path / "a.nc"
    for count in (1, 11, 13, 2**24):
        netcdf4(path)
        with h5py.File(path, "r+") as file:
            file["rain"].id.write_direct_chunk((1, 0, 0), zlib.compress(bytes(4 * count)))
        assert np.array_equal(read(path, time=0), VALUES[0])
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="/rain has a"):
                read(path, time=1)
            assert tracemalloc.get_traced_memory()[1] < 2**22
        finally:
            tracemalloc.stop()
