"""The store underneath: what is there, who may write, what a commit is."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import icechunk
import numpy as np
import pytest
import xarray as xr
import zarr
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec, ZstdCodec

from pipelines import repository
from pipelines.repository import Repository, create_array
from tests.pipelines.ordinary_user import ordinary_user


def names(place: Repository) -> set[str]:
    return set(zarr.open_group(place.reader(place.snapshot), mode="r"))


def make(name):
    return lambda store: zarr.open_group(store, mode="a", zarr_format=3).create_group(name)


@pytest.mark.parametrize(
    ("prepare", "found"),
    [
        (lambda place: None, "no such folder"),
        (lambda place: place.mkdir(), "an empty folder"),
        (lambda place: place.write_text("rain"), "a file, not the folder"),
        (lambda place: zarr.create_group(place), "a plain Zarr store"),
        (lambda place: (place / "photos").mkdir(parents=True), r"no Icechunk repository \(it holds photos\)"),
        (
            lambda place: (place / "snapshots").mkdir(parents=True),
            "an Icechunk repository that cannot be read",
        ),
    ],
)
def test_what_is_there_instead_of_a_repository_is_said_and_left_alone(tmp_path, prepare, found):
    place = tmp_path / "place"
    prepare(place)
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(ValueError, match=found):
        Repository.open(str(place))

    assert sorted(tmp_path.rglob("*")) == before


def test_a_new_repository_never_takes_the_place_of_something_else(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="it holds photos"):
        Repository.open_or_create(str(tmp_path))
    with pytest.raises(ValueError, match="expected a local folder, s3://"):
        Repository.open_or_create("ftp://host/cube")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("s3://not-there/cube", "there is no bucket 'not-there'; make it, or name another"),
        ("s3:///cube", "names no bucket; expected s3://BUCKET/PREFIX"),
        ("s3:radar/cube", "names no bucket; expected s3://BUCKET/PREFIX"),
        ("s3://radar/nothing", "nothing here yet"),
    ],
)
def test_a_url_without_a_repository_is_told_in_our_words(s3, path, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opening = [Repository.open] if "nothing" in path else [Repository.open, Repository.open_or_create]
    for opened in opening:
        with pytest.raises(ValueError, match=f"^{path}: {said}") as raised:
            opened(path)
        assert len(str(raised.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("trace", "kind", "said"),
    [
        (
            "  x error getting object dispatch failure\n  | \n  |-> dispatch failure\n  |-> io error\n"
            "  `-> Connection refused (os error 111)\n",
            OSError,
            r"does not answer \(Connection refused \(os error 111\)\); .*AWS_ENDPOINT_URL",
        ),
        (
            '  x service error\n  `-> Error { code: "AccessDenied", message: "Access Denied", id: "1" }\n',
            ValueError,
            r"does not let you in \(AccessDenied: Access Denied\); .*AWS_ACCESS_KEY_ID",
        ),
        ("  x something else\n  |\n  | context:\n", ValueError, r"nothing here yet .* \(something else\)"),
    ],
)
def test_what_keeps_a_bucket_closed_is_told_without_the_trace(monkeypatch, trace, kind, said):
    def fail(*_, **__):
        raise icechunk.IcechunkError(trace)

    monkeypatch.setattr(icechunk.Repository, "open", fail)
    with pytest.raises(kind, match=f"^s3://radar/cube: .*{said}"):
        Repository.open("s3://radar/cube")


def test_a_new_repository_leaves_nothing_beside_it(tmp_path):
    Repository.open_or_create(str(tmp_path / "deep" / "cube"))
    assert [place.name for place in (tmp_path / "deep").iterdir()] == ["cube"]


def test_many_creators_at_once_make_one_repository(tmp_path):
    start = Barrier(6)

    def create(i):
        start.wait()
        place = Repository.open_or_create(str(tmp_path / "cube"))
        place.commit("one", make(f"group{i}"))

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(create, range(6)))

    assert names(Repository.open(str(tmp_path / "cube"))) == {f"group{i}" for i in range(6)}


@pytest.mark.parametrize("kind", ["local", "object store"])
def test_commits_at_the_same_time_are_all_kept_in_one_line(tmp_path, s3, kind):
    path = str(tmp_path / "cube") if kind == "local" else f"{s3}/line"
    Repository.open_or_create(path).commit("start", make("start"))

    def write(writer):
        place = Repository.open(path)
        return [place.commit("one", make(f"group{writer}-{i}")) for i in range(4)]

    with ThreadPoolExecutor(3) as threads:
        acknowledged = [snapshot for snapshots in threads.map(write, range(3)) for snapshot in snapshots]

    place = Repository.open(path)
    assert names(place) == {"start"} | {f"group{writer}-{i}" for writer in range(3) for i in range(4)}
    history = {entry.id for entry in place._repository.ancestry(branch="main")}
    assert len(set(acknowledged)) == 12
    assert set(acknowledged) <= history


def test_a_commit_that_does_nothing_makes_no_snapshot(tmp_path):
    place = Repository.open_or_create(str(tmp_path / "cube"))
    before = place.snapshot
    assert place.commit("nothing", lambda store: None) is None
    assert place.snapshot == before


def test_an_edit_that_fails_changes_nothing(tmp_path):
    place = Repository.open_or_create(str(tmp_path / "cube"))
    before = place.snapshot

    def edit(store):
        make("half")(store)
        raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        place.commit("fails", edit)

    assert place.snapshot == before
    assert names(Repository.open(str(tmp_path / "cube")) if place.commit("root", make("a")) else place) == {
        "a"
    }


def test_a_store_that_stays_busy_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(repository, "LOCK_WAIT", 0.05)
    place = Repository.open_or_create(str(tmp_path / "cube"))
    with (
        FileLock(tmp_path / "cube" / "write.lock"),
        pytest.raises(ValueError, match="another process has been writing here"),
    ):
        place.commit("waits", make("a"))


@pytest.mark.parametrize("kind", ["local", "object store"])
def test_of_two_groups_of_one_name_made_at_once_one_stays_and_others_are_not_disturbed(tmp_path, s3, kind):
    path = str(tmp_path / "runs") if kind == "local" else f"{s3}/two"
    Repository.open_or_create(path).commit("start", make("start"))
    both_filling = Barrier(3)

    def add(name):
        def fill(group):
            both_filling.wait(timeout=20)
            group.attrs["by"] = "somebody"

        return Repository.open(path).add_group(name, "a run", fill)

    with ThreadPoolExecutor(3) as threads:
        same, also_same, other = threads.map(add, ["run", "run", "other"])

    assert (same is None) != (also_same is None)
    assert other is not None
    assert names(Repository.open(path)) == {"start", "run", "other"}


def test_the_branch_moves_only_after_the_disk_has_the_data(tmp_path, monkeypatch):
    place = Repository.open_or_create(str(tmp_path / "cube"))
    base = place.snapshot
    seen = []
    monkeypatch.setattr(repository, "_wait_for_disk", lambda path: seen.append(place.snapshot))

    snapshot = place.commit("one", make("a"))

    assert seen == [base, snapshot]


def test_a_disk_that_refuses_the_data_makes_the_commit_fail(tmp_path, monkeypatch):
    place = Repository.open_or_create(str(tmp_path / "cube"))
    base = place.snapshot

    def refuse(path):
        raise OSError("no space")

    monkeypatch.setattr(repository, "_wait_for_disk", refuse)
    with pytest.raises(OSError, match="no space"):
        place.commit("one", make("a"))
    assert place.snapshot == base


@pytest.mark.parametrize("position", range(0, 400, 40))
def test_a_flipped_bit_is_an_error_and_never_another_number(tmp_path, position):
    place = Repository.open_or_create(str(tmp_path / "cube"))
    values = np.random.default_rng(position).random((20, 30), dtype=np.float32)

    def edit(store):
        group = zarr.open_group(store, mode="a", zarr_format=3)
        create_array(group, "rain", ("y", "x"), (20, 30), "f4", {})[...] = values

    snapshot = place.commit("rain", edit)
    [chunk] = (tmp_path / "cube" / "chunks").iterdir()
    content = bytearray(chunk.read_bytes())
    content[position % len(content)] ^= 1 << position % 8
    chunk.write_bytes(content)

    with pytest.raises((ValueError, RuntimeError, OSError, icechunk.IcechunkError)):
        zarr.open_group(Repository.open(place.path).reader(snapshot), mode="r")["rain"][...]


def test_a_place_where_this_user_may_not_write_is_told_with_what_to_do(tmp_path):
    store = tmp_path / "store"
    repository = Repository.open_or_create(str(store))
    snapshot = repository.snapshot
    repository.commit("a group", lambda made: zarr.open_group(made, mode="a").create_group("a"))
    for place in (store / "write.lock", store, tmp_path):
        place.chmod(0o500)
    try:
        with ordinary_user():
            with pytest.raises(PermissionError, match=rf"^{store}: cannot be written .*; give this user"):
                repository.rollback(snapshot)
            with pytest.raises(PermissionError, match=r"/new: cannot be written .*; give this user"):
                Repository.open_or_create(str(tmp_path / "new"))
    finally:
        for place in (tmp_path, store):
            place.chmod(0o700)


def test_a_store_that_cannot_be_written_is_told_in_one_line(tmp_path):
    place = Repository.open_or_create(str(tmp_path / "cube"))
    (tmp_path / "cube" / "chunks").write_text("in the way")

    def edit(store):
        group = zarr.open_group(store, mode="a", zarr_format=3)
        create_array(group, "rain", ("y", "x"), (20, 30), "f4", {})[...] = np.random.default_rng(0).random(
            (20, 30)
        )

    with pytest.raises(OSError, match="cannot be written") as raised:
        place.commit("rain", edit)
    assert len(str(raised.value).splitlines()) == 1


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
@settings(max_examples=30)
def test_any_float_comes_back_to_the_last_bit_through_codecs_that_every_zarr_knows(bits):
    values = np.array(bits, np.uint32).view(np.float32)
    values[np.isnan(values)] = np.nan  # "not observed" has one pattern of bits
    store = zarr.storage.MemoryStore()
    array = create_array(zarr.open_group(store), "rain", ("x",), values.shape, "f4", {})
    array[...] = values

    described = zarr.open_group(store)["rain"].metadata.to_dict()["codecs"]
    assert [codec["name"] for codec in described] == ["bytes", "zstd", "crc32c"]
    with xr.open_zarr(store, consolidated=False, mask_and_scale=False) as dataset:
        assert np.array_equal(dataset["rain"].values.view(np.uint32), values.view(np.uint32))


def test_an_array_written_with_other_codecs_is_read_and_goes_on_with_them(tmp_path):
    first, second = np.random.default_rng(0).gamma(0.5, 4.0, (2, 60, 50)).astype(np.float32)
    first[:9], second[-9:] = np.nan, 0.0
    place = Repository.open_or_create(str(tmp_path / "cube"))

    def begin(store):
        array = create_array(
            zarr.open_group(store, mode="a"), "rain", ("time", "y", "x"), (1, 60, 50), "f4", {}, None, older
        )
        array[0] = first

    def append(store):
        array = zarr.open_group(store, mode="r+")["rain"]
        array.resize((2, 60, 50))
        array[1] = second

    older = (ZstdCodec(level=3), Crc32cCodec())
    place.commit("begun", begin)
    place = Repository.open(str(tmp_path / "cube"))
    place.commit("appended", append)

    array = zarr.open_group(place.reader(place.snapshot), mode="r")["rain"]
    assert array.compressors == older
    assert np.array_equal(array[:].view(np.uint32), np.stack([first, second]).view(np.uint32))
