"""What is unpacked is what zlib unpacks, or refused."""

import gzip
import random
import zlib

import pytest

from pipelines.formats.inflate import GZIP, DamageError, inflated, inflater

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
