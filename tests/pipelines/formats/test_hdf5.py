"""HDF5 files from outside: nothing but what lies in them comes back, and all of it or a refusal."""

import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import netCDF4
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.formats import hdf5

CANARY = b"the canary of a file that nobody published"
LARGEST = 2**20


@pytest.fixture
def canary(tmp_path) -> Path:
    path = tmp_path / "canary"
    path.write_bytes(CANARY)
    with h5py.File(tmp_path / "canary.h5", "w") as file:
        file["data"] = np.frombuffer(CANARY, np.uint8)
    return path


def beside(file: h5py.File, name: str) -> str:
    return str(Path(file.filename).parent / name)


def external_link(file: h5py.File) -> str:
    file["data"] = h5py.ExternalLink(beside(file, "canary.h5"), "/data")
    return "data"


def external_link_far_down(file: h5py.File) -> str:
    file.create_group("a/b/c")["link"] = h5py.ExternalLink(beside(file, "canary.h5"), "/")
    return "a/b/c/link/data"


def soft_link_to_an_external_link(file: h5py.File) -> str:
    file.create_group("dataset1/data1")["data"] = h5py.SoftLink("/aside/data")
    file["aside"] = h5py.SoftLink("/hidden/there")
    file.create_group("hidden")["there"] = h5py.ExternalLink(beside(file, "canary.h5"), "/")
    return "dataset1/data1/data"


def external_link_below_a_circle(file: h5py.File) -> str:
    group = file.create_group("a")
    group["again"] = group
    group["b"] = h5py.ExternalLink(beside(file, "canary.h5"), "/data")
    return "a/again/again/b"


def external_storage(file: h5py.File) -> str:
    external = [(beside(file, "canary"), 0, len(CANARY))]
    file.create_dataset("group/data", (len(CANARY),), np.uint8, external=external)
    return "group/data"


def virtual_dataset(file: h5py.File) -> str:
    layout = h5py.VirtualLayout((len(CANARY),), np.uint8)
    layout[:] = h5py.VirtualSource(beside(file, "canary.h5"), "data", shape=(len(CANARY),))
    file.create_virtual_dataset("group/data", layout)
    return "group/data"


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (external_link, "external link at /data"),
        (external_link_far_down, "external link at /a/b/c/link"),
        (soft_link_to_an_external_link, "external link at /hidden/there"),
        (external_link_below_a_circle, "external link at /a/b"),
        (external_storage, "/group/data is stored in another file"),
        (virtual_dataset, "/group/data is put together from other files"),
    ],
)
def test_a_way_out_of_the_file_is_refused_before_anything_is_read(plant, reason, canary, tmp_path):
    path = tmp_path / "planted.h5"
    with h5py.File(path, "w") as file:
        file["innocent"] = np.arange(3)
        place = plant(file)
    with h5py.File(path) as file:  # the library itself hands the other file's bytes over
        assert bytes(file[place][()]) == CANARY
    with pytest.raises(ValueError, match=reason) as refusal, hdf5.opened(path, LARGEST):
        pytest.fail("it was opened")
    assert CANARY.decode() not in str(refusal.value)


def test_circles_of_hard_links_and_loose_soft_links_are_no_harm(tmp_path):
    path = tmp_path / "circle.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("a/b")
        group["root"], group["self"] = file["/"], group
        file["soft"], file["nowhere"] = h5py.SoftLink("/soft"), h5py.SoftLink("/not/there")
        group["data"] = np.arange(3)
    with hdf5.opened(path, LARGEST) as file:
        assert hdf5.values(file["a/b/root/a/b/self/data"], (3,)).tolist() == [0, 1, 2]


def test_a_file_of_very_many_links_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "many.h5"
    with h5py.File(path, "w") as file:
        for number in range(11):
            file.create_group(f"a/{number}")
    monkeypatch.setattr(hdf5, "MOST_LINKS", 12)
    with hdf5.opened(path, LARGEST) as file:
        assert len(file["a"]) == 11
    monkeypatch.setattr(hdf5, "MOST_LINKS", 11)
    with pytest.raises(ValueError, match="more than 11 links"), hdf5.opened(path, LARGEST):
        pass


