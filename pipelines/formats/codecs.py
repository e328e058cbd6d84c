"""How the chunks of a Zarr array are packed: shards and compression undone here, within bounds, and no more.

What compresses may make any size out of a few bytes, so it is undone by `inflate.unpacked`, to just as many
bytes as a chunk holds, before zarr sees it. Zarr v2 and v3 (the codec `sharding_indexed`, ZEP 2).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numcodecs import get_codec
from numpy.typing import NDArray
from zarr.core.buffer import cpu
from zarr.dtype import parse_dtype

from pipelines.formats.inflate import COMPRESSORS, unpacked

Codec = tuple[str, Mapping[str, Any]]  # by the name of numcodecs, and its settings

LARGEST_TEXTS = 2**24  # bytes of the texts in a chunk
MOST_SHARDS = 2  # in each other
CODECS = (  # none of them runs what it reads
    "bytes transpose sharding_indexed crc32c gzip zstd blosc zlib bz2 lzma lz4 crc32 adler32 fletcher32 "
    "shuffle delta fixedscaleoffset quantize bitround packbits astype vlen-utf8"
)
ALLOWED_CODECS = frozenset(re.split(" ", CODECS))
CHECKSUMS = frozenset(("crc32c", "crc32", "adler32", "fletcher32"))  # of four bytes
TEXTS = "vlen-utf8"  # the codec of texts of any length
NO_CHUNK = (2**64 - 1, 2**64 - 1)  # offset and length in the index of a shard


def codec_names(metadata: Mapping[str, Any]) -> Iterator[str]:
    """The codecs of an array, those inside shards included, by the names of numcodecs."""
    for name, settings in _codecs(metadata):
        yield name
        if name == "sharding_indexed":
            yield from codec_names(settings)
            yield from codec_names({"codecs": settings.get("index_codecs")})


def _codecs(metadata: Mapping[str, Any]) -> list[Codec]:
    """The codecs of an array or of a shard's chunks, in the order in which they packed it."""
    return [
        _codec(codec)
        for codec in (
            *(metadata.get("filters") or ()),
            metadata.get("compressor"),
            *(metadata.get("codecs") or ()),
        )
        if codec
    ]


def _codec(told: object) -> Codec:
    if not isinstance(told, Mapping):
        return str(told).removeprefix("numcodecs."), {}
    name = str(told.get("id") or told.get("name")).removeprefix("numcodecs.")
    settings = told.get("configuration") or {} if "name" in told else told
    return name, {key: value for key, value in settings.items() if key != "id"}


@dataclass(frozen=True)
class _Shard:
    """How chunks lie in a shard (Zarr v3: the codec `sharding_indexed`)."""

    chunk: tuple[int, ...]
    begins: bool  # whether the index is at the beginning, not the end
    codecs: Sequence[Codec]  # of the index

    def places(self, content: bytes, parts: tuple[int, ...]) -> NDArray[np.uint64]:
        """Offset and length (the last axis) of each of so many chunks along each dimension.

        Raises:
            ValueError: if they are damaged.
        """
        checks = sum(name == "crc32c" for name, _ in self.codecs)
        size = 16 * math.prod(parts)
        stored = size + 4 * checks
        packed: Any = content[:stored] if self.begins else content[-stored:]
        if len(packed) != stored:
            raise ValueError(f"a shard of {len(content)} bytes, too short for its index; a damaged store")
        for _ in range(checks):
            packed = _decoded("crc32c", {}, packed)
        order = "<" if all(told.get("endian", "little") == "little" for _, told in self.codecs) else ">"
        return np.frombuffer(packed, f"{order}u8").reshape(*parts, 2)


@dataclass(frozen=True)
class Layout:
    """How the numbers of an array are packed into files."""

    shards: Sequence[_Shard]  # from outside
    chunk: tuple[int, ...]  # the innermost
    kept: Sequence[Any]  # what zarr decodes: codecs (v3), or filters and a compressor that is None (v2)
    undone: Sequence[Codec]  # what comes behind it and is undone here; the first compresses
    size: int | None  # bytes of a chunk where they are undone; None: of texts, which may have any

    def unpacked(self, content: bytes) -> bytes:
        """A chunk as zarr is to decode it.

        Raises:
            ValueError: if it is damaged, or more or less than the chunk holds.
        """
        for name, settings in reversed(self.undone[1:]):
            content = _decoded(name, settings, content)
        if self.undone:
            name, settings = self.undone[0]
            least, most = (0, LARGEST_TEXTS) if self.size is None else (self.size, self.size)
            content = unpacked(name, settings, content, least, most)
        if self.size is None and int.from_bytes(content[:4], "little") != math.prod(self.chunk):
            raise ValueError(f"a chunk of other than {math.prod(self.chunk)} texts")
        return content


