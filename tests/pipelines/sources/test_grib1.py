"""Static fields in GRIB1: real ones read as ecCodes reads them, and damaged ones refused."""

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.frame import ALWAYS, Frame
from pipelines.grid import Grid
from pipelines.sources.grib1 import StaticGrib1
from pipelines.sources.source import RemoteFile

GRIDS = {
    "NW": Grid("EPSG:4326", -5.842, 0.025, 315, 51.896, -0.025, 227),
    "SE": Grid("EPSG:4326", 2.0, 0.025, 315, 46.25, -0.025, 207),
}
SMALL = Grid("EPSG:4326", -1.5, 0.5, 4, 50.25, -0.25, 3)
ECCODES = """
import sys, numpy, eccodes
fields = {}
with open(sys.argv[1], "rb") as file:
    while (message := eccodes.codes_grib_new_from_file(file)) is not None:
        number = eccodes.codes_get(message, "indicatorOfParameter")
        shape = eccodes.codes_get(message, "Nj"), eccodes.codes_get(message, "Ni")
        fields[f"values_{number}"] = eccodes.codes_get_values(message).reshape(shape)
        fields["lat"] = eccodes.codes_get_array(message, "latitudes").reshape(shape)
        fields["lon"] = eccodes.codes_get_array(message, "longitudes").reshape(shape)
numpy.savez(sys.argv[2], **fields)
"""


def read(path: Path, source: StaticGrib1) -> Frame:
    return source.read(RemoteFile(str(path), ALWAYS))


def eccodes(path: Path, folder: Path) -> dict[str, Any]:
    """What ecCodes reads of a file, in a process of its own, which it may well end with a crash."""
    out = folder / "eccodes.npz"
    subprocess.run([sys.executable, "-c", ECCODES, str(path), str(out)], check=False, capture_output=True)
    with np.load(out) as fields:
        return dict(fields)


def check_as_eccodes(path: Path, grid: Grid, folder: Path) -> None:
    expected = eccodes(path, folder)
    for parameter, name in ((8, "elevation"), (81, "land_fraction")):
        frame = read(path, StaticGrib1(parameter, grid))
        assert frame.variable.name == name
        assert np.array_equal(frame.values, expected[f"values_{parameter}"].astype(np.float32))
        lon, lat = frame.grid.lonlat()
        assert np.abs(lon - (expected["lon"] + 180) % 360 + 180).max() < 1e-6  # 0.1 m
        assert np.abs(lat - expected["lat"]).max() < 1e-6


@pytest.mark.data
@pytest.mark.parametrize("place", GRIDS)
def test_the_real_masks_read_as_eccodes_reads_them(place, data, tmp_path):
    path = data / "meteonet" / "masks" / f"{place}_masks.grib"
    check_as_eccodes(path, GRIDS[place], tmp_path)
    land = read(path, StaticGrib1(81, GRIDS[place])).values
    relief = read(path, StaticGrib1(8, GRIDS[place])).values
    assert (land.min(), land.max()) == (0, 1)
    assert relief[land == 1].mean() > relief[land == 0].mean() + 90


@pytest.mark.data
def test_the_source_finds_the_file_by_its_name_at_any_time(data):
    folder = str(data / "meteonet" / "masks")
    source = StaticGrib1(8, GRIDS["SE"], folder, r"SE_masks\.grib", "AROME masks")
    (file,) = source.files(None, None)
    assert file.valid_time == ALWAYS
    frame = source.read(file)
    assert (frame.group, frame.cadence, frame.source) == ("static", None, "AROME masks")
    with pytest.raises(ValueError, match="AROME masks there"):
        list(StaticGrib1(8, GRIDS["SE"], folder, "Corsica.grib", "AROME masks").files(None, None))


def ibm(value: float) -> bytes:
    """A number as IBM's System/360 holds it, by its definition and not by shifts."""
    if value == 0:
        return bytes(4)
    exponent = next(e for e in range(-64, 64) if abs(value) < 16.0**e)
    return struct.pack(
        ">I", (value < 0) << 31 | (exponent + 64) << 24 | int(abs(value) / 16.0**exponent * 2**24)
    )


def signed(number: int, size: int) -> bytes:
    return (abs(number) | (number < 0) << (8 * size - 1)).to_bytes(size)


