"""NEXRAD volumes: real ones as xradar reads them, laid out as wradlib and PROJ lay them, small ones that the tests write, damaged ones refused."""

import bz2
import gzip
import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Geod

import cli
from pipelines.cf import RAINFALL_RATE, REFLECTIVITY
from pipelines.decode import decode
from pipelines.frame import Frame
from pipelines.sources.nexrad import Nexrad, lowest_sweep, reflectivities, slant_range
from pipelines.sources.source import RemoteFile

NEW, OLD = "KXYZ20200102_030405_V06", "KXYZ20050102_030405.gz"  # of the two layouts
BEGIN = datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC)
PLACE = (-89.8256, 30.3367, 27.0)  # of KLIX, by NOAA's list of stations
REAL = {"KLBB20160601_150025_V06": None, "KLIX20050828_180149.gz": PLACE}


# A writer of its own, by the tables of ICD 2620002 and 2620010.


def header(name: str, title: bytes = b"AR2V0006.001") -> bytes:
    return title + struct.pack(">II4s", *counted(name), name[:4].encode())


def counted(name: str) -> tuple[int, int]:
    """Days and milliseconds as volumes count them."""
    begin = datetime.strptime(name[4:19], "%Y%m%d_%H%M%S")
    days = (begin - datetime(1970, 1, 1)).days + 1
    return days, 1000 * (begin.hour * 3600 + begin.minute * 60 + begin.second)