def test_what_is_no_whole_hdf5_file_is_refused(tmp_path):
    path = tmp_path / "field.h5"
    with h5py.File(path, "w") as file:
        file["data"] = np.arange(1000)
    whole = path.read_bytes()
    for content, reason in (
        (b"<html>Not found</html>", "not an HDF5 file: begins with b'<html>No'"),
        (b"", "not an HDF5 file"),
        (bytes(512) + whole, "not an HDF5 file"),
        (whole[:-1000], "cut or damaged"),
        (whole[:9] + b"\xff" * 200, "cut or damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason), hdf5.opened(path, LARGEST):
            pass
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=f"larger than {len(whole) - 1} bytes"):
        hdf5.opened(path, len(whole) - 1).__enter__()
    with pytest.raises(FileNotFoundError), hdf5.opened(tmp_path / "nowhere.h5", LARGEST):
        pass


def test_a_part_that_is_not_there_is_a_refusal_of_the_file(tmp_path):
    path = tmp_path / "field.h5"
    with h5py.File(path, "w") as file:
        file.create_group("what")
    reason = "lacks a part of this product: .*'dataset1' doesn't exist"
    with pytest.raises(ValueError, match=reason), hdf5.opened(path, LARGEST) as file:
        file["dataset1"]


def test_attributes_come_as_plain_values(tmp_path):
    path = tmp_path / "attributes.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs["bytes"] = np.bytes_(b"RATE\0\0")
        file.attrs["text"] = "RATE"
        file.attrs["array of bytes"] = np.array([b"26-AUG-2010"])
        file.attrs["array of one"] = np.array([765], np.int32)
        file.attrs["nested"] = np.array([[0.5]])
        file.attrs["single"] = np.float64(0.5)
        file.attrs["several"] = np.arange(8.0)
        file.attrs["huge"] = np.zeros(2**17 + 1)
    with hdf5.opened(path, 2 * LARGEST) as file:
        for name, value in (
            ("bytes", "RATE"),
            ("text", "RATE"),
            ("array of bytes", "26-AUG-2010"),
            ("array of one", 765),
            ("nested", 0.5),
            ("single", 0.5),
        ):
            got = hdf5.attribute(file, name)
            assert (got, type(got)) == (value, type(value))
        assert np.array_equal(hdf5.attribute(file, "several"), np.arange(8.0))
        with pytest.raises(ValueError, match="/ has no attribute gain"):
            hdf5.attribute(file, "gain")
        with pytest.raises(ValueError, match="huge of / is larger than 1048576 bytes"):
            hdf5.attribute(file, "huge")


def stored(tmp_path: Path, write: Callable[[h5py.File], object]) -> Path:
    path = tmp_path / "stored.h5"
    with h5py.File(path, "w") as file:
        write(file)
    return path


def test_values_come_in_the_shape_and_type_that_was_asked_for(tmp_path):
    field = np.arange(6.0).reshape(2, 3) / 3
    path = stored(tmp_path, lambda file: file.update({"floats": field, "counts": np.uint8([1, 2])}))
    with hdf5.opened(path, LARGEST) as file:
        assert hdf5.values(file["floats"], (2, 3)).dtype == np.float32
        assert np.array_equal(hdf5.values(file["floats"], (2, 3)), field.astype(np.float32))
        assert np.array_equal(hdf5.values(file["floats"], (2, 3), np.float64), field)
        assert hdf5.values(file["counts"], (2,)).dtype == np.uint8
        with pytest.raises(ValueError, match=r"shape \(2, 3\): expected \(3, 2\)"):
            hdf5.values(file["floats"], (3, 2))
        with pytest.raises(ValueError, match="no dataset"):
            hdf5.values(file, (3, 2))


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    chunk=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kind=st.sampled_from(["u1", "<u2", ">u2", "<i4", "<f4", ">f8"]),
    zipped=st.booleans(),
    shuffle=st.booleans(),
)
def test_chunks_are_unpacked_as_the_library_unpacks_them(
    shape, chunk, kind, zipped, shuffle, tmp_path_factory
):
    field = np.random.default_rng(0).integers(0, 200, shape).astype(kind)
    chunks = tuple(min(pair) for pair in zip(shape, chunk, strict=True))
    path = stored(
        tmp_path_factory.mktemp("chunks"),
        lambda file: file.create_dataset(
            "data", data=field, chunks=chunks, shuffle=shuffle, compression="gzip" if zipped else None
        ),
    )
    with hdf5.opened(path, LARGEST) as file:
        assert np.array_equal(hdf5.values(file["data"], shape), field)


