"""`Nexrad`: volumes of one radar of the US network (WSR-88D, "Level II"), and of its lowest sweep the rain.

A volume file (ICD 2620010 of the NEXRAD Radar Operations Center) is a header and messages, zipped whole by
gzip or in records by bzip2. Each radial of a sweep is a message (ICD 2620002): type 31 since 2008, type 1
before. Here is read the first sweep, which is the lowest and the one that reaches farthest, and of it the
reflectivity. Codes 0 ("below threshold": observed, and no echo) and 1 ("range folded": an echo of unknown
distance, not observed) are no reflectivities.

A gate lies in the direction of its radial, as far along the ground as a beam over an earth of 4/3 the radius
takes it (Doviak and Zrnic 1993, section 2.2.3). The grid is azimuthal equidistant round the radar, where
distances and directions from it are exact. A cell has the value of the gate that its centre is in, and none
outside of all gates, so that nothing is invented between them.
"""

import bz2
import hashlib
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pyproj import Geod

from pipelines.cf import RAINFALL_RATE, REFLECTIVITY
from pipelines.frame import Frame
from pipelines.grid import Coordinates, Grid
from pipelines.sources.source import RemoteFile, content, named_files, stamp, unzipped, within
from pipelines.words import z_r_law

FILE_NAME = re.compile(r"(?P<station>[A-Z]{4})(?P<time>\d{8}_\d{6})(?:_V\d\d)?(?:\.gz)?")
TITLE = re.compile(rb"(?:AR2V00\d\d|ARCHIVE2)\.\d{3}")
LARGEST = 128 * 2**20  # bytes of a volume; one that is not zipped has some 80 MB at most
LARGEST_RECORD = 32 * 2**20  # bytes that a record may grow to; 120 radials of all moments have 2 MB
HEADER, CONTROL, MESSAGE_HEADER = 24, 4, 28  # bytes
FRAME = 2432  # bytes of a message of any type but those of their own length
LEGACY, GENERIC = 1, 31  # types of the messages that hold a radial
OWN_LENGTH = (29, GENERIC)  # types whose messages are as long as they say
MOST_RADIALS = 2000  # of a sweep; half degrees make 720 and a few of overlap
END_OF_SWEEP, END_OF_VOLUME = 2, 4  # states of a radial
BLANKED = 1  # bit of a radial's status of blanking; the others are of its sweep and volume
HIGHEST = 2.0  # degrees, of a lowest sweep
LONGEST_VOLUME = timedelta(minutes=30)
BESIDE = timedelta(minutes=1)  # that the times in name, header and first radial may differ by
MOVED = 100.0  # m between where a radar is registered and where a volume says it is

BELOW_THRESHOLD, RANGE_FOLDED = 0, 1  # codes that are no reflectivity
EARTH = 6_371_000.0 * 4 / 3  # m, the radius over which a refracted beam is straight
BESIDE_BEAM = 0.75  # of the spacing of radials: a cell farther from all of them was passed over

Bytes = bytes | memoryview
Place = tuple[float, float, float]  # longitude, latitude (degrees) and height of the antenna (m)


@dataclass(frozen=True)
class Gates:
    """Where the gates of a radial lie along the beam, and what their codes mean."""

    first: float  # m, to the middle of the first
    step: float  # m
    bits: int  # of a code
    scale: float  # a code stands for (code - offset) / scale dBZ
    offset: float


@dataclass(frozen=True, eq=False)
class Radial:
    """The reflectivity along one direction."""

    cut: int  # the number of its sweep, from 1
    state: int
    time: datetime
    azimuth: float  # degrees from north, clockwise
    elevation: float  # degrees
    spacing: float  # degrees to the next radial
    gates: Gates
    codes: NDArray[np.uint16]
    blanked: int  # 1 where the transmitter was off in this direction
    place: Place | None = None  # of the radar; radials of type 1 do not say