def message(kind: int, body: bytes) -> bytes:
    """A message behind its header of 28 bytes; all types but 31 fill 2432 bytes."""
    said = struct.pack(">12xHBBHHIHH", 8 + len(body) // 2, 0, kind, 1, 1, 0, 1, 1)
    return said + body if kind == 31 else (said + body).ljust(2432, b"\0")


def generic(name: str, number: int, state: int, cut: int, codes: np.ndarray, **other: object) -> bytes:
    """A radial of type 31, with the blocks RVOL and DREF."""
    told = {
        "azimuth": number + 0.5,
        "elevation": 0.5,
        "blanked": 0,
        "first": 500,
        "latitude": 33.65414,
    } | other
    days, milliseconds = counted(name)
    dref = struct.pack(
        ">4sIHhHHhBBff", b"DREF", 0, codes.size, told["first"], 1000, 50, 16, 0, codes.itemsize * 8, 2, 66
    )
    rvol = struct.pack(">4sHBBffhH", b"RVOL", 44, 2, 0, told["latitude"], -101.814163, 1005, 24).ljust(
        44, b"\0"
    )
    head = struct.pack(
        ">4sIHHfBBHBBBBfBBHII", name[:4].encode(), milliseconds, days, number, told["azimuth"],
        0, 0, 0, 2, state, cut, 1, told["elevation"], told["blanked"], 0, 2, 40, 84,
    )  # fmt: skip
    body = head + rvol + dref + codes.astype(codes.dtype.newbyteorder(">")).tobytes()
    return message(31, body + b"\0" * (len(body) % 2))


def legacy(name: str, number: int, state: int, cut: int, codes: np.ndarray, **other: object) -> bytes:
    """A radial of type 1."""
    told = {"azimuth": number + 0.5, "elevation": 0.5, "blanked": 0, "first": 500} | other
    days, milliseconds = counted(name)
    turn = 32768 / 180
    head = struct.pack(
        ">IHHHHHHHhhHHHHHfHHH", milliseconds, days, 4660, round(told["azimuth"] * turn), number, state,
        round(told["elevation"] * turn), cut, told["first"], -375, 1000, 250, codes.size, 0, 1, 0.0, 100, 0, 0,
    )  # fmt: skip
    head = head.ljust(66, b"\0") + struct.pack(">H", told["blanked"])
    return message(1, head.ljust(100, b"\0") + codes.tobytes())


def radials(name: str, write: Callable[..., bytes], codes: np.ndarray, **other: object) -> list[bytes]:
    """A sweep of the codes (radial, gate), and one of a second, higher cut, which ends the volume."""
    last = len(codes) - 1
    states = [3, *[1] * (last - 1), 2]
    lowest = [write(name, number, states[number], 1, codes[number], **other) for number in range(last + 1)]
    higher = np.full(codes.shape[1], 200, codes.dtype)
    return [*lowest, write(name, 0, 0, 2, higher, elevation=1.5), write(name, 1, 4, 2, higher, elevation=1.5)]


def volume(name: str, codes: np.ndarray, **other: object) -> bytes:
    """A volume as the network sends it since 2008: the radials in records of 120, each zipped."""
    written = radials(name, generic, codes, **other)
    parts = [b"".join([message(2, b"\0" * 80), message(15, b"adapted")])]
    parts += [b"".join(written[first : first + 120]) for first in range(0, len(written), 120)]
    return header(name) + zipped_records(parts)


def zipped_records(parts: list[bytes]) -> bytes:
    records = [bz2.compress(part) for part in parts]
    sizes = [len(record) for record in records]
    sizes[-1] = -sizes[-1]
    return b"".join(struct.pack(">i", size) + record for size, record in zip(sizes, records, strict=True))


def old_volume(name: str, codes: np.ndarray, **other: object) -> bytes:
    written = [message(2, b"\0" * 80), *radials(name, legacy, codes, **other), message(2, b"\0" * 80)]
    return gzip.compress(header(name, b"ARCHIVE2.001") + b"".join(written), 1)


def blank(dtype: type[np.unsignedinteger] = np.uint8) -> np.ndarray:
    """A dry turn: below threshold in each of 10 gates of a kilometre, the middle of the first at 500 m."""
    return np.zeros((360, 10), dtype)


def source(**changes: object) -> Nexrad:
    return Nexrad(**{"reach": 12.0, "cell": 1000.0, **changes})


def read(path: Path, content: bytes, **changes: object) -> Frame:
    path.write_bytes(content)
    return source(**changes).read(RemoteFile(str(path), None))


def written(layout: str, path: Path, codes: np.ndarray, other: dict[str, object], **changes: object) -> Frame:
    """The frame of a volume in one of the layouts."""
    if layout == "new":
        return read(path / NEW, volume(NEW, codes, **other), **changes)
    return read(path / OLD, old_volume(OLD, codes, **other), place=PLACE, **changes)


LAYOUTS = pytest.mark.parametrize("layout", ["new", "old"])


def configured(path: Path, **changes: object) -> Nexrad:
    page = yaml.safe_load((cli.CONFIGS / "source/nexrad.yaml").read_text())
    return instantiate(page | {"path": str(path)} | changes, _convert_="all")


def real_sweep(path: Path):
    content = path.read_bytes()
    begin = datetime.strptime(path.name[4:19], "%Y%m%d_%H%M%S").replace(tzinfo=UTC)
    return lowest_sweep(gzip.decompress(content) if path.suffix == ".gz" else content, begin)


@pytest.mark.data
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param("KLBB20160601_150025_V06", marks=pytest.mark.slow), "KLIX20050828_180149.gz"]
)
def test_every_gate_of_the_real_lowest_sweeps_reads_as_xradar_reads_it(name, data, tmp_path):
    import xradar

    path = data / "nexrad_l2" / name
    plain = tmp_path / name.removesuffix(".gz")
    plain.write_bytes(gzip.decompress(path.read_bytes()) if path.suffix else path.read_bytes())
    with xradar.io.open_nexradlevel2_datatree(plain, sweep=[0], mask_and_scale=False) as tree:
        theirs = tree["sweep_0"].ds.sortby("azimuth").load()
    ours = real_sweep(path)
    order = np.argsort(ours.azimuths)
    assert np.array_equal(ours.codes[order], theirs.DBZH.values)  # masks are the codes 0 and 1
    dbz = reflectivities(ours.gates)[ours.codes[order]]
    echo = theirs.DBZH.values > 1
    assert np.array_equal(~np.isnan(dbz), echo)
    assert np.array_equal(dbz[echo], theirs.DBZH.values[echo] * 0.5 - 33)
    assert np.array_equal(ours.azimuths[order], theirs.azimuth.values)
    assert np.array_equal(ours.elevations[order], theirs.elevation.values)
    gates = ours.gates.first + ours.gates.step * np.arange(ours.codes.shape[1])
    assert np.array_equal(gates, theirs.range.values)
    if ours.place is not None:
        site = [float(tree.ds[name]) for name in ("longitude", "latitude", "altitude")]
        assert ours.place == pytest.approx(site, abs=1e-6)
    assert (echo.size, int(echo.sum())) == {720: (1_319_040, 213_468), 367: (168_820, 55_421)}[len(dbz)]


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_cells_of_the_real_volumes_hold_the_gate_that_brute_force_finds(name, data):
    from wradlib.georef.misc import bin_distance

    path = data / "nexrad_l2" / name
    frame = configured(path.parent, station=name[:4], place=REAL[name]).read(RemoteFile(str(path), None))
    sweep = real_sweep(path)
    place = REAL[name] or sweep.place
    lon, lat = frame.grid.lonlat()
    cells = np.random.default_rng(1).integers(0, frame.grid.x_size, (1000, 2))
    middles = sweep.gates.first + sweep.gates.step * np.arange(sweep.codes.shape[1])
    same = 0
    for row, column in cells:
        azimuth, _, ground = Geod(ellps="WGS84").inv(*place[:2], lon[row, column], lat[row, column])
        off = np.abs((sweep.azimuths - azimuth + 180) % 360 - 180)
        radial = off.argmin()
        along = bin_distance(middles, sweep.elevations[radial], place[2], re=6371000.0, ke=4 / 3)
        gate = np.abs(along - ground).argmin()
        code = int(sweep.codes[radial, gate])
        rate = (10 ** (min((code - 66) / 2, 53) / 10) / 300) ** (1 / 1.4) if code else 0.0
        value = frame.values[row, column]
        if ground > 230_000 or along[0] - ground > sweep.gates.step / 2 or off[radial] > 0.75 * sweep.spacing:
            assert np.isnan(value)
        same += np.isnan(value) or value == pytest.approx(rate, rel=1e-5)
    assert same == len(cells)
    assert 0.02 < (frame.values > 0.1).mean() < 0.2
    assert np.isnan(frame.values).mean() == pytest.approx(1 - np.pi / 4, abs=1e-3)
    assert np.nanmax(frame.values) == pytest.approx(103.83, abs=0.01)
    assert frame.valid_time == {"KLBB": datetime(2016, 6, 1, 15, tzinfo=UTC)}.get(
        name[:4], datetime(2005, 8, 28, 18, tzinfo=UTC)
    )


