"""`Simulated`: storms that are born, drift with shear, grow and die, from a seed; a source like any other.

Two kinds of rain share one wind. Wide systems rain over hours; cells within them rise and fall within the
hour. Both are broken up by noise in octaves that is carried along with the wind and renews itself the sooner
the smaller it is (as radar rain does: Seed 2003, J. Appl. Meteor. 42, 381), so extrapolation has skill that
growth and decay end.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property, lru_cache
from typing import ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipelines.cf import RAINFALL_RATE
from pipelines.frame import Frame, parse_time
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile

Field = NDArray[np.float64]  # (y, x) over the grid, or a line of places
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)  # hour 0 of the weather

SYSTEM_LIFE = 6.0  # h, the longest
CELL_LIFE = 1.6  # h, the longest
MARGIN = 120.0  # km around the domain where systems are born that drift in
BIRTHS = 3.0e-5  # systems per km2 and hour
OCTAVES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # km, the spacing of the noise
RENEWAL = (0.6, 0.9, 1.4, 2.2, 3.5, 6.0)  # h after which an octave is new
HEAVIEST = 90.0  # mm/h
ROUGHNESS = 0.45  # the spread of an octave rises with its spacing to this power
NOISE_SIZE = 256  # nodes of an octave, after which it repeats


@dataclass(frozen=True)
class Simulated:
    """One radar over central Europe (52 N, 10 E) on equal-area cells of 1 km, with gaps as real ones have."""

    seed: int = 1
    size: int = 128  # km, and cells, of each side
    frames: int = 300
    cadence: float = 5.0  # minutes
    start: str = "2020-06-01T00:00Z"
    trusted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuses what is no radar.

        Raises:
            ValueError: for no cells, no frames, a cadence that is not above 0, a seed below 0, or a start
                that is no time.
        """
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: expected a whole number from 0")
        if self.size < 8 or self.frames < 1 or not 0 < self.cadence < math.inf:
            raise ValueError(
                f"size={self.size}, frames={self.frames}, cadence={self.cadence}: expected a size of "
                "at least 8 cells, at least 1 frame and a cadence above 0 minutes"
            )
        parse_time(self.start, "source.start")

    @cached_property
    def grid(self) -> Grid:
        """The domain in ETRS89 / LAEA Europe."""
        half = 500.0 * (self.size - 1)  # m
        return Grid("EPSG:3035", 4321000.0 - half, 1000.0, self.size, 3210000.0 + half, -1000.0, self.size)

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The frames within [start, end] that the radar delivered, by rising valid time."""
        first = parse_time(self.start)
        for index in range(self.frames):
            time = first + index * timedelta(minutes=self.cadence)
            if (start and time < start) or (end and time > end) or self._outage(time).whole:
                continue
            yield RemoteFile(f"simulated:{self.seed}:{time:%Y%m%dT%H%M%SZ}", time)

    def read(self, file: RemoteFile) -> Frame:
        """The rain rate (mm/h) that `files` named so; NaN beyond the radar's range and in a lost sector.

        Raises:
            ValueError: for another name than `files` gives.
        """
        name = re.fullmatch(rf"simulated:{self.seed}:(\d{{8}}T\d{{6}}Z)", file.url)
        if name is None:
            raise ValueError(f"{file.url}: expected a name such as simulated:{self.seed}:20200601T000000Z")
        time = parse_time(name[1])
        rate = np.round(rain_rate(self.seed, self.size, (time - EPOCH) / timedelta(hours=1)), 1)
        values = np.where(self._observed(time), rate, np.nan).astype(np.float32)
        return Frame(
            variable=RAINFALL_RATE,
            valid_time=time,
            cadence=timedelta(minutes=self.cadence),
            grid=self.grid,
            values=values,
            source=f"simulated storms, seed {self.seed}",
            sha256=hashlib.sha256(values.tobytes()).hexdigest(),
        )

    def _observed(self, time: datetime) -> NDArray[np.bool_]:
        """Where the radar, at the domain's middle, sees at that time."""
        from_middle = np.arange(self.size) - (self.size - 1) / 2
        east, south = np.meshgrid(from_middle, from_middle)
        outage = self._outage(time)
        off_sector = (np.degrees(np.arctan2(east, -south)) - outage.azimuth + 180) % 360 - 180
        in_range = np.hypot(east, south) <= 0.58 * self.size
        return np.asarray(in_range & ~(np.abs(off_sector) <= outage.width / 2))

    def _outage(self, time: datetime) -> "Outage":
        """What fails at that time: in one hour of ten a sector, in one of six a frame or two."""
        hour, minute = divmod((time - EPOCH) / timedelta(minutes=1), 60)
        rng = np.random.default_rng([self.seed, 0, int(hour)])
        lost, begin = rng.random(2), rng.uniform(0, 50, 2)
        azimuth, width = rng.uniform(0, 360), rng.uniform(20, 70)
        sector = lost[0] < 0.10 and begin[0] <= minute < begin[0] + 25
        whole = lost[1] < 0.17 and begin[1] <= minute < begin[1] + 1.5 * self.cadence
        return Outage(bool(whole), azimuth, width if sector else -1.0)