@dataclass(frozen=True, eq=False)
class Sweep:
    """The radials of one turn of the antenna."""

    azimuths: Coordinates  # degrees
    elevations: Coordinates  # degrees
    spacing: float  # degrees
    gates: Gates
    codes: NDArray[np.uint16]  # (radial, gate); range folded where a radial is blanked or shorter than others
    place: Place | None


@dataclass(frozen=True)
class Nexrad:
    """The volumes of one radar in a folder and its subfolders, as the archive on AWS names them.

    Volumes follow each other unevenly, after 4 to 10 minutes. Their lowest sweep, which takes some 20 to 30
    seconds, is their first: the valid time is the beginning of the volume, rounded to the cadence. Of two
    volumes that share one, the earlier comes first.
    """

    path: str | None = None
    station: str | None = None  # such as KLBB; None: the one that the folder holds
    place: Sequence[float] | None = None  # longitude, latitude, height (m) of the antenna; None: as told
    reach: float = 230.0  # km from the radar; the lowest beam is some 5 km high there
    cell: float = 500.0  # m
    z_r: Sequence[float] | None = (300.0, 1.4)  # a and b of Z = a R^b (Fulton et al. 1998); None: dBZ stay
    cap: float | None = 53.0  # dBZ, with z_r: what is above is taken for hail and gives the rain of this
    no_echo: float = -33.0  # dBZ that stands for "observed, no echo", where dBZ stay; the lowest code is -32
    cadence: float = 5.0  # minutes
    trusted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            ValueError: for a place, reach, cell, cadence or Z-R that there cannot be.
        """
        if min(self.cell, self.cadence) <= 0 or not 2 <= round(2000 * self.reach / self.cell) <= 8000:
            raise ValueError(
                f"reach={self.reach} km, cell={self.cell} m, cadence={self.cadence} minutes: expected more "
                "than 0, and 1 to 4000 cells from the radar to its reach"
            )
        if self.z_r is not None:
            if len(self.z_r) != 2 or min(self.z_r) <= 0:
                raise ValueError(f"z_r={list(self.z_r)}: expected a and b of Z = a R^b, such as [300, 1.4]")
            object.__setattr__(self, "z_r", tuple(self.z_r))
        elif self.cap is not None:
            raise ValueError(f"cap={self.cap}: expected with z_r, whose largest rain it sets; or cap: null")
        if self.place is not None:
            if len(self.place) != 3 or not _is_place(*self.place):
                raise ValueError(f"place={list(self.place)}: expected longitude, latitude and height (m)")
            object.__setattr__(self, "place", tuple(self.place))

    def valid_time(self, name: str) -> datetime | None:
        """When the frame in a file of this name is valid; None for names of other products or radars."""
        match = FILE_NAME.fullmatch(name)
        if match is None or self.station not in (None, match["station"]):
            return None
        begin = stamp(match["time"], "%Y%m%d_%H%M%S")
        return None if begin is None else self._slot(begin)

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The volumes valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, holds no volume at all, or those of several radars.
        """
        found = list(named_files(self, None, None, "NEXRAD Level II", "KLBB20160601_150025_V06"))
        stations = {Path(file.url).name[:4] for file in found}
        if len(stations) > 1:
            raise ValueError(
                f"{self.path}: holds the radars {', '.join(sorted(stations))}, which have a grid each; "
                "choose one with source.station"
            )
        yield from within(found, start, end)

    def read(self, file: RemoteFile) -> Frame:
        """The rain rate (mm/h) or reflectivity (dBZ) of a volume's lowest sweep.

        NaN where no gate is (closer than the first, beyond the last or the reach, between radials that are
        missing), where the transmitter was off, and where echoes are range folded.

        Raises:
            ValueError: naming the file, if it is not a whole volume of this radar.
        """
        path = Path(file.url)
        read = content(path, LARGEST)
        try:
            volume = unzipped(read, LARGEST)
            station, begin = _header(volume)
            sweep = lowest_sweep(volume, begin)
            place = self._placed(sweep)
            grid = self._grid(place)
            values = self._table(sweep.gates)[_codes_on(grid, sweep, place[2])]
            values[np.hypot(grid.x[None, :], grid.y[:, None]) > 1000 * self.reach] = np.nan
            return Frame(
                variable=REFLECTIVITY if self.z_r is None else RAINFALL_RATE,
                valid_time=self._slot(self._named(path.name, station, begin)),
                cadence=timedelta(minutes=self.cadence),
                grid=grid,
                values=values,
                source=f"NOAA NEXRAD {station}, lowest sweep"
                + ("" if self.z_r is None else f", {z_r_law(self.z_r)}"),
                sha256=hashlib.sha256(read).hexdigest(),
            )
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    def _slot(self, begin: datetime) -> datetime:
        cadence = 60 * self.cadence
        return datetime.fromtimestamp(math.floor(begin.timestamp() / cadence + 0.5) * cadence, UTC)

    def _named(self, name: str, station: str, begin: datetime) -> datetime:
        """The beginning of the volume as its name says it, which is to the second; else as its header does.

        Raises:
            ValueError: if the name is that of another radar or time.
        """
        if self.station not in (None, station):
            raise ValueError(f"a volume of {station}, expected {self.station}; choose it by source.station")
        match = FILE_NAME.fullmatch(name)
        named = stamp(match["time"], "%Y%m%d_%H%M%S") if match else None
        if match is None or named is None:
            return begin
        if match["station"] != station or abs(named - begin) > BESIDE:
            raise ValueError(f"a volume of {station} that begins {begin}: not the one that its name says")
        return named

    def _placed(self, sweep: Sweep) -> Place:
        """Where the radar is.

        Raises:
            ValueError: if nothing says it, or the volume says otherwise than the configuration.
        """
        if self.place is None:
            if sweep.place is None:
                raise ValueError(
                    "a volume from before 2008, which does not say where its radar is; give source.place "
                    "as [longitude, latitude, height of the antenna in m]"
                )
            return sweep.place
        longitude, latitude, height = self.place
        if sweep.place is not None:
            _, _, metres = Geod(ellps="WGS84").inv(longitude, latitude, *sweep.place[:2])
            if not metres <= MOVED:
                raise ValueError(
                    f"its radar is at {sweep.place}, {metres:.0f} m from source.place={list(self.place)}"
                )
        return longitude, latitude, height

    def _grid(self, place: Place) -> Grid:
        """Cells round the radar, which is where the four middle ones meet."""
        cells = 2 * round(1000 * self.reach / self.cell)
        edge = (cells - 1) / 2 * self.cell
        crs = f"+proj=aeqd +lon_0={place[0]!r} +lat_0={place[1]!r} +datum=WGS84 +units=m"
        return Grid(crs, -edge, self.cell, cells, edge, -self.cell, cells)

    def _table(self, gates: Gates) -> NDArray[np.float32]:
        """What each code stands for, in the quantity's units."""
        table = reflectivities(gates)
        if self.z_r is not None:  # R = (10^(dBZ / 10) / a)^(1 / b)
            a, b = self.z_r
            capped = np.minimum(table, math.inf if self.cap is None else self.cap)
            table = (10 ** (capped / 10) / a) ** (1 / b)
        table[BELOW_THRESHOLD] = self.no_echo if self.z_r is None else 0.0
        return table.astype(np.float32)


