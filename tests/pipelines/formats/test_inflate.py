"""What is unpacked is what zlib unpacks, or refused."""

import bz2
import gzip
import lzma
import random
import struct
import tracemalloc
import zlib

import pytest
from numcodecs import blosc, lz4, zstd

from pipelines.formats.inflate import COMPRESSORS, GZIP, DamageError, inflated, inflater, unpacked

FIELD = random.Random(1).randbytes(3000) + bytes(50_000)


@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_a_stream_gives_the_bytes_that_went_in(level):
    assert inflated(zlib.compress(FIELD, level), len(FIELD)) == FIELD


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (zlib.compress(FIELD + b"x"), f"{len(FIELD) + 1} bytes, or cut"),
        (zlib.compress(bytes(2**26)), f"{len(FIELD) + 1} bytes, or cut"),  # and not the bomb's 64 MiB
        (zlib.compress(FIELD[1:]), f"{len(FIELD) - 1} bytes, or cut"),
        (zlib.compress(FIELD)[:-1], f"expected {len(FIELD)}"),
        (zlib.compress(FIELD) + b"x", f"expected {len(FIELD)}"),
        (zlib.compress(FIELD)[:-4] + bytes(4), "incorrect data check"),
        (b"<html>", "incorrect header check"),
        (b"", "0 bytes, or cut"),
    ],
)
def test_what_is_damaged_or_of_another_size_is_refused(packed, said):
    with pytest.raises(ValueError, match=said):
        inflated(packed, len(FIELD))


def test_a_flipped_bit_never_gives_other_bytes():
    packed, noise = zlib.compress(FIELD), random.Random(2)
    for _ in range(300):
        place = noise.randrange(8 * len(packed))
        changed = bytearray(packed)
        changed[place // 8] ^= 1 << place % 8
        try:
            assert inflated(bytes(changed), len(FIELD)) == FIELD  # a bit of the header that says nothing
        except ValueError:
            continue


def test_a_file_of_gzip_is_unpacked_piece_by_piece_and_its_checksum_looked_at():
    packed = gzip.compress(FIELD)
    unzip = inflater(GZIP)
    first = unzip.decompress(packed, 100)
    assert (first, unzip.eof) == (FIELD[:100], False)
    assert first + unzip.decompress(unzip.unconsumed_tail) == FIELD
    assert unzip.eof
    with pytest.raises(DamageError):
        inflater(GZIP).decompress(packed[:-8] + bytes(8))


RAW = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "dict_size": 2**20}]}


def zstd_untold(plain: bytes, repeats: int = 0) -> bytes:
    """A frame that does not say its size: of a block as it is, and of others of 128 KiB of one zero each."""
    blocks = struct.pack("<I", len(plain) << 3 | (not repeats))[:3] + plain
    for number in range(repeats):
        blocks += struct.pack("<I", 2**17 << 3 | 1 << 1 | (number == repeats - 1))[:3] + b"\0"
    return b"\x28\xb5\x2f\xfd\0\x38" + blocks


PACKERS = {
    "gzip": ("gzip", {}, gzip.compress),
    "zlib": ("zlib", {}, zlib.compress),
    "bz2": ("bz2", {}, bz2.compress),
    "lzma": ("lzma", {}, lzma.compress),
    "lzma, raw": ("lzma", RAW, lambda plain: lzma.compress(plain, lzma.FORMAT_RAW, filters=RAW["filters"])),
    "zstd": ("zstd", {}, zstd.compress),
    "blosc": ("blosc", {}, lambda plain: blosc.compress(plain, b"zstd", 5, 1)),
    "lz4": ("lz4", {}, lz4.compress),
}


def test_every_compressor_of_zarr_is_among_those_that_are_looked_at():
    assert {codec for codec, _, _ in PACKERS.values()} == COMPRESSORS


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("size", [1, 255, 256, 2000, 70_000])
def test_every_codec_gives_the_bytes_that_went_in(packer, size):
    codec, settings, pack = PACKERS[packer]
    plain = (FIELD * 2)[:size]
    assert unpacked(codec, settings, pack(plain), size, size) == plain
    assert unpacked(codec, settings, pack(plain), 0, 2 * size) == plain


@pytest.mark.parametrize("packer", PACKERS)
def test_no_codec_gives_another_size_or_takes_what_it_would(packer):
    codec, settings, pack = PACKERS[packer]
    whole = pack(FIELD)
    others = {
        "short": pack(FIELD[:-1]),
        "very short": pack(FIELD[:16]),
        "long": pack(FIELD + b"x"),
        "bomb": pack(bytes(2**26)),
        "cut": whole[:-5],
        "cut to its head": whole[:9],
        "nothing": b"",
        "more behind it": whole + bytes(8),
        "twice": 2 * whole,
        "another format": b"<html>" * 20,
    }
    for packed in others.values():
        tracemalloc.start()
        try:
            with pytest.raises(ValueError):
                unpacked(codec, settings, packed, len(FIELD), len(FIELD))
            assert tracemalloc.get_traced_memory()[1] < 2**24  # a dictionary of lzma has 8 MiB
        finally:
            tracemalloc.stop()


def test_a_frame_of_zstandard_that_does_not_say_its_size_is_bounded_too():
    assert unpacked("zstd", {}, zstd_untold(FIELD), len(FIELD), len(FIELD)) == FIELD
    for packed in (zstd_untold(FIELD[1:]), zstd_untold(FIELD + b"x"), zstd_untold(b"", 8000)):
        tracemalloc.start()
        try:
            with pytest.raises(ValueError):
                unpacked("zstd", {}, packed, len(FIELD), len(FIELD))
            assert tracemalloc.get_traced_memory()[1] < 2**24
        finally:
            tracemalloc.stop()


def test_a_second_frame_of_zstandard_is_counted_with_the_first():
    packed = zstd.compress(FIELD) + zstd_untold(b"", 8000)
    with pytest.raises(ValueError):
        unpacked("zstd", {}, packed, len(FIELD), len(FIELD))


def test_blosc_reads_nothing_behind_what_was_packed():
    packed = blosc.compress(FIELD, b"lz4", 5, 1)
    assert blosc.decompress(packed[:-2])[:3000] == FIELD[:3000]  # the library itself does
    with pytest.raises(ValueError, match="the header of Blosc says"):
        unpacked("blosc", {}, packed[:-2], len(FIELD), len(FIELD))


def test_a_dictionary_of_gigabytes_is_refused():
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**30}]
    with pytest.raises(ValueError, match="a dictionary of more than"):
        unpacked("lzma", {"format": lzma.FORMAT_RAW, "filters": filters}, b"\0", 1, 1)


def test_what_no_bound_is_known_of_is_refused():
    with pytest.raises(ValueError, match="packed by zfpy: expected one of blosc"):
        unpacked("zfpy", {}, b"", 1, 1)