@dataclass(frozen=True)
class Outage:
    """What a radar fails to deliver."""

    whole: bool  # the frame
    azimuth: float  # degrees clockwise from north, of a lost sector's middle
    width: float  # degrees; below 0: no sector is lost


@dataclass(frozen=True, eq=False)
class Storms:
    """Systems or cells: one number for each of them in every field."""

    birth: Field  # h since the epoch
    life: Field  # h
    x: Field  # km east of the domain's north-west corner, at birth
    y: Field  # km south of it
    length: Field  # km, half axis
    width: Field  # km, half axis
    angle: Field  # radians, of the long axis
    strength: Field  # of a system: 0..1; of a cell: mm/h

    def alive(self, hour: float) -> "Storms":
        """Those that live then."""
        now = (self.birth <= hour) & (hour < self.birth + self.life)
        return Storms(*(values[now] for values in vars(self).values()))

    def near(self, seed: int, size: int, hour: float) -> "Storms":
        """Those that reach into the domain then, with their places moved on to where they are."""
        x, y = carry(seed, self.x, self.y, self.birth, hour)
        middle, reach = (size - 1) / 2, size / 2 + 4 * self.length
        near = (np.abs(x - middle) < reach) & (np.abs(y - middle) < reach)
        moved = {**vars(self), "x": x, "y": y}
        return Storms(*(values[near] for values in moved.values()))

    def distances(self, size: int) -> Field:
        """How far each place is from each storm's middle, in half axes, squared: (storm, y, x)."""
        place = np.arange(size)
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        east, south = place - self.x[:, None], place - self.y[:, None]
        along = (cos / self.length)[:, None, None] * east[:, None, :]
        along = along + (sin / self.length)[:, None, None] * south[:, :, None]
        across = (cos / self.width)[:, None, None] * south[:, :, None]
        across = across - (sin / self.width)[:, None, None] * east[:, None, :]
        return along**2 + across**2

    def vigour(self, hour: float) -> Field:
        """How far each has grown, 0..1: it rises faster than it falls."""
        age = (hour - self.birth) / self.life
        grown: Field = np.sin(np.pi * age**0.7) ** 1.5
        return grown


def rain_rate(seed: int, size: int, hour: float) -> Field:
    """The rain rate (mm/h) over a domain of `size` km; below 0.1 it is dry."""
    systems, cells = (storms.alive(hour).near(seed, size, hour) for storms in weather(seed, size, int(hour)))
    noise = texture(seed, size, hour)
    lift = _sum(systems.strength * systems.vigour(hour), np.exp(-systems.distances(size) / 2))
    wide = -24 + 30 * np.tanh(lift) + 7.0 * noise  # dB of 1 mm/h
    wide = np.where(wide > 0, 12 * np.tanh(wide / 12), wide)  # wide rain rarely exceeds 10 mm/h
    distances, peaks = cells.distances(size), cells.strength * cells.vigour(hour)
    towers = _sum(peaks, np.exp(-distances / 2)) + _sum(0.03 * peaks, np.exp(-distances / 10))
    rate = 10 ** (wide / 10) + towers * 10 ** (0.45 * noise - 0.15)
    return np.where(rate >= 0.1, HEAVIEST * np.tanh(rate / HEAVIEST), 0.0)


def _sum(weights: Field, shapes: Field) -> Field:
    return np.einsum("s,syx->yx", weights, shapes)


def wind(seed: int, x: Field, y: Field, hour: Field | float) -> tuple[Field, Field]:
    """Eastward and southward wind (km/h) at places and hours: a mean that turns slowly, and shear."""
    speed, toward, phase = _climate(seed)
    angle = toward + 0.4 * np.sin(2 * np.pi * hour / 17 + phase[0])
    mean = speed * (1 + 0.25 * np.sin(2 * np.pi * hour / 13 + phase[1]))
    east = mean * np.cos(angle) + 7 * np.sin(2 * np.pi * (y / 170 - hour / 9) + phase[2])
    south = mean * np.sin(angle) + 5 * np.sin(2 * np.pi * (x / 210 + hour / 11) + phase[3])
    return east, south


@lru_cache(maxsize=8)
def _climate(seed: int) -> tuple[float, float, Field]:
    """Mean wind (km/h), where it blows to (radians from east to south), and where the slow waves begin."""
    rng = np.random.default_rng([seed, 1])
    return rng.uniform(28, 45), rng.uniform(-0.9, 0.5), rng.uniform(0, 2 * np.pi, 5)


def carry(seed: int, x: Field, y: Field, since: Field | float, until: Field | float) -> tuple[Field, Field]:
    """Where the wind carries places from one hour to another, forward or back (midpoint rule)."""
    span = np.asarray(until) - np.asarray(since)
    steps = max(1, int(np.ceil(np.abs(span).max(initial=0) / 0.25)))
    step = span / steps
    for index in range(steps):
        hour = since + index * step
        east, south = wind(seed, x, y, hour)
        east, south = wind(seed, x + east * step / 2, y + south * step / 2, hour + step / 2)
        x, y = x + east * step, y + south * step
    return x, y


