"""`Repository`: a transactional Zarr v3 store at a folder or URL (Icechunk, specification 1 and 2)."""

import atexit
import ctypes
import lzma
import os
import random
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import icechunk
import numpy as np
import xarray as xr
import zarr
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.codecs.numcodecs import LZMA, Shuffle
from zarr.errors import ZarrUserWarning

BRANCH = "main"
URL = re.compile(r"\w+://|(?:s3|gs|https?):")  # also without its slashes: no folder is meant
LOCK_WAIT = 600.0  # s that a writer waits for another one on a local store
CLOCK_WAIT = 60.0  # s that a writer waits where the newest commit is of later than its own clock
CONFLICT_TRIES = 8  # on object stores, where writers meet only at the commit

# What Icechunk's errors say, which have no kinds of their own.
NO_BUCKET = re.compile("NoSuchBucket|specified bucket does not exist")
NO_RIGHT = re.compile("AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|[Cc]redential|token request")
NO_ANSWER = re.compile("dispatch failure|[Tt]imed? ?out|error sending request")
CAUSED = re.compile(r"^(?:x|×|[`╰|├][-─]*[>▶]) *")  # before an error, and before each that it came from
TOLD = re.compile(r'code: "(\w+)", message: "([^"]+)"')

# Zarr's zstd has no checksum: with crc32c last, a damaged byte is an error and not another number. Arrays
# tell their own codecs, so those that were written with others are read and appended to.
COMPRESSORS = (ZstdCodec(level=1), Crc32cCodec())
# For what is kept for years. No shuffle: few different rates occur, so their bytes are packed best side by
# side. It takes a seventh less than level 1, is read as fast and makes writing a frame a sixth slower.
ARCHIVED = (ZstdCodec(level=7), Crc32cCodec())
# For counts that are kept for years (pipelines.counts): a sixth less than by Zstandard at its highest level,
# and written sooner. Zarr-Python reads it as it comes, but Zarr's specification does not name it yet.
LZMA2 = {
    "id": lzma.FILTER_LZMA2,
    "dict_size": 2**20,
    "lc": 4,
    "lp": 0,
    "pb": 0,
    "mode": lzma.MODE_NORMAL,
    "mf": lzma.MF_HC3,
    "nice_len": 64,
    "depth": 8,
}
warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3", ZarrUserWarning)
COUNTED = (Shuffle(elementsize=2), LZMA(format=lzma.FORMAT_RAW, filters=[LZMA2]), Crc32cCodec())
Compressors = tuple[BytesBytesCodec, ...]
RANGES = {
    "valid_range",
    "valid_min",
    "valid_max",
    "flag_values",
    "flag_masks",
}  # attributes of their array's type

# A thread of Icechunk that still lets go of its last Python object when the interpreter ends aborts the
# process (PyO3/pyo3-async-runtimes#40): give it the time to do so.
atexit.register(time.sleep, 0.1)

if "ICECHUNK_LOG" not in os.environ:
    # Icechunk warns on every local store that commits need a lock; this module holds one.
    icechunk.set_logs_filter("error")