def reflectivities(gates: Gates) -> Coordinates:
    """The reflectivity (dBZ) of every code; NaN for the two that stand for none."""
    table = (np.arange(2.0**gates.bits) - gates.offset) / gates.scale
    table[[BELOW_THRESHOLD, RANGE_FOLDED]] = np.nan
    return table


def lowest_sweep(volume: bytes, begin: datetime) -> Sweep:
    """The first sweep of an unzipped volume that begins then.

    Raises:
        ValueError: if the volume is cut or damaged as far as that shows, or begins otherwise.
    """
    records = _records(volume)
    radials = list(_first_cut(records))
    if _last_state(records[-1]) != END_OF_VOLUME:
        raise ValueError("its last radial does not end the volume; a cut or damaged file, fetch it again")
    if not radials or radials[0].cut != 1 or radials[-1].state not in (END_OF_SWEEP, END_OF_VOLUME):
        raise ValueError("its first sweep is not whole; a damaged file, fetch it again")
    if any(not begin - BESIDE <= radial.time <= begin + LONGEST_VOLUME for radial in radials):
        raise ValueError(f"has radials of other times than the volume, which begins {begin}")
    told = {(radial.gates, radial.spacing, radial.place) for radial in radials}
    if len(told) != 1:
        raise ValueError("the radials of its first sweep have gates or places of several kinds")
    elevations = np.array([radial.elevation for radial in radials])
    if not np.median(elevations) <= HIGHEST:
        raise ValueError(
            f"begins {np.median(elevations):.1f} degrees high, expected its lowest sweep, {HIGHEST:g} at most"
        )
    codes = np.full((len(radials), max(radial.codes.size for radial in radials)), RANGE_FOLDED, np.uint16)
    for row, radial in zip(codes, radials, strict=True):
        if not radial.blanked & BLANKED:
            row[: radial.codes.size] = radial.codes
    return Sweep(
        azimuths=np.array([radial.azimuth for radial in radials]),
        elevations=elevations,
        spacing=radials[0].spacing,
        gates=radials[0].gates,
        codes=codes,
        place=radials[0].place,
    )