def test_missing_parts_are_refused_where_the_library_would_fill_them_with_dryness(tmp_path):
    def write(file: h5py.File) -> None:
        file.create_dataset("never", (4, 4), "u2")
        chunked = file.create_dataset("chunked", (4, 4), "u2", chunks=(2, 2), compression="gzip")
        chunked[:2] = chunked[:, :2] = 7

    with hdf5.opened(stored(tmp_path, write), LARGEST) as file:
        assert file["chunked"][3, 3] == file["never"][0, 0] == 0  # dry, says the library
        with pytest.raises(ValueError, match="/chunked lacks some of its chunks"):
            hdf5.values(file["chunked"], (4, 4))
        with pytest.raises(ValueError, match="/never lacks its values"):
            hdf5.values(file["never"], (4, 4))


def test_a_chunk_in_anothers_place_is_refused(tmp_path):
    path = stored(
        tmp_path,
        lambda file: file.create_dataset(
            "data", data=np.random.default_rng(0).integers(0, 9, (2, 1000)), chunks=(1, 1000)
        ),
    )
    chunks: list[h5py.h5d.StoreInfo] = []
    with hdf5.opened(path, LARGEST) as file:
        file["data"].id.chunk_iter(chunks.append)
        assert hdf5.values(file["data"], (2, 1000)).any()
    first, second = (chunk.byte_offset.to_bytes(8, "little") for chunk in chunks)
    content = path.read_bytes()
    assert content.count(second) == 1
    path.write_bytes(content.replace(second, first))
    with (
        pytest.raises(ValueError, match="/data has two chunks in one place"),
        hdf5.opened(path, LARGEST) as file,
    ):
        hdf5.values(file["data"], (2, 1000))


@pytest.mark.parametrize(
    ("chunk", "mask", "reason"),
    [
        (zlib.compress(bytes(8)), 0, None),
        (zlib.compress(bytes(9)), 0, "expected 8"),
        (zlib.compress(bytes(7)), 0, "expected 8"),
        (zlib.compress(bytes(2**17), 9), 0, "expected 8"),
        (zlib.compress(bytes(50 * 2**20), 9), 0, "a chunk of more than 1033 bytes: a bomb"),
        (zlib.compress(bytes(8))[:-1], 0, "expected 8"),
        (zlib.compress(bytes(8))[:-4] + bytes(4), 0, "damaged chunk"),
        (zlib.compress(bytes(8)) + bytes(1), 0, "expected 8"),
        (bytes(8), 1, "packed otherwise than the rest"),
    ],
    ids=[
        "as it should be",
        "longer",
        "shorter",
        "a small bomb",
        "a bomb",
        "cut",
        "wrong checksum",
        "more behind it",
        "not packed",
    ],
)
def test_a_chunk_is_exactly_what_was_declared(chunk, mask, reason, tmp_path):
    def write(file: h5py.File) -> None:
        dataset = file.create_dataset("data", (2, 2), "u2", chunks=(2, 2), compression="gzip")
        dataset.id.write_direct_chunk((0, 0), chunk, mask)

    with hdf5.opened(stored(tmp_path, write), LARGEST) as file:
        if reason is None:
            assert not hdf5.values(file["data"], (2, 2)).any()
            return
        with pytest.raises(ValueError, match=reason):
            hdf5.values(file["data"], (2, 2))


def test_declared_sizes_and_kinds_are_refused_before_memory_is_spent(tmp_path):
    def write(file: h5py.File) -> None:
        file.create_dataset("wide", (10**5, 10**5), "u1", chunks=(100, 100), compression="gzip")
        file.create_dataset("text", data=[b"no numbers"])
        file.create_dataset("scaled", (2, 2), "i4", chunks=(2, 2), scaleoffset=0)[...] = 1

    with hdf5.opened(stored(tmp_path, write), LARGEST) as file:
        with pytest.raises(ValueError, match="at most 64000000 cells"):
            hdf5.values(file["wide"], (10**5, 10**5))
        with pytest.raises(ValueError, match="expected plain numbers"):
            hdf5.values(file["text"], (1,))
        with pytest.raises(
            ValueError, match=r"filter 6 \(scaleoffset\): expected shuffle, fletcher32, .*h5repack"
        ):
            hdf5.values(file["scaled"], (2, 2))

    huge = stored(
        tmp_path,
        lambda file: file.create_dataset(
            "data", (1, 1), "u1", chunks=(30000, 30000), maxshape=(None, None), compression="gzip"
        ),
    )
    with pytest.raises(ValueError, match="/data has chunks of 900000000 bytes"), hdf5.opened(huge, LARGEST):
        pass