class Repository:
    """One Icechunk repository. Reading sees one snapshot; writing is one commit, or nothing at all."""

    def __init__(self, path: str, repository: icechunk.Repository):
        """Use `open` or `open_or_create`."""
        self.path = path
        self._repository = repository

    @classmethod
    def open(cls, path: str) -> "Repository":
        """The repository at a local folder, or at an s3:// or gs:// URL.

        Raises:
            ValueError: if there is none, saying what is there instead.
            OSError: if the object store does not answer.
        """
        if not _is_remote(path) and not (Path(path).is_dir() and any(Path(path).iterdir())):
            raise ValueError(f"{path}: {_found(path)}")
        try:
            return cls(path, icechunk.Repository.open(_storage(path), config=_config()))
        except icechunk.IcechunkError as error:
            raise _unopened(path, error) from error

    @classmethod
    def open_or_create(cls, path: str) -> "Repository":
        """The repository at `path`; a new one where nothing is.

        Raises:
            ValueError: if something else is there, or the path names no place for one.
            OSError: if the object store does not answer.
        """
        if _is_remote(path):
            try:
                there = icechunk.Repository.exists(_storage(path))
            except icechunk.IcechunkError as error:
                raise _unopened(path, error) from error
            if not there:
                try:
                    icechunk.Repository.create(_storage(path), config=_config())
                except icechunk.IcechunkError:
                    return cls.open(path)  # made by someone else in this moment, or the reason why not
        elif not Path(path).exists() or (Path(path).is_dir() and not any(Path(path).iterdir())):
            try:
                _create_folder(Path(path))
            except PermissionError as error:
                raise _forbidden(path, error) from error
        return cls.open(path)

    @property
    def snapshot(self) -> str:
        """The newest snapshot of the branch `main`."""
        return self._repository.lookup_branch(BRANCH)

    def history(self, count: int) -> list[tuple[datetime, str, str]]:
        """When, what and the snapshot id of the newest `count` commits of the branch `main`, newest first."""
        newest = islice(self._repository.ancestry(branch=BRANCH), count)
        return [(commit.written_at, commit.message, commit.id) for commit in newest]

    def tags(self) -> dict[str, str]:
        """The snapshot id of each tag, in the order of their names: rollbacks in the order of time."""
        return {tag: self._repository.lookup_tag(tag) for tag in sorted(self._repository.list_tags())}

    def rollback(self, snapshot: str) -> tuple[str, str]:
        """Makes another snapshot the newest; gives its id, and the tag that keeps what was the newest.

        Raises:
            ValueError: if it is no tag, and no snapshot of the branch `main` or of what a tag keeps, or is
                the newest already.
        """
        with self._told(), self._lock():
            newest, tags = self.snapshot, self.tags()
            snapshot = tags.get(snapshot, snapshot)
            lines = [{"branch": BRANCH}, *({"tag": tag} for tag in tags)]
            known = {commit.id: commit for line in lines for commit in self._repository.ancestry(**line)}
            if snapshot in known and known[snapshot].parent_id is None:
                raise ValueError(
                    f"{self.path}: {snapshot} is of before anything was written; a new path begins afresh"
                )
            if snapshot == newest or snapshot not in known:
                raise ValueError(
                    f"{self.path}: {snapshot} is "
                    + ("the newest snapshot already" if snapshot == newest else "no snapshot of its history")
                    + "; metnet inspect lists the newest ones, and the tags of rollbacks"
                )
            tag = f"before-rollback-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
            self._repository.create_tag(tag, snapshot_id=newest)
            self._settle()
            self._repository.reset_branch(BRANCH, snapshot, from_snapshot_id=newest)
            self._settle()
        return snapshot, tag

    def _settle(self) -> None:
        """Returns when what was written cannot be lost any more."""
        if not _is_remote(self.path):
            _wait_for_disk(self.path)

    def reader(self, snapshot: str) -> icechunk.IcechunkStore:
        """The store as it was at a snapshot; later commits do not change it."""
        return self._repository.readonly_session(snapshot_id=snapshot).store

    def dataset(self, snapshot: str, group: str) -> xr.Dataset:
        """A group as it was at a snapshot, as a CF dataset, read when it is used."""
        dataset: xr.Dataset = xr.open_dataset(
            self.reader(snapshot),  # type: ignore[arg-type]
            engine="zarr",
            group=group,
            backend_kwargs={"consolidated": False, "zarr_format": 3},
            decode_coords="all",
            decode_timedelta=False,
        )
        for name in dataset.coords:  # CF-1.11 section 2.5.1: coordinates have no missing values
            dataset[name].encoding["_FillValue"] = None
        # And a range has the type of its variable, or of the numbers that it is packed in.
        for array in dataset.data_vars.values():
            dtype = array.encoding["dtype"] if "scale_factor" in array.encoding else array.dtype
            for name in RANGES & set(array.attrs):
                array.attrs[name] = np.asarray(array.attrs[name], dtype)
        return dataset

    def commit(self, message: str, edit: Callable[[icechunk.IcechunkStore], None]) -> str | None:
        """Runs `edit` on the newest state and commits what it did; None if it did nothing.

        Local stores are locked meanwhile. On object stores `edit` runs again, on the newest state,
        if another writer committed first; so it must decide anew each time.

        Raises:
            ValueError: if other writers kept the store busy all the time.
            OSError: if the store does not take it.
        """
        for attempt in range(CONFLICT_TRIES):
            try:
                with self._told(), self._lock():
                    session = self._repository.writable_session(BRANCH)
                    edit(session.store)
                    return self._publish(session, message, None) if session.has_uncommitted_changes else None
            except icechunk.ConflictError:
                time.sleep(random.uniform(0.05, 0.1) * 2**attempt)
        raise ValueError(
            f"{self.path}: other writers committed first {CONFLICT_TRIES} times; try again when they are done"
        )

    def add_group(
        self, name: str, message: str, fill: Callable[[zarr.Group], None], replace: bool = False
    ) -> str | None:
        """Makes a group at the root and commits it whole; None if there is one of that name already.

        With `replace` that is deleted in the same commit, unless another writer changed it meanwhile.

        `fill` runs once, and unlocked, as it may take long: groups of other names do not conflict. It does
        not run if the group is there and to stay; if another writer commits one meanwhile, that one stays.

        Raises:
            ValueError: if another writer kept the store busy all the time.
            OSError: if the store does not take it.
        """
        session = self._repository.writable_session(BRANCH)
        root = zarr.open_group(session.store, mode="r+", zarr_format=3)
        if name in root and not replace:
            return None
        try:
            with self._told():
                fill(root.create_group(name, overwrite=replace))
                with self._lock():
                    return self._publish(session, message, icechunk.ConflictDetector())
        except (icechunk.ConflictError, icechunk.RebaseFailedError):
            if name in zarr.open_group(self.reader(self.snapshot), mode="r", zarr_format=3):
                return None
            raise

    def _publish(
        self, session: icechunk.Session, message: str, solver: icechunk.ConflictSolver | None
    ) -> str:
        """`_published`, once it is later than the newest commit, which Icechunk wants of each.

        Raises:
            OSError: if by the clock of this machine that is not so for long.
        """
        waited = 0.0
        while True:
            try:
                return self._published(session, message, solver)
            except icechunk.IcechunkError as error:
                if "timestamp ordering" not in str(error):
                    raise
                (newest, _, _), now = self.history(1)[0], datetime.now(UTC)
                wait = max(0.0, (newest - now).total_seconds()) + 0.5
                waited += wait
                if waited > CLOCK_WAIT:
                    raise OSError(
                        f"{self.path}: its newest commit is of {newest:%Y-%m-%dT%H:%M:%SZ}, but the clock "
                        f"says {now:%Y-%m-%dT%H:%M:%SZ}, so none can follow; put the clock right, or metnet "
                        "rollback to a snapshot of before it was wrong"
                    ) from error
                time.sleep(wait)

    def _published(
        self, session: icechunk.Session, message: str, solver: icechunk.ConflictSolver | None
    ) -> str:
        """Makes a session the tip of the branch; with a solver, on top of what others committed meanwhile.

        On a local store the branch moves only when the disk holds all that it will point to, and the commit
        is acknowledged only when the disk holds the branch: Icechunk itself does not wait for the disk.
        """
        if _is_remote(self.path):
            return session.commit(message, rebase_with=solver)
        base = self.snapshot
        if session.snapshot_id != base and solver is not None:
            if all(commit.id != session.snapshot_id for commit in self._repository.ancestry(branch=BRANCH)):
                raise OSError(f"{self.path}: was rolled back meanwhile; give the same command again")
            session.rebase(solver)
        snapshot = session.flush(message)
        _wait_for_disk(self.path)
        self._repository.reset_branch(BRANCH, snapshot, from_snapshot_id=base)
        _wait_for_disk(self.path)
        return snapshot

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Says in one line what keeps the store from being written; conflicts are for the caller."""
        try:
            yield
        except (icechunk.ConflictError, icechunk.RebaseFailedError):
            raise
        except icechunk.IcechunkError as error:
            raise OSError(f"{self.path}: cannot be written: {_cause(error)}") from error

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One writer at a time on a local store, where Icechunk loses one of two commits made at once."""
        if _is_remote(self.path):
            yield
            return
        if not (Path(self.path) / "snapshots").is_dir():  # the lock would make the folder anew
            raise OSError(f"{self.path}: is gone; was it moved or deleted?")
        try:
            held = FileLock(Path(self.path) / "write.lock", timeout=LOCK_WAIT).acquire()
        except PermissionError as error:
            raise _forbidden(self.path, error) from error
        except Timeout as error:
            raise ValueError(
                f"{self.path}: another process has been writing here for {LOCK_WAIT:g} s; "
                "try again when it is done"
            ) from error
        with held:
            yield