def slant_range(ground: Coordinates, elevation: Coordinates, height: float) -> Coordinates:
    """How far (m) along a beam, of an elevation in degrees, lies what is that far (m) along the ground.

    The law of sines in the triangle of the earth's centre, the antenna (m above sea level) and the gate.
    """
    angle = ground / EARTH
    return (EARTH + height) * np.sin(angle) / np.cos(np.radians(elevation) + angle)


def _codes_on(grid: Grid, sweep: Sweep, height: float) -> NDArray[np.uint16]:
    """The code of the gate that each cell centre (y, x) lies in; range folded where it lies in none."""
    x, y = grid.x[None, :], grid.y[:, None]
    azimuth = np.degrees(np.arctan2(x, y)) % 360
    radial, beside = _nearest(sweep.azimuths, azimuth)
    along = slant_range(np.hypot(x, y), sweep.elevations[radial], height)
    gate = np.floor((along - sweep.gates.first) / sweep.gates.step + 0.5).astype(np.int64)
    inside = (gate >= 0) & (gate < sweep.codes.shape[1]) & (beside <= BESIDE_BEAM * sweep.spacing)
    codes = np.full(grid.shape, RANGE_FOLDED, np.uint16)
    codes[inside] = sweep.codes[radial[inside], gate[inside]]
    return codes


def _nearest(azimuths: Coordinates, wanted: Coordinates) -> tuple[NDArray[np.int64], Coordinates]:
    """Of each wanted direction (degrees) the radial that is nearest, and how far it is off."""
    order = np.argsort(azimuths, kind="stable")
    rising = azimuths[order]
    round_ = np.concatenate(([rising[-1] - 360], rising, [rising[0] + 360]))  # the turn, closed
    place = np.searchsorted((round_[:-1] + round_[1:]) / 2, wanted)
    return order[(place - 1) % azimuths.size], np.abs(round_[place] - wanted)


def _is_place(longitude: float, latitude: float, height: float) -> bool:
    return abs(longitude) <= 180 and abs(latitude) <= 89 and -500 <= height <= 9000


