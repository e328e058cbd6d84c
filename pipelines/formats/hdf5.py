"""HDF5 files from outside (netCDF-4 included), opened so that they give only what lies in them.

HDF5 lets a file point at other files: by external links, datasets stored outside, and virtual datasets.
The library follows all three without a word, so a feed could have any readable file published as weather.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numcodecs import Fletcher32
from numpy.typing import NDArray

from pipelines.formats.inflate import unpacked

Region = tuple[slice, ...]

MAGIC = b"\x89HDF\r\n\x1a\n"
MOST_CELLS = 64 * 10**6  # of a field
MOST_LINKS = 10_000  # that a file may hold; the products of weather services have some hundreds
LARGEST_CHUNK = MOST_CELLS * 8  # bytes unpacked
MOST_CHUNKS = 100_000  # of one read
SHUFFLE, DEFLATE = h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE
FLETCHER32 = h5py.h5z.FILTER_FLETCHER32
PACKERS = {DEFLATE: "zlib", 307: "bz2", 32001: "blosc", 32015: "zstd"}  # registered with The HDF Group
LARGEST_ATTRIBUTE = 2**20  # bytes
LARGEST_TEXTS = 2**24  # bytes of one read


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
    if not _is_plain(node):
        raise ValueError(f"{node.name} holds {node.dtype}: expected plain numbers")
    if node.chunks is not None:
        _check_chunks(node)
    kind = np.dtype(floats) if node.dtype.kind == "f" else node.dtype
    field, absent = _read(node, tuple(slice(None) for _ in shape), kind)
    if absent and node.size:
        raise ValueError(f"{node.name} lacks its values; a damaged file, fetch it again")
    return field


def part(dataset: h5py.Dataset, picked: tuple[int | slice, ...]) -> tuple[NDArray[Any], list[Region]]:
    """What a dataset holds at a place (an index or a slice without a step of each dimension), as stored.

    Also the regions of it that were never written, where the values are those that HDF5 fills with.

    Raises:
        ValueError: if it is damaged, lies in too many chunks, or is packed by filters that are not read.
    """
    if _is_plain(dataset):
        return _read(dataset, picked, dataset.dtype)
    absent = [region for region, _, chunk in _pieces(dataset, picked) if chunk is None]
    if _is_of_texts(dataset):
        return _texts(dataset, picked), absent
    return np.asarray(dataset[picked]), absent  # text of one length and truths, which the library makes up


def _is_plain(dataset: h5py.Dataset) -> bool:
    """Whether its bytes are numbers as numpy has them."""
    kind = dataset.dtype
    return kind.kind in "iuf" and bool(dataset.id.get_type() == h5py.h5t.py_create(kind))


def _is_of_texts(dataset: h5py.Dataset) -> bool:
    """Whether it holds texts of any length, and so only where each of them lies in the file."""
    told = h5py.check_string_dtype(dataset.dtype)
    return told is not None and told.length is None


def _read(
    dataset: h5py.Dataset, picked: tuple[int | slice, ...], kind: np.dtype[Any]
) -> tuple[NDArray[Any], list[Region]]:
    """The numbers at a place, as a type, and the regions of them that were never written."""
    if dataset.chunks is None:
        absent = [region for region, _, _ in _pieces(dataset, picked)]
        return np.asarray(dataset.astype(kind)[picked]), absent
    ranges = zip(picked, _ranges(dataset, picked), strict=True)
    field = np.empty([len(wanted) for one, wanted in ranges if isinstance(one, slice)], kind)
    absent = []
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        for region, inside, chunk in _pieces(dataset, picked):
            if chunk is None:
                absent.append(region)
                field[region] = dataset.fillvalue
            else:
                field[region] = np.frombuffer(chunk, dataset.dtype).reshape(dataset.chunks)[inside]
    return field, absent


def _texts(dataset: h5py.Dataset, picked: tuple[int | slice, ...]) -> NDArray[Any]:
    """Texts of any length at a place, one by one: the same bytes of a file may be the text of all."""
    ranges = _ranges(dataset, picked)
    texts, total = [], 0
    for place in product(*ranges):
        texts.append(dataset[place])
        total += len(texts[-1])
        if total > LARGEST_TEXTS:
            raise ValueError(f"{dataset.name} holds more than {LARGEST_TEXTS} bytes of text")
    pairs = zip(picked, ranges, strict=True)
    field = np.empty(math.prod(map(len, ranges)), object)
    field[:] = texts
    return field.reshape([len(wanted) for one, wanted in pairs if isinstance(one, slice)])


def _ranges(dataset: h5py.Dataset, picked: tuple[int | slice, ...]) -> list[range]:
    return [
        range(*one.indices(size)) if isinstance(one, slice) else range(one, one + 1)
        for one, size in zip(picked, dataset.shape, strict=True)
    ]


def _pieces(
    dataset: h5py.Dataset, picked: tuple[int | slice, ...]
) -> Iterator[tuple[Region, tuple[int | slice, ...], bytes | memoryview | None]]:
    """The chunks that hold a place: where each goes, what of it is wanted, and its bytes (None: not there).

    They are unpacked here, since HDF5 sets no bound to what a chunk may grow to, and gives what lies in
    memory for the rest of one that is too short. A dataset without chunks is told only if it is not there.
    """
    width = dataset.id.get_type().get_size()
    if _is_of_texts(dataset):  # each is a length, an address, and a number at that address
        width = 8 + dataset.file.id.get_create_plist().get_sizes()[0]
    if dataset.chunks is None:
        stored = dataset.id.get_storage_size()
        if stored not in (0, dataset.size * width):
            raise ValueError(f"{dataset.name} lacks some of its values; a damaged file, fetch it again")
        if dataset.size and not stored:
            yield tuple(slice(None) for one in picked if isinstance(one, slice)), (), None
        return
    filters, left_out = _filters(dataset, width)
    ranges = _ranges(dataset, picked)
    starts = [
        range(wanted.start // step * step, wanted.stop, step)
        for wanted, step in zip(ranges, dataset.chunks, strict=True)
    ]
    if math.prod(map(len, starts)) > MOST_CHUNKS:
        raise ValueError(f"one field lies in more than {MOST_CHUNKS} chunks, which is not read")
    size = math.prod(dataset.chunks) * width
    space = np.empty(size + size // 8 + 1024, np.uint8)  # no filter makes more of what it cannot pack
    for corner in product(*starts):
        region, inside = [], []
        for one, wanted, first, step in zip(picked, ranges, corner, dataset.chunks, strict=True):
            begin, end = max(first, wanted.start), min(first + step, wanted.stop)
            if isinstance(one, slice):
                region.append(slice(begin - wanted.start, end - wanted.start))
            inside.append(slice(begin - first, end - first) if isinstance(one, slice) else one - first)
        skipped, packed = _packed(dataset, corner, space)
        if packed is not None and skipped != left_out:
            raise ValueError(f"{dataset.name} has a chunk that is packed otherwise than the rest")
        try:
            chunk = None if packed is None else _plain(packed, filters, size, width)
        except ValueError as error:
            raise ValueError(f"{dataset.name} has a damaged chunk ({error}); fetch it again") from error
        yield tuple(region), tuple(inside), chunk


def _packed(
    dataset: h5py.Dataset, corner: tuple[int, ...], space: NDArray[np.uint8]
) -> tuple[int, memoryview | None]:
    """Which filters a chunk did not go through, as bits, and its bytes in `space` (None: never written).

    Raises:
        ValueError: if there are more of them.
    """
    try:
        skipped, packed = dataset.id.read_direct_chunk(corner, out=space)
    except (OSError, RuntimeError, ValueError) as error:
        if dataset.id.get_chunk_info_by_coord(corner).byte_offset is None:
            return 0, None
        if not isinstance(error, ValueError):
            raise
        raise ValueError(f"{dataset.name} has a chunk of more than {space.size} bytes: a bomb") from error
    return skipped, packed


def _filters(dataset: h5py.Dataset, width: int) -> tuple[list[int], int]:
    """The filters of a dataset in the order in which they packed it, and those that no chunk went through.

    The latter as bits: the library does not shuffle texts of any length, and tells it so.

    Raises:
        ValueError: if what one of them makes could be of any size, or they are not as libraries use them.
    """
    plan = dataset.id.get_create_plist()
    filters: list[int] = []
    left_out = 0
    for number in range(plan.get_nfilters()):
        code, _, settings, name = plan.get_filter(number)
        if code not in (SHUFFLE, FLETCHER32, *PACKERS) or code in filters:
            told = name.decode("ascii", errors="replace")[:80]
            raise ValueError(
                f"{dataset.name} is packed by the filter {code} ({told}): expected shuffle, fletcher32, "
                "deflate, bzip2, Blosc and Zstandard, each once; pack it anew by "
                "`h5repack -f SHUF -f GZIP=4 OLD NEW`"
            )
        if code == SHUFFLE and not settings:
            left_out |= 1 << number
            continue
        if code == SHUFFLE and tuple(settings) != (width,):
            raise ValueError(
                f"{dataset.name} is shuffled by {settings} bytes, but has {width}; a damaged file"
            )
        filters.append(code)
    return filters, left_out


def _check_chunks(dataset: h5py.Dataset) -> None:
    """Refuses a dataset that lacks a chunk, or has two in one place."""
    stored: list[h5py.h5d.StoreInfo] = []
    dataset.id.chunk_iter(stored.append)
    sides = [range(0, size, step) for size, step in zip(dataset.shape, dataset.chunks, strict=True)]
    if sorted(chunk.chunk_offset for chunk in stored) != list(product(*sides)):
        raise ValueError(f"{dataset.name} lacks some of its chunks; a damaged file, fetch it again")
    places = sorted((chunk.byte_offset, chunk.size) for chunk in stored)
    if any(first + size > next_ for (first, size), (next_, _) in pairwise(places)):
        raise ValueError(f"{dataset.name} has two chunks in one place; a damaged file, fetch it again")


def _plain(packed: bytes | memoryview, filters: list[int], size: int, width: int) -> bytes | memoryview:
    """The bytes of a chunk of elements of `width` bytes before they went through the filters."""
    sizes = [size + 4 * (FLETCHER32 in filters[:number]) for number in range(len(filters))]
    for code, made in reversed(list(zip(filters, sizes, strict=True))):
        if code in PACKERS:
            packed = unpacked(PACKERS[code], {}, packed, made, made)
        elif code == FLETCHER32:
            packed = _checked(packed)
        else:
            packed = _unshuffled(packed, width)
    if len(packed) != size:
        raise ValueError(f"{len(packed)} bytes; expected {size}")
    return packed


def _checked(packed: bytes | memoryview) -> memoryview:
    """The bytes before their checksum, once it is known to be theirs."""
    if len(packed) <= 4:
        raise ValueError("too short for a checksum")
    try:
        return memoryview(Fletcher32().decode(packed))
    except RuntimeError as error:
        raise ValueError("its checksum is another") from error


def _unshuffled(packed: bytes | memoryview, width: int) -> bytes:
    """The bytes element by element again; those at the end that make up no element were left in place."""
    whole = len(packed) // width * width
    plain = np.frombuffer(packed[:whole], np.uint8).reshape(width, -1).T.tobytes()
    return plain + packed[whole:] if whole < len(packed) else plain


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
        chunk = int(np.prod(dataset.chunks, dtype=object)) * dataset.id.get_type().get_size()
        if chunk > LARGEST_CHUNK:
            raise ValueError(f"the dataset {dataset.name} has chunks of {chunk} bytes: more than is read")


def _address(node: h5py.HLObject) -> int:
    return int(h5py.h5o.get_info(node.id).addr)


def _place(group: h5py.Group, name: str) -> str:
    return f"{str(group.name).rstrip('/')}/{name}"