def create_array(
    group: zarr.Group,
    name: str,
    dimensions: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: str,
    attributes: dict[str, Any],
    chunks: tuple[int, ...] | None = None,
    compressors: Compressors = COMPRESSORS,
    fill_value: int = 0,
) -> "zarr.Array[Any]":
    """An empty array with named dimensions; until written, floats read as NaN, others as `fill_value`."""
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks or tuple(max(1, size) for size in shape),
        dtype=dtype,
        fill_value=np.nan if dtype.startswith("f") else fill_value,
        compressors=compressors,
        dimension_names=dimensions,
        attributes=attributes,
    )


def store_array(
    group: zarr.Group,
    name: str,
    dimensions: tuple[str, ...],
    values: NDArray[Any],
    attributes: dict[str, Any],
    chunks: tuple[int, ...] | None = None,
) -> None:
    """An array that is written once."""
    array = create_array(group, name, dimensions, values.shape, values.dtype.str[1:], attributes, chunks)
    array[...] = values


def _forbidden(path: str, error: PermissionError) -> PermissionError:
    """Why nothing can be written at a place, and what to do."""
    return PermissionError(
        f"{path}: cannot be written ({error}); give this user the right to, or choose another place"
    )


def _unopened(path: str, error: icechunk.IcechunkError) -> ValueError | OSError:
    """Why a repository cannot be opened, and what to do."""
    said, cause = str(error), _cause(error)
    if not _is_remote(path):
        return ValueError(f"{path}: {_found(path)} ({cause})")
    if NO_BUCKET.search(said):
        return ValueError(f"{path}: there is no bucket {urlsplit(path).netloc!r}; make it, or name another")
    if NO_RIGHT.search(said):
        return ValueError(
            f"{path}: the object store does not let you in ({cause}); for s3:// set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, for gs:// GOOGLE_APPLICATION_CREDENTIALS"
        )
    if NO_ANSWER.search(said):
        return OSError(
            f"{path}: the object store does not answer ({cause}); look whether it can be reached, and at "
            "AWS_ENDPOINT_URL if that is set"
        )
    return ValueError(f"{path}: {_found(path)} ({cause})")