def _moment(days: int, milliseconds: int) -> datetime:
    """The time of a date that counts 1970-01-01 as 1, and of milliseconds of that day."""
    return datetime(1969, 12, 31, tzinfo=UTC) + timedelta(days=days, milliseconds=milliseconds)


def _unpacked(form: str, stored: Bytes, place: int) -> tuple[Any, ...]:
    """Fields of a big-endian structure.

    Raises:
        ValueError: if it reaches beyond the end.
    """
    try:
        return struct.unpack_from(f">{form}", stored, place)
    except struct.error as error:
        raise ValueError("a message ends too early; a damaged file, fetch it again") from error


def _header(volume: bytes) -> tuple[str, datetime]:
    """The radar, and when the volume begins."""
    if not TITLE.fullmatch(volume[:12]):
        raise ValueError(f"not a NEXRAD Level II volume: begins with {volume[:12]!r}")
    days, milliseconds, station = _unpacked("II4s", volume, 12)
    if not re.fullmatch(rb"[A-Z]{4}", station) or not 0 < days < 50_000 or milliseconds >= 86_400_000:
        raise ValueError(f"a header of {station!r} and {days} days: no radar or no time")
    return station.decode(), _moment(days, milliseconds)


def _records(volume: bytes) -> list[memoryview]:
    """The parts of a volume, each zipped by bzip2, or the one part where it is not."""
    if volume[HEADER + CONTROL : HEADER + CONTROL + 3] != b"BZh":
        return [memoryview(volume)[HEADER:]]
    records, place = [], HEADER
    while place < len(volume):
        (size,) = _unpacked("i", volume, place)  # of the last, below 0
        place += CONTROL
        if not 0 < abs(size) <= len(volume) - place:
            raise ValueError(
                f"{len(volume)} bytes, in which a record of {abs(size)} begins at {place}; "
                "a cut or damaged file, fetch it again"
            )
        records.append(memoryview(volume)[place : place + abs(size)])
        place += abs(size)
    return records