FILTERS = [
    {},
    {"compression": "gzip"},
    {"compression": "gzip", "shuffle": True},
    {"compression": "gzip", "shuffle": True, "fletcher32": True},
    {"shuffle": True, "fletcher32": True},
]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), filters=st.sampled_from(FILTERS), kind=st.sampled_from(["u1", ">i2", "<f4", "S3", "?"])
)
def test_a_part_is_what_the_library_gives_and_what_was_never_written_is_told(
    data, filters, kind, tmp_path_factory
):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    chunks = tuple(data.draw(st.integers(1, size)) for size in shape)
    corners = [range(0, size, step) for size, step in zip(shape, chunks, strict=True)]
    picked = tuple(
        data.draw(st.integers(0, size - 1) | st.builds(slice, st.integers(0, size - 1), st.just(size)))
        for size in shape
    )
    field = np.random.default_rng(0).integers(1, 99, shape).astype(kind)
    written = np.zeros(shape, bool)

    def write(file: h5py.File) -> None:
        dataset = file.create_dataset("data", shape, kind, chunks=chunks, **filters)
        for corner in np.ndindex(*map(len, corners)):
            place = tuple(
                slice(part * step, (part + 1) * step) for part, step in zip(corner, chunks, strict=True)
            )
            if data.draw(st.booleans()):
                dataset[place] = field[place]
                written[place] = True

    with hdf5.opened(stored(tmp_path_factory.mktemp("part"), write), LARGEST) as file:
        values, absent = hdf5.part(file["data"], picked)
        assert np.array_equal(values, file["data"][picked])
        assert values.dtype.kind == file["data"].dtype.kind
    told = np.ones(values.shape, bool)
    for region in absent:
        told[region] = False
    assert np.array_equal(told, written[picked])


@pytest.mark.parametrize("kind", ["<u2", "S2", h5py.enum_dtype({"dry": 0, "wet": 1}, "i2")])
@pytest.mark.parametrize("size", [0, 4, 7, 9, 16, 2**15])
def test_a_part_out_of_a_chunk_of_another_size_is_refused(kind, size, tmp_path):
    def write(file: h5py.File) -> None:
        dataset = file.create_dataset("data", (2, 2, 2), kind, chunks=(1, 2, 2), compression="gzip")
        for place in range(2):
            dataset.id.write_direct_chunk((place, 0, 0), zlib.compress(bytes(size if place else 8)))

    with hdf5.opened(stored(tmp_path, write), LARGEST) as file:
        assert hdf5.part(file["data"], (0, slice(None), slice(None)))[0].shape == (2, 2)
        with pytest.raises(ValueError, match=r"/data has a damaged chunk .* expected 8"):
            hdf5.part(file["data"], (1, slice(None), slice(None)))


def test_a_flipped_bit_is_refused_where_there_is_a_checksum(tmp_path):
    path = tmp_path / "sum.nc"
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("x", 1000)
        packing = {"zlib": True, "shuffle": True, "fletcher32": True}
        file.createVariable("zipped", "f4", ("x",), **packing)[:] = np.arange(1000)
        file.createVariable("plain", "f4", ("x",), fletcher32=True)[:] = np.arange(1000)
    with h5py.File(path) as file:
        chunks = [file[name].id.get_chunk_info(0) for name in ("zipped", "plain")]
    content = path.read_bytes()
    with hdf5.opened(path, LARGEST) as file:
        for name in ("zipped", "plain"):
            assert np.array_equal(hdf5.values(file[name], (1000,)), np.arange(1000))
    for name, chunk in zip(("zipped", "plain"), chunks, strict=True):
        for place in range(chunk.byte_offset, chunk.byte_offset + chunk.size, chunk.size // 20):
            path.write_bytes(content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :])
            with hdf5.opened(path, LARGEST) as file, pytest.raises(ValueError, match="a damaged chunk"):
                hdf5.values(file[name], (1000,))