@LAYOUTS
def test_beams_and_corners_lie_where_the_ellipsoid_puts_them(layout, tmp_path):
    frame = written(layout, tmp_path, blank(), {}, reach=230.0, cell=500.0)
    place = (-101.814163, 33.65414) if layout == "new" else PLACE[:2]
    lon, lat = frame.grid.lonlat()
    worst = 0.0
    for row, column in [(0, 0), (0, 919), (919, 0), (919, 919), (459, 460), (100, 700), (600, 3)]:
        x, y = frame.grid.x[column], frame.grid.y[row]
        there = Geod(ellps="WGS84").fwd(*place, np.degrees(np.arctan2(x, y)), np.hypot(x, y))
        _, _, metres = Geod(ellps="WGS84").inv(lon[row, column], lat[row, column], *there[:2])
        worst = max(worst, metres)
    assert worst < 0.01
    assert (frame.grid.x[0], frame.grid.y[0], frame.grid.shape) == (-229_750, 229_750, (920, 920))


@given(along=st.floats(1, 460_000), elevation=st.floats(-0.5, 20), height=st.floats(0, 4000))
def test_a_slant_range_is_the_inverse_of_wradlibs_ground_distance(along, elevation, height):
    from wradlib.georef.misc import bin_distance

    ground = bin_distance(np.array([along]), elevation, height, re=6371000.0, ke=4 / 3)
    assert slant_range(ground, np.array([elevation]), height)[0] == pytest.approx(along, abs=0.01)