@dataclass(frozen=True)
class Unpacked(Mapping[str, cpu.Buffer]):
    """A store of one array, of which a chunk is unpacked when it is asked for."""

    head: Mapping[str, bytes]
    chunks: Mapping[str, bytes]
    layout: Layout

    def __getitem__(self, key: str) -> cpu.Buffer:
        content = self.head[key] if key in self.head else self.layout.unpacked(self.chunks[key])
        return cpu.Buffer.from_bytes(content)

    def __iter__(self) -> Iterator[str]:
        yield from (*self.head, *self.chunks)

    def __len__(self) -> int:
        return len(self.head) + len(self.chunks)


def layout_of(metadata: Mapping[str, Any], chunk: tuple[int, ...], name: str) -> Layout:
    """How an array is packed.

    Raises:
        ValueError: if not as a chunk could be unpacked without making more of it than it holds.
    """
    shards, inner = _shards(metadata, chunk, name)
    chunk = shards[-1].chunk if shards else chunk
    used = _codecs(inner)
    first = next((place for place, (each, _) in enumerate(used) if each in COMPRESSORS), len(used))
    if any(each not in CHECKSUMS | {"shuffle"} for each, _ in used[first + 1 :]):
        raise ValueError(
            f"{name}: is packed by {used[first][0]} and then {used[first + 1][0]}, which is not read"
        )
    size: int | None = math.prod(chunk) * _itemsize(metadata)
    for each in used[:first]:
        size = None if each[0] == TEXTS else size and _packed_size(each, size)
    if size is None and used[first - 1][0] != TEXTS:
        raise ValueError(
            f"{name}: its texts are packed once more before they are compressed, which is not read"
        )
    return Layout(shards, chunk, _kept(inner, first), used[first:], size)


def _shards(
    metadata: Mapping[str, Any], chunk: tuple[int, ...], name: str
) -> tuple[list[_Shard], Mapping[str, Any]]:
    """The shards of an array from outside, and what says how the chunks in the innermost are packed.

    Raises:
        ValueError: if they are packed in a way that is not read.
    """
    shards: list[_Shard] = []
    while (told := dict(used := _codecs(metadata)).get("sharding_indexed")) is not None:
        outer, chunk = chunk, tuple(int(size) for size in told["chunk_shape"])
        index = _codecs({"codecs": told.get("index_codecs")})
        if len(shards) == MOST_SHARDS:
            raise ValueError(f"{name}: shards in shards, more than {MOST_SHARDS} deep")
        if len(used) != 1 or {each for each, _ in index} - {"bytes", "crc32c"}:
            raise ValueError(f"{name}: its shards, or their indexes, are packed once more, which is not read")
        sizes = list(zip(chunk, outer, strict=False))
        if len(chunk) != len(outer) or any(part < 1 or whole % part for part, whole in sizes):
            raise ValueError(f"{name}: chunks of {chunk} in shards of {outer}")
        shards.append(_Shard(chunk, told.get("index_location", "end") == "start", index))
        metadata = told
    return shards, metadata


def _kept(metadata: Mapping[str, Any], count: int) -> list[Any]:
    """The first codecs, as the metadata have them; of v2 the compressor (or None) comes last."""
    if "codecs" in metadata:
        return list(metadata["codecs"][:count])
    filters = list(metadata.get("filters") or ())
    return [*filters[:count], metadata.get("compressor") if count > len(filters) else None]


def _itemsize(metadata: Mapping[str, Any]) -> int:
    """Bytes of a number of an array."""
    told = metadata.get("data_type", metadata.get("dtype"))
    if "data_type" not in metadata:
        return np.dtype(told).itemsize
    return int(parse_dtype(told, zarr_format=3).to_native_dtype().itemsize)


def _packed_size(codec: Codec, size: int) -> int:
    """What so many bytes become by a codec that does not compress."""
    name, told = codec
    if name in CHECKSUMS:
        return size + 4
    if name == "packbits":
        return 1 + -(-size // 8)
    plain = told.get("dtype", told.get("decode_dtype"))
    packed = told.get("astype", told.get("encode_dtype")) or plain
    return size if plain is None else size // np.dtype(plain).itemsize * np.dtype(packed).itemsize


def _decoded(codec: str, settings: Mapping[str, Any], packed: bytes) -> bytes:
    """The bytes before a codec that does not compress."""
    return bytes(get_codec({**settings, "id": codec}).decode(packed))


def cut(content: bytes, offset: int, length: int) -> bytes:
    """The bytes of a chunk in a shard."""
    if offset + length > len(content):
        raise ValueError(f"a shard of {len(content)} bytes has a chunk at {offset} to {offset + length}")
    return content[offset : offset + length]