def _cause(error: Exception) -> str:
    """What an Icechunk error came from, in one line, without its trace."""
    lines = [line.strip(" |") for line in str(error).splitlines() if line.strip(" |")]
    if not lines:
        return type(error).__name__
    chain = [line for line in lines if CAUSED.match(line)]
    cause = CAUSED.sub("", chain[-1] if chain else lines[0])
    if told := TOLD.search(cause):  # as S3 answers
        return f"{told[1]}: {told[2]}"
    return cause


def _wait_for_disk(path: str) -> None:
    """Returns when the disk holds everything written to its file system so far; Windows has no such call."""
    if not hasattr(os, "sync"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "syncfs"):  # of Linux; elsewhere all file systems have to be waited for
        os.sync()
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        if libc.syncfs(folder):
            raise OSError(ctypes.get_errno(), "the disk did not take what was written", path)
    finally:
        os.close(folder)


def _is_remote(path: str) -> bool:
    return URL.match(path) is not None


def _storage(path: str) -> icechunk.Storage:
    """Where a path points to; S3 takes its keys, region and endpoint from the usual AWS_* environment."""
    if not _is_remote(path):
        return icechunk.local_filesystem_storage(str(Path(path).resolve()))
    url = urlsplit(path)
    prefix = url.path.strip("/") or None
    if "://" not in path or not url.netloc:
        raise ValueError(f"{path}: names no bucket; expected s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    if url.scheme == "gs":
        return icechunk.gcs_storage(bucket=url.netloc, prefix=prefix, from_env=True)
    if url.scheme != "s3":
        raise ValueError(f"{path}: expected a local folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return icechunk.s3_storage(
        bucket=url.netloc,
        prefix=prefix,
        region=region or ("us-east-1" if endpoint else None),
        endpoint_url=endpoint,
        allow_http=endpoint is not None and endpoint.startswith("http://"),
        force_path_style=endpoint is not None,
        from_env=True,
    )


def _config() -> icechunk.RepositoryConfig:
    """Splits the list of chunks along time, so that a commit rewrites a part of it and not all years."""
    split = icechunk.ManifestSplittingConfig.from_dict(
        {
            icechunk.ManifestSplitCondition.AnyArray(): {
                icechunk.ManifestSplitDimCondition.DimensionName("time"): 1024
            }
        }
    )
    return icechunk.RepositoryConfig(manifest=icechunk.ManifestConfig(splitting=split))


def _create_folder(path: Path) -> None:
    """Makes a repository aside and moves it into place whole, so that no kill leaves half of one."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        (aside / path.name).mkdir()
        icechunk.Repository.create(_storage(str(aside / path.name)), config=_config())
        (aside / path.name).rename(path)
    except OSError:
        if not (path.is_dir() and any(path.iterdir())):
            # A mount point, which nothing can be moved onto.
            icechunk.Repository.create(_storage(str(path)), config=_config())
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _found(path: str) -> str:
    """What is at a path that is no repository, and what to do."""
    advice = "give the path of a cube that `metnet ingest` made, or of forecasts that `metnet forecast` made"
    if _is_remote(path):
        return f"nothing here yet (or no right to read it); {advice}"
    place = Path(path)
    if not place.exists():
        return f"no such folder; {advice}"
    if place.is_file():
        return f"a file, not the folder of an Icechunk repository; {advice}"
    if not any(place.iterdir()):
        return f"an empty folder; {advice}"
    if any((place / name).exists() for name in ("zarr.json", ".zgroup", ".zarray", ".zmetadata")):
        return f"a plain Zarr store, not an Icechunk repository; {advice}"
    if (place / "snapshots").is_dir():
        return "an Icechunk repository that cannot be read"
    names = ", ".join(sorted(entry.name for entry in place.iterdir())[:3])
    return f"a folder that is no Icechunk repository (it holds {names}); {advice}"
