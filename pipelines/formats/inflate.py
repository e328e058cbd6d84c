"""Packed bytes, and never more than are expected: `inflated` by zlib, `unpacked` by a codec of Zarr.

Half of the time of reading a radar file goes into `inflated` (RFC 1950 and 1952), so zlib-ng does it, two to
five times as fast as zlib.
"""

import bz2
import lzma
import struct
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numcodecs import blosc, lz4, zstd
from zlib_ng import zlib_ng as zlib

DamageError = cast(type[Exception], zlib.error)  # what an `inflater` raises
GZIP = 16 + zlib.MAX_WBITS  # the container of gzip around the stream, and not that of zlib
COMPRESSORS = frozenset(("gzip", "zlib", "bz2", "lzma", "zstd", "blosc", "lz4"))  # by the names of numcodecs
LARGEST_DICTIONARY = 2**27  # bytes that a decompressor may hold besides what it gives


def inflater(container: int = zlib.MAX_WBITS) -> Any:
    """A `zlib.decompressobj` of a container."""
    return zlib.decompressobj(wbits=container)


def inflated(packed: bytes | memoryview, size: int) -> bytes:
    """The bytes of a zlib stream, which are to be exactly so many.

    Raises:
        ValueError: if it is damaged, cut, of another size, or not at its end where `packed` ends.
    """
    return _whole(inflater(), packed, size, size)


def unpacked(
    codec: str, settings: Mapping[str, Any], packed: bytes | memoryview, least: int, most: int
) -> bytes:
    """What one of the `COMPRESSORS` packed, which is to be from `least` to `most` bytes.

    Raises:
        ValueError: if it is damaged, cut, of another size, or not at its end where `packed` ends.
    """
    match codec:
        case "zlib":
            return _whole(inflater(), packed, least, most)
        case "gzip":
            return _whole(inflater(GZIP), packed, least, most)
        case "bz2":
            return _whole(bz2.BZ2Decompressor(), packed, least, most)
        case "lzma":
            return _whole(_unlzma(settings), packed, least, most)
        case "zstd":
            told, decompress = _zstd_size(packed), zstd.decompress
        case "blosc":
            told, decompress = _blosc_size(packed), blosc.decompress
        case "lz4":
            told, decompress = int.from_bytes(packed[:4], "little"), lz4.decompress
        case _:
            raise ValueError(f"packed by {codec}: expected one of {', '.join(sorted(COMPRESSORS))}")
    size = most if told is None else told
    if not least <= size <= most:
        raise ValueError(f"{size} bytes; expected {most}")
    try:
        plain = decompress(packed, np.empty(size, np.uint8))  # refuses all that do not fill it
    except (RuntimeError, ValueError) as error:
        raise ValueError(str(error)) from error
    return bytes(plain)


def _whole(unpacker: Any, packed: bytes | memoryview, least: int, most: int) -> bytes:
    """All that a decompressor of the standard library's kind makes of a stream."""
    try:
        plain: bytes = unpacker.decompress(packed, most + 1)
    except (DamageError, OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(str(error)) from error
    if not least <= len(plain) <= most or not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"{len(plain)} bytes, or cut; expected {most}")
    return plain


def _unlzma(settings: Mapping[str, Any]) -> lzma.LZMADecompressor:
    """The decompressor of a stream as numcodecs writes it; a raw one tells its filters beside it."""
    container = settings.get("format", lzma.FORMAT_XZ)
    if container != lzma.FORMAT_RAW:
        return lzma.LZMADecompressor(container, memlimit=LARGEST_DICTIONARY)
    filters = [dict(each) for each in settings.get("filters") or ()]
    if any(not 0 <= each.get("dict_size", 0) <= LARGEST_DICTIONARY for each in filters):
        raise ValueError(f"lzma with a dictionary of more than {LARGEST_DICTIONARY} bytes")
    return lzma.LZMADecompressor(container, filters=filters)


def _zstd_size(packed: bytes | memoryview) -> int | None:
    """What the first frame says it holds (RFC 8878 section 3.1.1.1); None if it does not say."""
    if packed[:4] != b"\x28\xb5\x2f\xfd" or len(packed) < 6:
        raise ValueError("no Zstandard frame")
    flags = packed[4]
    is_single = flags >> 5 & 1  # segment: then the window is not told
    width = (is_single, 2, 4, 8)[flags >> 6]
    place = 6 - is_single + (0, 1, 2, 4)[flags & 3]  # behind the window and the number of a dictionary
    size = int.from_bytes(packed[place : place + width], "little") + 256 * (width == 2)
    return size if width else None


def _blosc_size(packed: bytes | memoryview) -> int:
    """What the header says is packed; the library believes what it says of the packed bytes, and reads on."""
    if len(packed) < 16:
        raise ValueError("no header of Blosc")
    size, _, packed_size = struct.unpack_from("<3I", packed, 4)
    if packed_size != len(packed):
        raise ValueError(f"{len(packed)} packed bytes; the header of Blosc says {packed_size}")
    return int(size)