def message(
    counts: Any,
    parameter: int = 81,
    bits: int = 16,
    reference: float = 0.0,
    binary: int = 0,
    decimal: int = 0,
    table: int = 1,
    flags: int = 0x80,
    scan: int = 0,
    first: tuple[int, int] = (50250, -1500),
) -> bytes:
    """A GRIB1 message of 3 x 4 cells (WMO FM 92-VIII)."""
    rows, columns = np.shape(counts)
    north, west = first
    product = bytes([0, 0, 28, table, 85, 255, 255, flags, parameter, 1, 0, 0, *bytes(14)]) + signed(
        decimal, 2
    )
    place = (
        b"\0\0\x20\0\xff\0" + struct.pack(">HH", columns, rows) + signed(north, 3) + signed(west, 3) + b"\x80"
        + signed(north - 250 * (rows - 1), 3) + signed(west + 500 * (columns - 1), 3)
        + struct.pack(">HHB", 500, 250, scan) + bytes(4)
    )  # fmt: skip
    octets = b"".join(int(count).to_bytes(bits // 8) for count in np.ravel(counts))
    unused = len(octets) % 2
    octets += bytes(unused)
    packed = (
        (11 + len(octets)).to_bytes(3)
        + bytes([8 * unused])
        + signed(binary, 2)
        + ibm(reference)
        + bytes([bits])
        + octets
    )
    body = product + place + packed + b"7777"
    return b"GRIB" + (8 + len(body)).to_bytes(3) + b"\1" + body


RELIEF = np.arange(12).reshape(3, 4) * 37


@settings(max_examples=30)
@given(
    bits=st.sampled_from([8, 16, 24]),
    reference=st.floats(-500, 500, width=16),
    binary=st.integers(-8, 1),
    decimal=st.integers(-1, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_written_field_is_read_with_every_packing(bits, reference, binary, decimal, seed, tmp_path_factory):
    counts = np.random.default_rng(seed).integers(0, 200, (3, 4))  # none is above 9000 m
    path = tmp_path_factory.mktemp("grib") / "x.grib"
    path.write_bytes(message(counts, 8, bits, reference, binary, decimal))
    expected = (reference + counts * 2.0**binary) / 10.0**decimal
    assert read(path, StaticGrib1(8, SMALL)).values == pytest.approx(expected, rel=1e-6, abs=1e-4)


def test_a_written_file_reads_as_eccodes_reads_it(tmp_path):
    path = tmp_path / "x.grib"
    land = np.arange(12).reshape(3, 4) * 2**20
    path.write_bytes(
        message(land, 81, 24, binary=-24) + message(RELIEF, 8, 16, reference=-120.5, binary=-3, decimal=1)
    )
    check_as_eccodes(path, SMALL, tmp_path)


WRONG: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", r"holds the parameters \[\]"),
    "text": (lambda: b"<html>", "not GRIB edition 1"),
    "edition 2": (lambda: message(RELIEF)[:7] + b"\2" + message(RELIEF)[8:], "not GRIB edition 1"),
    "cut": (lambda: message(RELIEF)[:-5], "does not end as it says"),
    "longer": (lambda: message(RELIEF) + b"7777", "not GRIB edition 1"),
    "no trailer": (lambda: message(RELIEF)[:-1] + b"8", "does not end as it says"),
    "length 0": (lambda: b"GRIB\0\0\0\1" + message(RELIEF)[8:], "does not end as it says"),
    "section of length 0": (lambda: message(RELIEF)[:8] + b"\0\0\0" + message(RELIEF)[11:], "0 sections"),
    "a bitmap": (lambda: message(RELIEF, flags=0xC0), "without a bitmap"),
    "no grid": (lambda: message(RELIEF, flags=0), "without a bitmap"),
    "another parameter": (lambda: message(RELIEF, 11), r"holds the parameters \[11\], expected 81 once"),
    "twice": (lambda: 2 * message(RELIEF), r"holds the parameters \[81, 81\]"),
    "another table": (lambda: message(RELIEF, table=128), "another table"),
    "rows from the south": (lambda: message(RELIEF, scan=0x40), "not on a plain grid"),
    "another place": (lambda: message(RELIEF, first=(50251, -1500)), "lies on 3 x 4 cells"),
    "another size": (lambda: message(RELIEF[:2]), "lies on 2 x 4 cells"),
    "another last cell": (lambda: message(RELIEF).replace(signed(0, 3) + b"\1\xf4", signed(1, 3) + b"\1\xf4"), "not where its steps lead"),
    "fewer counts": (lambda: message(RELIEF).replace(b"\0\x23\0\0\0", b"\0\x23\x08\0\0"), "bytes of data for 12 cells"),
    "12 bits": (lambda: message(RELIEF).replace(bytes(4) + b"\x10", bytes(4) + b"\x0c"), "in whole bytes"),
    "more than all land": (lambda: message(RELIEF), "outside 0..1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_another_or_damaged_file_is_refused_with_its_name_and_a_reason(kind, tmp_path):
    make, reason = WRONG[kind]
    path = tmp_path / "masks.grib"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=rf"^masks.grib: .*({reason})"):
        read(path, StaticGrib1(81, SMALL))


@pytest.mark.data
@settings(max_examples=40)
@given(place=st.integers(0, 83), bit=st.integers(0, 7))
def test_no_flipped_bit_of_the_headers_moves_a_field(place, bit, data, tmp_path_factory):
    whole = bytearray((data / "meteonet" / "masks" / "NW_masks.grib").read_bytes())
    whole[place] ^= 1 << bit
    path = tmp_path_factory.mktemp("flip") / "NW_masks.grib"
    path.write_bytes(whole)
    try:
        frame = read(path, StaticGrib1(81, GRIDS["NW"]))
    except ValueError as error:
        assert str(error).startswith("NW_masks.grib: ")
        return
    assert frame.grid == GRIDS["NW"]
    assert np.nanmax(frame.values) <= 1


def test_a_file_of_another_checksum_than_the_registered_one_is_refused(tmp_path):
    path, land = tmp_path / "masks.grib", np.arange(12).reshape(3, 4) % 2
    path.write_bytes(message(land))
    registered = read(path, StaticGrib1(81, SMALL)).sha256
    assert np.array_equal(read(path, StaticGrib1(81, SMALL, sha256=registered)).values, land)
    path.write_bytes(message(1 - land))
    with pytest.raises(ValueError, match=rf"^masks\.grib: has SHA-256 [0-9a-f]{{64}}, expected {registered}"):
        read(path, StaticGrib1(81, SMALL, sha256=registered))


def test_a_parameter_that_is_no_static_field_is_refused_at_once():
    with pytest.raises(ValueError, match=r"source\.parameter=61: expected one of \[8, 81\]"):
        StaticGrib1(61, SMALL)
