"""HDF5 files from outside (netCDF-4 included), opened so that they give only what lies in them.

HDF5 lets a file point at other files: by external links, datasets stored outside, and virtual datasets.
The library follows all three without a word, so a feed could have any readable file published as weather.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pipelines.formats.inflate import inflated

MAGIC = b"\x89HDF\r\n\x1a\n"
MOST_CELLS = 64 * 10**6  # of a field
MOST_LINKS = 10_000  # that a file may hold; the products of weather services have some hundreds
LARGEST_CHUNK = MOST_CELLS * 8  # bytes unpacked
SHUFFLE, DEFLATE = h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE
LARGEST_ATTRIBUTE = 2**20  # bytes


@contextmanager
def opened(path: Path, largest: int) -> Iterator[h5py.File]:
    """The file, for reading, once it is known to hold no way out of itself.

    What the library raises while the file is read (a damaged chunk, an object that is not there) is
    raised as ValueError.

    Raises:
        ValueError: if it is no HDF5 file, has more than `largest` bytes, is damaged, or points at
            other files anywhere in it.
        OSError: if it cannot be opened at all.
    """
    _check_begin(path, largest)
    try:
        with h5py.File(path, "r", locking=False) as file:
            _check_contents(file)
            yield file
    except (OSError, RuntimeError) as error:
        raise ValueError(f"a cut or damaged HDF5 file, fetch it again ({error})") from error
    except KeyError as error:
        raise ValueError(f"lacks a part of this product: {error.args[0]}") from error


def attribute(node: h5py.HLObject, name: str) -> object:
    """An attribute as a plain value: text decoded, one element out of its array, longer arrays as they are.

    Raises:
        ValueError: if the object has no such attribute, or an unreadable one.
    """
    held = node.attrs
    if name not in held:
        raise ValueError(f"{node.name} has no attribute {name}")
    stored = held.get_id(name)
    if stored.get_storage_size() > LARGEST_ATTRIBUTE:
        raise ValueError(f"the attribute {name} of {node.name} is larger than {LARGEST_ATTRIBUTE} bytes")
    try:
        value = held[name]
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"the attribute {name} of {node.name} cannot be read ({error})") from error
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, bytes):
        return value.rstrip(b"\0").decode("utf-8", errors="replace")
    return value.item() if isinstance(value, np.generic) else value


def values(node: object, shape: tuple[int, ...], floats: type[np.floating[Any]] = np.float32) -> NDArray[Any]:
    """All values of a dataset of numbers: floats as `floats`, integers as they are stored.

    In place of a chunk that is not there HDF5 gives the fill value, which may well be 0 (dry), without a
    word. So all chunks must be there, each in its place and packed like the others.

    Raises:
        ValueError: if it is no dataset of numbers of this shape, or lacks a part.
    """
    if not isinstance(node, h5py.Dataset):
        raise ValueError(f"{node} is no dataset")
    if node.shape != shape or np.prod(shape, dtype=object) > MOST_CELLS:
        raise ValueError(
            f"{node.name} has the shape {node.shape}: expected {shape}, at most {MOST_CELLS} cells"
        )
    if node.dtype.kind not in "iuf" or node.id.get_type() != h5py.h5t.py_create(node.dtype):
        raise ValueError(f"{node.name} holds {node.dtype}: expected plain numbers")
    kind = np.dtype(floats) if node.dtype.kind == "f" else node.dtype
    if node.chunks is not None:
        return _chunked(node, kind)
    if node.id.get_storage_size() != node.nbytes:
        raise ValueError(f"{node.name} lacks its values; a damaged file, fetch it again")
    return node.astype(kind)[...]


def _chunked(dataset: h5py.Dataset, kind: np.dtype[Any]) -> NDArray[Any]:
    """All values of a dataset in chunks, unpacked here: HDF5 sets no bound to what a chunk may grow to."""
    plan = dataset.id.get_create_plist()
    filters = [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]
    if filters not in ([], [SHUFFLE], [DEFLATE], [SHUFFLE, DEFLATE]):
        raise ValueError(f"{dataset.name} is packed by the filters {filters}: expected shuffle and deflate")
    stored: list[h5py.h5d.StoreInfo] = []
    dataset.id.chunk_iter(stored.append)
    sides = [range(0, size, step) for size, step in zip(dataset.shape, dataset.chunks, strict=True)]
    if sorted(chunk.chunk_offset for chunk in stored) != list(product(*sides)):
        raise ValueError(f"{dataset.name} lacks some of its chunks; a damaged file, fetch it again")
    places = sorted((chunk.byte_offset, chunk.size) for chunk in stored)
    if any(first + size > next_ for (first, size), (next_, _) in pairwise(places)):
        raise ValueError(f"{dataset.name} has two chunks in one place; a damaged file, fetch it again")
    field = np.empty(dataset.shape, kind)
    for chunk in stored:
        skipped, packed = dataset.id.read_direct_chunk(chunk.chunk_offset)
        if skipped:
            raise ValueError(f"{dataset.name} has a chunk that is packed otherwise than the rest")
        plain = np.frombuffer(_plain(packed, filters, dataset), dataset.dtype).reshape(dataset.chunks)
        part = field[tuple(slice(first, None) for first in chunk.chunk_offset)]
        part = part[tuple(slice(size) for size in dataset.chunks)]
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            part[...] = plain[tuple(slice(size) for size in part.shape)]  # chunks reach over the far edges
    return field


def _plain(packed: bytes, filters: list[int], dataset: h5py.Dataset) -> bytes:
    """The bytes of a chunk before they went through the filters."""
    size = int(np.prod(dataset.chunks)) * dataset.dtype.itemsize
    if DEFLATE in filters:
        try:
            packed = inflated(packed, size)
        except ValueError as error:
            raise ValueError(f"{dataset.name} has a damaged chunk ({error}); fetch it again") from error
    if len(packed) != size:
        raise ValueError(f"{dataset.name} has a chunk of other than {size} bytes; fetch it again")
    if SHUFFLE in filters:
        return np.frombuffer(packed, np.uint8).reshape(dataset.dtype.itemsize, -1).T.tobytes()
    return packed


def _check_begin(path: Path, largest: int) -> None:
    with path.open("rb") as file:
        begin = file.read(len(MAGIC))
        size = file.seek(0, 2)
    if begin != MAGIC:
        raise ValueError(f"not an HDF5 file: begins with {begin!r} instead of {MAGIC!r}")
    if size > largest:
        raise ValueError(f"larger than {largest} bytes, which no file of this product is")


def _check_contents(file: h5py.File) -> None:
    """Refuses a file if any link or dataset in it, reachable or not yet asked for, leads outside.

    Soft links are not followed: they name objects of this file, all of which are checked themselves.
    """
    links = 0
    seen = {_address(file)}  # hard links may form circles
    groups: list[h5py.Group] = [file]
    while groups:
        group = groups.pop()
        for name in group:
            links += 1
            if links > MOST_LINKS:
                raise ValueError(f"holds more than {MOST_LINKS} links, which no file of this product does")
            if not _stays_inside(group, name):
                continue
            node = group[name]
            if _address(node) in seen:
                continue
            seen.add(_address(node))
            if isinstance(node, h5py.Group):
                groups.append(node)
            elif isinstance(node, h5py.Dataset):
                _check_dataset(node)


def _stays_inside(group: h5py.Group, name: str) -> bool:
    """Whether a link holds its object itself (a hard link); False for a soft link.

    Raises:
        ValueError: for a link out of the file.
    """
    try:
        link = group.get(name, getlink=True)
    except TypeError:  # of a kind that a plug-in of the library defines
        link = None
    if not isinstance(link, h5py.HardLink | h5py.SoftLink):
        raise ValueError(
            f"has an external link at {_place(group, name)}; refused, since it may lead to any file here"
        )
    return isinstance(link, h5py.HardLink)


def _check_dataset(dataset: h5py.Dataset) -> None:
    if dataset.is_virtual or dataset.external:
        kind = "is put together from other files" if dataset.is_virtual else "is stored in another file"
        raise ValueError(f"the dataset {dataset.name} {kind}; refused, since that may be any file here")
    if dataset.chunks is not None:
        chunk = int(np.prod(dataset.chunks, dtype=object)) * dataset.dtype.itemsize
        if chunk > LARGEST_CHUNK:
            raise ValueError(f"the dataset {dataset.name} has chunks of {chunk} bytes: more than is read")


def _address(node: h5py.HLObject) -> int:
    return int(h5py.h5o.get_info(node.id).addr)


def _place(group: h5py.Group, name: str) -> str:
    return f"{str(group.name).rstrip('/')}/{name}"