@lru_cache(maxsize=64)
def weather(seed: int, size: int, hour: int) -> tuple[Storms, Storms]:
    """The systems and the cells that may live in an hour."""
    born = [_born(seed, size, hour - back) for back in range(int(SYSTEM_LIFE + CELL_LIFE) + 2)]
    return _together([systems for systems, _ in born]), _together([cells for _, cells in born])


def _together(parts: list[Storms]) -> Storms:
    fields = zip(*(vars(part).values() for part in parts), strict=True)
    return Storms(*(np.concatenate(values) for values in fields))


@lru_cache(maxsize=256)
def _born(seed: int, size: int, hour: int) -> tuple[Storms, Storms]:
    """The systems born within an hour, and the cells born in them as long as they live."""
    rng = np.random.default_rng([seed, 2, hour])
    _, _, phase = _climate(seed)
    busy = 1 + 0.7 * np.sin(2 * np.pi * hour / 15 + phase[4])  # quiet hours and busy ones
    count = int(rng.poisson(BIRTHS * busy * (size + 2 * MARGIN) ** 2))
    length = rng.uniform(12, 45, count)
    systems = Storms(
        birth=hour + rng.uniform(0, 1, count),
        life=rng.uniform(2, SYSTEM_LIFE, count),
        x=rng.uniform(-MARGIN, size + MARGIN, count),
        y=rng.uniform(-MARGIN, size + MARGIN, count),
        length=length,
        width=length * rng.uniform(0.3, 0.8, count),
        angle=rng.normal(1.2, 0.5, count),
        strength=rng.uniform(0.5, 1.3, count),
    )
    return systems, _cells(seed, rng, systems)


def _cells(seed: int, rng: np.random.Generator, systems: Storms) -> Storms:
    """The cells of systems: some have many, some none."""
    many = rng.poisson(rng.gamma(0.7, 8.0, systems.birth.size) * systems.life)
    of = np.repeat(np.arange(systems.birth.size), many)
    birth = systems.birth[of] + systems.life[of] * rng.uniform(0.05, 0.85, of.size)
    x, y = carry(seed, systems.x[of], systems.y[of], systems.birth[of], birth)
    along, across = rng.normal(0, 0.8, (2, of.size)) * (systems.length[of], systems.width[of])
    cos, sin = np.cos(systems.angle[of]), np.sin(systems.angle[of])
    size = rng.uniform(1.2, 3.2, of.size)
    return Storms(
        birth=birth,
        life=rng.uniform(0.6, CELL_LIFE, of.size),
        x=x + along * cos - across * sin,
        y=y + along * sin + across * cos,
        length=size * rng.uniform(1.0, 1.6, of.size),
        width=size,
        angle=rng.uniform(0, np.pi, of.size),
        strength=np.minimum(8 + rng.gamma(1.6, 12.0, of.size), 70),
    )


def texture(seed: int, size: int, hour: float) -> Field:
    """Noise of mean 0 and spread about 1 over the domain, carried by the wind."""
    nodes = np.linspace(0, size - 1, max(2, size // 8))  # the wind is smooth: linear in between
    hat = np.maximum(0, 1 - np.abs(np.arange(size)[:, None] - nodes) / (nodes[1] - nodes[0]))
    east, south = np.meshgrid(nodes, nodes)
    total = np.zeros((size, size))
    for octave, (spacing, renewal) in enumerate(zip(OCTAVES, RENEWAL, strict=True)):
        age, share = divmod(hour / renewal, 1.0)
        weights = {int(age): np.cos(share * np.pi / 2), int(age) + 1: np.sin(share * np.pi / 2)}
        for age, weight in weights.items():
            x, y = carry(seed, east, south, hour, age * renewal)
            part = _sampled(_noise(seed, octave, age), hat @ x @ hat.T, hat @ y @ hat.T, spacing)
            total += weight * spacing**ROUGHNESS * part
    spread = float(np.sqrt(sum(spacing ** (2 * ROUGHNESS) for spacing in OCTAVES)))
    return total / spread


def _sampled(noise: NDArray[np.float32], x: Field, y: Field, spacing: float) -> Field:
    """Noise at places (km); its nodes are turned against the grid's, which hides them."""
    turn = 0.3 + spacing
    column = (x * np.cos(turn) - y * np.sin(turn)) / spacing
    row = (x * np.sin(turn) + y * np.cos(turn)) / spacing
    size = np.float64(NOISE_SIZE)
    sampled = cv2.remap(
        noise,
        np.mod(column, size).astype(np.float32),
        np.mod(row, size).astype(np.float32),
        cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_WRAP,
    )
    return np.asarray(sampled, np.float64)


@lru_cache(maxsize=32)
def _noise(seed: int, octave: int, age: int) -> NDArray[np.float32]:
    """Smooth noise of spread 1 on a torus; another one for every octave and age."""
    white = np.random.default_rng([seed, 3, octave, age]).standard_normal((NOISE_SIZE, NOISE_SIZE))
    smooth = gaussian_filter(white, 0.8, mode="wrap")
    return np.asarray(smooth / smooth.std(), np.float32)
