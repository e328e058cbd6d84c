"""`inflated`: the bytes that zlib packed (RFC 1950 and 1952), and never more than are expected.

Half of the time of reading a radar file goes here, so zlib-ng does it, two to five times as fast as zlib.
"""

from typing import Any, cast

from zlib_ng import zlib_ng as zlib

DamageError = cast(type[Exception], zlib.error)  # what an `inflater` raises
GZIP = 16 + zlib.MAX_WBITS  # the container of gzip around the stream, and not that of zlib


def inflater(container: int = zlib.MAX_WBITS) -> Any:
    """A `zlib.decompressobj` of a container."""
    return zlib.decompressobj(wbits=container)


def inflated(packed: bytes, size: int) -> bytes:
    """The bytes of a zlib stream, which are to be exactly so many.

    Raises:
        ValueError: if it is damaged, cut, of another size, or not at its end where `packed` ends.
    """
    unzip = inflater()
    try:
        plain: bytes = unzip.decompress(packed, size + 1)
    except DamageError as error:
        raise ValueError(str(error)) from error
    if len(plain) != size or not unzip.eof or unzip.unused_data:
        raise ValueError(f"{len(plain)} bytes, or cut; expected {size}")
    return plain