@LAYOUTS
def test_below_threshold_is_dry_range_folded_is_missing_and_the_rest_is_rain_by_the_stated_z_r(
    layout, tmp_path
):
    codes = blank()
    codes[70:110, 3] = 146  # 40 dBZ, 3 to 4 km to the east
    codes[170:190, 4], codes[250:290, 2] = 1, 200  # folded in the south, 67 dBZ in the west
    frame = written(layout, tmp_path, codes, {})
    assert frame.variable == RAINFALL_RATE
    assert frame.values[11:13, 15] == pytest.approx((10**4 / 300) ** (1 / 1.4), rel=1e-6)
    assert np.isnan(frame.values[16, 11:13]).all()
    assert frame.values[11:13, 9] == pytest.approx(
        (10**5.3 / 300) ** (1 / 1.4), rel=1e-6
    )  # cut off at 53 dBZ
    assert (frame.values > 0).sum() == 4
    y, x = np.indices((24, 24)) - 11.5
    observed = np.hypot(y, x) < 9.99  # ten gates of a kilometre
    observed[16, 11:13] = False
    assert np.array_equal(~np.isnan(frame.values), observed)
    other = written(layout, tmp_path, codes, {}, z_r=[200, 1.6], cap=None)
    assert other.values[12, 15] == pytest.approx((10**4 / 200) ** (1 / 1.6), rel=1e-6)
    assert other.values[11, 9] == pytest.approx((10**6.7 / 200) ** (1 / 1.6), rel=1e-6)


def test_reflectivity_stays_with_no_echo_below_the_lowest_code(tmp_path):
    codes = blank(np.uint16)  # 16 bits
    codes[70:110, 3], codes[:20, 5], codes[170:190, 4] = 146, 2, 1
    frame = read(tmp_path / NEW, volume(NEW, codes), z_r=None, cap=None)
    assert frame.variable == REFLECTIVITY
    assert sorted(set(frame.values[~np.isnan(frame.values)])) == [-33, -32, 40]


@LAYOUTS
def test_no_gate_is_not_observed(layout, tmp_path):
    codes = np.full((360, 10), 100, np.uint8)
    y, x = np.indices((24, 24)) - 11.5
    near = written(layout, tmp_path, codes, {"first": 4500})
    assert np.array_equal(np.isnan(near.values), (np.hypot(y, x) < 4) | (np.hypot(y, x) > 12))
    blanked = written(layout, tmp_path, codes, {"blanked": 1})
    assert np.isnan(blanked.values).all()
    of_the_volume = written(layout, tmp_path, codes, {"blanked": 4})
    assert (of_the_volume.values > 0).any()


def test_radials_that_are_missing_leave_a_gap_and_no_invention(tmp_path):
    written = radials(NEW, generic, np.full((360, 10), 100, np.uint8))
    del written[40:60]  # towards 40 to 60 degrees
    frame = read(tmp_path / NEW, header(NEW) + zipped_records(written), cell=250.0)
    y, x = np.meshgrid(frame.grid.y, frame.grid.x, indexing="ij")
    towards, far = np.degrees(np.arctan2(x, y)) % 360, np.hypot(x, y)
    assert np.isnan(frame.values[(towards > 40.3) & (towards < 59.7) & (far < 9990)]).all()
    outside = ((towards < 40.2) | (towards > 59.8)) & (far < 9990)
    assert not np.isnan(frame.values[outside]).any()