def _messages(record: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The messages of a record: type and body (what stands behind its header)."""
    plain = _plain(record)
    place = 0
    while place < len(plain):
        halfwords, kind = _unpacked("HxB", plain, place + 12)
        length = 12 + 2 * halfwords if kind in OWN_LENGTH else FRAME
        if not MESSAGE_HEADER <= length <= len(plain) - place:
            raise ValueError(
                f"a message of {length} bytes where {len(plain) - place} are left; "
                "a cut or damaged file, fetch it again"
            )
        yield kind, plain[place + MESSAGE_HEADER : place + length]
        place += length


def _plain(record: memoryview) -> memoryview:
    if bytes(record[:3]) != b"BZh":
        return record
    unzip = bz2.BZ2Decompressor()
    try:
        plain = unzip.decompress(record, LARGEST_RECORD)
    except (OSError, EOFError) as error:
        raise ValueError(f"a record is damaged ({error}); fetch it again") from error
    if not unzip.eof or unzip.unused_data:
        raise ValueError(f"a record is cut, or grows to more than {LARGEST_RECORD} bytes; fetch it again")
    return memoryview(plain)


def _first_cut(records: list[memoryview]) -> Iterator[Radial]:
    """The radials until another sweep begins; what comes later is not unzipped."""
    first, count = None, 0
    for record in records:
        for kind, body in _messages(record):
            if kind not in RADIALS:
                continue
            cut, _ = _cut_and_state(kind, body)
            first, count = cut if first is None else first, count + 1
            if cut != first:
                return
            if count > MOST_RADIALS:
                raise ValueError(f"more than {MOST_RADIALS} radials in a sweep, which none has")
            yield RADIALS[kind](body)


def _last_state(record: memoryview) -> int | None:
    """The state of the last radial in a record; None if it has none."""
    states = [_cut_and_state(kind, body)[1] for kind, body in _messages(record) if kind in RADIALS]
    return states[-1] if states else None


def _cut_and_state(kind: int, body: memoryview) -> tuple[int, int]:
    """The number of a radial's sweep, and the state of the radial in it."""
    state, cut = _unpacked("H2xH", body, 12) if kind == LEGACY else _unpacked("BB", body, 21)
    return cut, state


def _radial(gates: Gates, **told: Any) -> Radial:
    """A radial, whose directions and gates there can be.

    Raises:
        ValueError: if there cannot.
    """
    if not (0 <= told["azimuth"] <= 360 and -2 <= told["elevation"] <= 90):  # false for NaN
        raise ValueError(
            f"a radial towards {told['azimuth']:g}, {told['elevation']:g} degrees high: no direction"
        )
    if not (0 < gates.step <= 5000 and abs(gates.first) <= 10_000 and 0 < gates.scale < 1000):
        raise ValueError(f"{gates}: no gates of this radar")
    return Radial(gates=gates, **told)


def _legacy(body: memoryview) -> Radial:
    """A radial of type 1 (ICD 2620002 before 2008), whose codes are half dBZ from -32.

    Angles are counted in 180 / 32768 degrees.
    """
    milliseconds, days, azimuth, state, elevation, cut = _unpacked("IH2xH2xHHH", body, 0)
    first, step, count = _unpacked("h2xH2xH", body, 18)
    (pointer,) = _unpacked("H", body, 36)
    if not (count and pointer >= 100 and pointer + count <= len(body)):
        raise ValueError("its lowest sweep has a radial without reflectivity")
    return _radial(
        Gates(first, step, 8, 2.0, 66.0),
        cut=cut,
        state=state,
        time=_moment(days, milliseconds),
        azimuth=azimuth * 180 / 32768,
        elevation=elevation * 180 / 32768,
        spacing=1.0,
        codes=np.frombuffer(body, np.uint8, count, pointer).astype(np.uint16),
        blanked=_unpacked("H", body, 66)[0],
    )


def _generic(body: memoryview) -> Radial:
    """A radial of type 31 (ICD 2620002 since 2008), in blocks that say their own scale."""
    milliseconds, days, azimuth, packed = _unpacked("4xIH2xfB", body, 0)
    spacing, state, cut, elevation, blanked, blocks = _unpacked("BBBxfBxH", body, 20)
    if packed or spacing not in (1, 2) or not 0 < blocks <= 16:
        raise ValueError(f"a radial with {blocks} blocks, packing {packed} and spacing {spacing}: not known")
    places = {bytes(body[place : place + 4]): place for place in _unpacked(f"{blocks}I", body, 32)}
    if b"DREF" not in places or b"RVOL" not in places:
        raise ValueError("its lowest sweep has a radial without reflectivity or without place")
    count, first, step, bits, scale, offset = _unpacked("8xHhH5xBff", body, places[b"DREF"])
    latitude, longitude, ground, tower = _unpacked("8xffhH", body, places[b"RVOL"])
    begin = places[b"DREF"] + 28
    if bits not in (8, 16) or not count or begin + count * bits // 8 > len(body):
        raise ValueError(f"a radial of {count} gates of {bits} bits in {len(body)} bytes: not known")
    if not (_is_place(longitude, latitude, ground + tower) and math.isfinite(offset)):
        raise ValueError(f"a radar at {longitude:g}, {latitude:g}, {ground + tower} m: no place on earth")
    return _radial(
        Gates(first, step, bits, scale, offset),
        cut=cut,
        state=state,
        time=_moment(days, milliseconds),
        azimuth=azimuth,
        elevation=elevation,
        spacing=spacing / 2,
        codes=np.frombuffer(body, f">u{bits // 8}", count, begin).astype(np.uint16),
        blanked=blanked,
        place=(round(longitude, 6), round(latitude, 6), float(ground + tower)),  # of 32 bits
    )


RADIALS = {LEGACY: _legacy, GENERIC: _generic}