def test_filters_that_set_no_bound_are_refused_with_their_name_and_what_to_do(tmp_path):
    def write(file: h5py.File) -> None:
        for name, filters in (
            ("lzf", {"compression": "lzf"}),
            ("szip", {"compression": "szip"}),
            ("scaleoffset", {"scaleoffset": 0}),
        ):
            if name != "szip" or h5py.h5z.filter_avail(h5py.h5z.FILTER_SZIP):
                file.create_dataset(name, data=np.zeros((8, 8), "i4"), chunks=(8, 8), **filters)

    with hdf5.opened(stored(tmp_path, write), LARGEST) as file:
        assert {"lzf", "scaleoffset"} <= set(file)
        for name in file:
            with pytest.raises(ValueError, match=rf"filter \d+ \({name}.*h5repack -f SHUF -f GZIP=4 OLD NEW"):
                hdf5.part(file[name], (slice(None), slice(None)))


@pytest.mark.parametrize("packer", ["zstd", "bzip2", "blosc_lz", "blosc_zstd"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_packers_of_newer_netcdf_are_undone_within_bounds(tmp_path, packer, shuffle):
    path = tmp_path / "packed.nc"
    rain = np.random.default_rng(1).integers(0, 50, (40, 30)).astype("i2")
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("y", 40)
        file.createDimension("x", 30)
        how = {"compression": packer, "shuffle": shuffle, "chunksizes": (16, 16)}
        file.createVariable("rain", "i2", ("y", "x"), **how)[:] = rain
    with hdf5.opened(path, LARGEST) as file:
        np.testing.assert_array_equal(hdf5.values(file["rain"], (40, 30)), rain)
    with h5py.File(path, "r+") as file:
        _, packed = file["rain"].id.read_direct_chunk((0, 0))
        file["rain"].id.write_direct_chunk((0, 0), packed[: len(packed) // 2])
    with (
        hdf5.opened(path, LARGEST) as file,
        pytest.raises(ValueError, match=r"/rain has a damaged chunk .*fetch it again"),
    ):
        hdf5.values(file["rain"], (40, 30))


def test_texts_and_truths_are_those_of_the_library(tmp_path):
    labels = np.array([f"Größe {number}" for number in range(12)], object).reshape(3, 4)
    told: dict[str, dict] = {
        "one": {"data": "text", "dtype": h5py.string_dtype()},
        "any": {"data": labels, "dtype": h5py.string_dtype()},
        "zipped": {"data": labels, "dtype": h5py.string_dtype(), "chunks": (2, 2), "compression": "gzip"},
        "fixed": {"data": np.array([b"ab", b"c"])},
        "truths": {"data": np.array([True, False])},
        "never": {"shape": (4,), "dtype": h5py.string_dtype(), "chunks": (2,), "compression": "gzip"},
    }

    def write(file: h5py.File) -> None:
        for name, how in told.items():
            file.create_dataset(name, **how)
        file.create_dataset("shuffled", shuffle=True, **told["zipped"])

    with hdf5.opened(stored(tmp_path, write), LARGEST) as file:
        for name, dataset in file.items():
            values, absent = hdf5.part(dataset, tuple(slice(None) for _ in dataset.shape))
            assert np.array_equal(values, np.asarray(dataset[()]))
            assert absent == ([(slice(0, 2),), (slice(2, 4),)] if name == "never" else [])
        assert hdf5.part(file["any"], (1, slice(2, 4)))[0].tolist() == [
            "Größe 6".encode(),
            "Größe 7".encode(),
        ]


def test_one_text_that_stands_for_many_is_counted_each_time(tmp_path):
    def write(file: h5py.File) -> None:
        dataset = file.create_dataset("data", (100,), h5py.string_dtype(), chunks=(10,), compression="gzip")
        dataset[:10] = ["x" * 2**20] + ["y"] * 9
        _, packed = dataset.id.read_direct_chunk((0,))
        long = zlib.decompress(packed)[:16]
        for first in range(0, 100, 10):
            dataset.id.write_direct_chunk((first,), zlib.compress(10 * long))

    with hdf5.opened(stored(tmp_path, write), 2**22) as file:
        assert len(hdf5.part(file["data"], (slice(0, 16),))[0]) == 16
        with pytest.raises(ValueError, match="/data holds more than 16777216 bytes of text"):
            hdf5.part(file["data"], (slice(None),))