@LAYOUTS
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_gate_stands_where_its_radial_points(layout, seed, tmp_path_factory):
    codes = np.random.default_rng(seed).integers(0, 180, (360, 10)).astype(np.uint8)
    frame = written(layout, tmp_path_factory.mktemp("nexrad"), codes, {}, cap=None, reach=10.0, cell=200.0)
    y, x = np.meshgrid(frame.grid.y, frame.grid.x, indexing="ij")
    ray = np.minimum((np.degrees(np.arctan2(x, y)) % 360).astype(int), 359)
    gate = (np.hypot(x, y) / 1000).astype(int)
    far = np.hypot(x, y)
    inside = (np.abs(far % 1000 - 500) < 496) & (gate < 10)  # the beam of an antenna so high climbs by 3 m
    inside &= np.abs(np.degrees(np.arctan2(x, y)) % 1 - 0.5) < 0.495  # type 1 counts angles in 0.005 degrees
    expected = (10 ** ((codes - 66.0) / 20) / 300) ** (1 / 1.4)
    expected[codes == 0], expected[codes == 1] = 0, np.nan
    np.testing.assert_allclose(frame.values[inside], expected[ray[inside], gate[inside]], rtol=1e-5)


@pytest.mark.parametrize(
    "name, minutes",
    [
        ("KXYZ20200102_030229_V06", 0),
        ("KXYZ20200102_030230_V06", 5),
        ("KXYZ20200102_030729", 5),
        ("KXYZ20200102_030730_V08.gz", 10),
    ],
)
def test_the_valid_time_is_the_beginning_rounded_to_the_cadence(name, minutes):
    assert Nexrad().valid_time(name) == datetime(2020, 1, 2, 3, minutes, tzinfo=UTC)


@LAYOUTS
def test_a_frame_has_the_time_that_its_name_promises(layout, tmp_path):
    written(layout, tmp_path, blank(), {})
    nexrad = source(path=str(tmp_path), place=None if layout == "new" else PLACE)
    (file,) = nexrad.files(None, None)
    frame = decode(nexrad, file)
    assert frame.valid_time == file.valid_time
    assert (frame.cadence, frame.source) == (
        timedelta(minutes=5),
        "NOAA NEXRAD KXYZ, lowest sweep, Z = 300 R^1.4",
    )


def test_files_of_one_radar_come_in_order_and_of_several_a_choice_is_asked_for(tmp_path):
    names = [
        "KXYZ20200102_030901_V06",
        "KXYZ20200102_030405_V06",
        "KXYZ20200102_030405_V06_MDM",
        "KABC20200102_030405_V06",
    ]
    for name in names:
        (tmp_path / name).touch()
    found = list(Nexrad(str(tmp_path), station="KXYZ").files(None, None))
    assert [Path(file.url).name for file in found] == [names[1], names[0]]
    late = Nexrad(str(tmp_path), station="KXYZ").files(datetime(2020, 1, 2, 3, 9, tzinfo=UTC), None)
    assert [Path(file.url).name for file in late] == [names[0]]
    with pytest.raises(ValueError, match=r"holds the radars KABC, KXYZ.*source\.station"):
        list(Nexrad(str(tmp_path)).files(None, None))
    with pytest.raises(ValueError, match="no files of NEXRAD Level II"):
        list(Nexrad(str(tmp_path), station="KLOT").files(None, None))


def test_a_place_must_be_told_and_be_the_radars(tmp_path):
    (tmp_path / OLD).write_bytes(old_volume(OLD, blank()))
    with pytest.raises(ValueError, match=rf"^{OLD}: .*does not say where its radar is; give source\.place"):
        source().read(RemoteFile(str(tmp_path / OLD), None))
    frame = read(tmp_path / NEW, volume(NEW, blank()), place=[-101.8142, 33.6541, 1000.0])
    assert "33.6541," in frame.grid.crs
    with pytest.raises(ValueError, match=r"556 m from source\.place"):
        read(tmp_path / NEW, volume(NEW, blank()), place=[-101.8142, 33.65915, 1000.0])


def spoilt(layout: str, spoil: Callable[[bytes], bytes]) -> bytes:
    """A volume that was changed before it was zipped."""
    if layout == "old":
        return gzip.compress(spoil(gzip.decompress(old_volume(OLD, blank()))), 1)
    parts = b"".join(radials(NEW, generic, blank()))
    return header(NEW) + zipped_records([spoil(parts)])


def put(place: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda m: m[:place] + value + m[place + len(value) :]


RADIAL = 24 + 2432 + 28  # where the first radial of an old volume begins, behind its message's header
DAMAGE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "text": (NEW, lambda: b"<html>Not found</html>", "not a NEXRAD Level II volume"),
    "nothing": (NEW, lambda: b"", "not a NEXRAD Level II volume"),
    "only a header": (NEW, lambda: header(NEW), "does not end the volume"),
    "cut in a record": (NEW, lambda: volume(NEW, blank())[:-7], "cut or damaged"),
    "cut between records": (NEW, lambda: header(NEW) + zipped_records(radials(NEW, generic, blank())[:-1]), "does not end the volume"),
    "longer": (NEW, lambda: volume(NEW, blank()) + b"\0\0\0\0", "cut or damaged"),
    "a flipped bit": (NEW, lambda: put(400, b"\xff\x00")(volume(NEW, blank())), "record is damaged"),
    "a record of no bytes": (NEW, lambda: put(24, b"\0\0\0\0")(volume(NEW, blank())), "record of 0 begins"),
    "a record of the least number": (NEW, lambda: put(24, b"\x80\0\0\0")(volume(NEW, blank())), "record of 2147483648"),
    "a bomb": (NEW, lambda: header(NEW) + zipped_records([bytes(33 * 2**20)]), "grows to more than"),
    "bytes behind a zipped record": (NEW, lambda: header(NEW) + struct.pack(">i", 20 + len(bz2.compress(b""))) + bz2.compress(b"") + bytes(20), "is cut, or grows"),
    "another radar": (NEW, lambda: put(20, b"KABC")(volume(NEW, blank())), "not the one that its name says"),
    "another day": (NEW, lambda: put(15, b"\1")(volume(NEW, blank())), "other times than the volume"),
    "no day": (NEW, lambda: put(12, bytes(4))(volume(NEW, blank())), "no radar or no time"),
    "no radials": (NEW, lambda: header(NEW) + zipped_records([message(2, b"\0" * 80)]), "does not end the volume"),
    "half a message": (NEW, lambda: spoilt("new", lambda m: m[: len(m) // 2 + 1]), "message of|ends too early"),
    "a message of no length": (NEW, lambda: spoilt("new", put(12, b"\0\0")), "a message of 12 bytes"),
    "a direction that is no number": (NEW, lambda: volume(NEW, blank(), azimuth=float("nan")), "no direction"),
    "a direction beyond a turn": (NEW, lambda: volume(NEW, blank(), azimuth=361.0), "no direction"),
    "a high sweep": (NEW, lambda: volume(NEW, blank(), elevation=3.0), "begins 3.0 degrees high"),
    "no latitude": (NEW, lambda: volume(NEW, blank(), latitude=95.0), "no place on earth"),
    "far gates": (NEW, lambda: volume(NEW, blank(), first=20_000), "no gates of this radar"),
    "gates beyond the end": (NEW, lambda: spoilt("new", put(28 + 84 + 8, b"\xff\xff")), "65535 gates of 8 bits"),
    "gates of no length": (NEW, lambda: spoilt("new", put(28 + 84 + 12, b"\0\0")), "no gates of this radar"),
    "a packing": (NEW, lambda: spoilt("new", put(28 + 16, b"\1")), "packing 1"),
    "no reflectivity": (NEW, lambda: spoilt("new", put(28 + 84, b"DVEL")), "without reflectivity"),
    "a block beyond the end": (NEW, lambda: spoilt("new", put(28 + 36, b"\xff\xff\xff\xff")), "without reflectivity"),
    "a radial of another kind": (NEW, lambda: spoilt("new", put(28 + 84 + 12, b"\3\xe9")), "of several kinds"),
    "a radial of another day": (NEW, lambda: spoilt("new", put(28 + 8, b"\1")), "other times than the volume"),
    "a sweep without end": (NEW, lambda: header(NEW) + zipped_records([*radials(NEW, generic, blank())[:300], generic(NEW, 1, 4, 2, blank()[0])]), "first sweep is not whole"),
    "a sweep that begins with the second cut": (NEW, lambda: header(NEW) + zipped_records(radials(NEW, generic, blank())[360:]), "first sweep is not whole"),
    "too many radials": (NEW, lambda: header(NEW) + zipped_records([generic(NEW, 1, 1, 1, blank()[0]) * 2001 + generic(NEW, 1, 4, 1, blank()[0])]), "more than 2000 radials"),
    "old and cut": (OLD, lambda: spoilt("old", lambda m: m[:-2432 * 2]), "does not end the volume"),
    "old and cut in a message": (OLD, lambda: spoilt("old", lambda m: m[:-20]), "message of 2432 bytes"),
    "old with no codes": (OLD, lambda: spoilt("old", put(RADIAL + 36, b"\0\0")), "without reflectivity"),
    "old with codes beyond the end": (OLD, lambda: spoilt("old", put(RADIAL + 26, b"\x20\0")), "without reflectivity"),
    "a damaged gzip file": (OLD, lambda: put(100, b"\0" * 8)(old_volume(OLD, blank())), "damaged gzip"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_volume_is_refused_with_its_name_and_a_reason(damage, tmp_path):
    name, spoil, reason = DAMAGE[damage]
    with pytest.raises(ValueError, match=rf"^{name}: .*({reason})"):
        read(tmp_path / name, spoil(), place=None if name == NEW else PLACE)


@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), head=st.booleans())
def test_no_flipped_bit_changes_a_value_place_or_time_in_silence(share, bit, head, tmp_path_factory):
    codes = np.random.default_rng(1).integers(0, 180, (360, 10)).astype(np.uint8)
    whole, path = volume(NEW, codes), tmp_path_factory.mktemp("flip") / NEW
    place = int(share * (40 if head else len(whole)))
    expected = read(path, whole)
    try:
        frame = read(path, put(place, bytes([whole[place] ^ 1 << bit]))(whole))
    except ValueError as error:
        assert str(error).startswith(NEW)
        return
    assert (frame.grid, frame.valid_time) == (expected.grid, expected.valid_time)
    assert np.array_equal(frame.values, expected.values, equal_nan=True)


def test_a_volume_is_the_same_zipped_in_records_zipped_whole_and_plain(tmp_path):
    codes = np.random.default_rng(2).integers(0, 180, (360, 10)).astype(np.uint8)
    plain = header(NEW) + b"".join(radials(NEW, generic, codes))
    frames = [read(tmp_path / NEW, content) for content in (volume(NEW, codes), plain, gzip.compress(plain))]
    for frame in frames[1:]:
        assert frame.grid == frames[0].grid
        assert np.array_equal(frame.values, frames[0].values, equal_nan=True)


@pytest.mark.data
def test_a_real_volume_cut_anywhere_is_refused(data, tmp_path):
    whole = (data / "nexrad_l2" / "KLBB20160601_150025_V06").read_bytes()
    path = tmp_path / "KLBB20160601_150025_V06"
    for place in range(100, len(whole), len(whole) // 9):
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=r"^KLBB.*cut or damaged"):
            Nexrad().read(RemoteFile(str(path), None))


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"reach": 0.0}, "reach=0.0 km"),
        ({"cell": 10.0}, "1 to 4000 cells"),
        ({"cadence": 0.0}, "cadence=0.0 minutes"),
        ({"z_r": [300]}, r"z_r=\[300\]: expected a and b"),
        ({"z_r": None}, "cap=53.0: expected with z_r"),
        ({"place": [0.0, 95.0, 0.0]}, r"place=\[0.0, 95.0, 0.0\]"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        Nexrad(**wrong)
