"""`Meteonet`: radar frames of the research set MeteoNet (Larvor et al. 2020, Meteo-France), NumPy archives.

An `.npz` holds up to 11 days: `data` (time, y, x), and `dates` as pickled `datetime`s. A pickle may run any
code, so dates are taken out by an unpickler that knows nothing but dates. The published samples are thinned:
from one frame to the next pass 5 minutes or a week.

The quality of the rainfall is an archive of its own: percent, the mean of a day. It says how far to trust
a place that day and not which frames to leave out, so it is a field beside the rain and no mask on it.
"""

import hashlib
import io
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipelines.cf import RADAR_QUALITY, RAINFALL_RATE, REFLECTIVITY, Variable
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, paths, within

CADENCE, DAY = timedelta(minutes=5), timedelta(days=1)
MOST_FRAMES = 12 * 24 * 11  # in the longest third of a month
LARGEST_DATES = 2**20  # bytes of pickled dates
LARGEST_HEADER = 10_000  # bytes
BLOCK = 2**20  # bytes unpacked at a time
MEMBERS = {"data.npy", "dates.npy", "miss_dates.npy"}


@dataclass(frozen=True)
class Product:
    """What the numbers of one kind of file mean."""

    variable: Variable
    scale: float  # of a number, in the variable's units
    missing: int
    cadence: timedelta = CADENCE
    group: str = "radar"  # of a cube


QUALITY = "rainfall_mean_quality-code"
PRODUCTS = {
    "rainfall": Product(RAINFALL_RATE, 0.12, -1),  # 0.01 mm in 5 minutes
    "reflectivity_old": Product(REFLECTIVITY, 1.0, 255),  # lower bound of a class, dBZ
    QUALITY: Product(RADAR_QUALITY, 1.0, 255, DAY, "quality"),
}


@dataclass(frozen=True)
class Meteonet:
    """The frames of one product and zone in a folder and its subfolders, or in one archive."""

    grid: Grid  # of the zone, by `radar_coords_<zone>.npz`
    zone: str = "NW"
    product: str = "rainfall"  # or reflectivity_old, rainfall_mean_quality-code
    path: str | None = None
    trusted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses products whose numbers are not known.

        Raises:
            ValueError: for such a product.
        """
        if self.product not in PRODUCTS:
            raise ValueError(f"source.product={self.product}: expected one of {', '.join(PRODUCTS)}")

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The frames valid within [start, end], by rising valid time; then files that cannot be opened.

        Raises:
            ValueError: if the folder is not there, or holds no file of this product and zone at all.
        """
        yield from within([file for path in self.places() for file in self._frames(path)], start, end)

    def places(self) -> Iterator[Path]:
        """The archives of the product and zone, none of which is opened; `path` may be one of them.

        Raises:
            ValueError: if the folder is not there, or holds none at all.
        """
        name = re.compile(rf"{self.product}_{re.escape(self.zone)}_\d{{4}}_\d{{2}}\.[123]\.npz")
        one = self.path is not None and Path(self.path).is_file()
        all_ = [Path(str(self.path))] if one else paths(self.path, f"MeteoNet {self.product}")
        found = [path for path in all_ if name.fullmatch(path.name)]
        if not found:
            raise ValueError(
                f"{self.path}: no files of MeteoNet {self.product} there or in its subfolders; looked for "
                f"names such as {self.product}_{self.zone}_2016_08.3.npz"
            )
        yield from found

    def read(self, file: RemoteFile) -> Frame:
        """The frame that is valid at the file's time; NaN where it was not observed.

        Raises:
            ValueError: naming the file, if it is no such archive, is damaged, or holds no such time.
        """
        path, product = Path(file.url), PRODUCTS[self.product]
        try:
            with _opened(path) as archive:
                dates = _dates(archive)
            if file.valid_time not in dates:
                raise ValueError(
                    f"holds no frame of {file.valid_time}, but {len(dates)} from {dates[0]} to {dates[-1]}"
                )
            archived = _archived(path, path.stat().st_size, path.stat().st_mtime_ns)
            shape = (len(dates), *self.grid.shape)
            return Frame(
                variable=product.variable,
                valid_time=file.valid_time,
                cadence=product.cadence,
                grid=self.grid,
                values=_physical(archived.frame(dates.index(file.valid_time), shape), product),
                source=f"MeteoNet {self.product} {self.zone}, Meteo-France",
                sha256=archived.sha256,
                group=product.group,
            )
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    def _frames(self, path: Path) -> list[RemoteFile]:
        """The frames in a file; one without a time if it cannot be opened, so that reading it says why."""
        try:
            with _opened(path) as archive:
                return [RemoteFile(str(path), date) for date in _dates(archive)]
        except (ValueError, OSError):
            return [RemoteFile(str(path), None)]


def _physical(numbers: NDArray[np.int16], product: Product) -> NDArray[np.float32]:
    """In the variable's units; NaN where it was not observed."""
    values: NDArray[np.float32] = numbers * np.float32(product.scale)
    values[numbers == product.missing] = np.nan
    return values


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """An archive of plain or deflated arrays and nothing else.

    Raises:
        ValueError: if it is another file, or is damaged where it is read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [member.filename for member in archive.infolist()]
            if not {"data.npy", "dates.npy"} <= set(names) <= MEMBERS or len(names) != len(set(names)):
                raise ValueError(f"holds {names[:10]}, expected {', '.join(sorted(MEMBERS))}")
            packings = {member.compress_type for member in archive.infolist()}
            if not packings <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                raise ValueError("is packed otherwise than by deflate")
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, KeyError) as error:
        raise ValueError(f"a cut or damaged .npz archive, fetch it again ({error})") from error


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and type of the array that a member begins with (NumPy format 1.0)."""
    if npy.read_magic(member) != (1, 0):
        raise ValueError("an array of another NumPy format than 1.0")
    shape, fortran, dtype = npy.read_array_header_1_0(member, max_header_size=LARGEST_HEADER)
    if fortran:
        raise ValueError("an array in Fortran order, expected C")
    return shape, dtype


def _dates(archive: zipfile.ZipFile) -> list[datetime]:
    """The valid times (UTC) of the frames, which rise; of a mean of a day, its end."""
    with archive.open("dates.npy") as member:
        read = member.read(LARGEST_DATES + 1)
    if len(read) > LARGEST_DATES:
        raise ValueError(f"dates of more than {LARGEST_DATES} bytes")
    stored = io.BytesIO(read)
    shape, dtype = _header(stored)
    if len(shape) != 1 or not 1 <= shape[0] <= MOST_FRAMES or dtype.str != "|O":
        raise ValueError(f"dates of shape {shape} and type {dtype}, expected up to {MOST_FRAMES} objects")
    dates = _unpickled_dates(stored)
    if len(dates) != shape[0] or any(late <= soon for soon, late in pairwise(dates)):
        raise ValueError(f"{len(dates)} dates where its header says {shape[0]}, or they do not rise")
    return dates


def _unpickled_dates(stored: IO[bytes]) -> list[datetime]:
    """The dates in a pickled array of them.

    Each global that such a pickle names is answered by a stand-in that only keeps what it is given, made
    anew for every file, so that a hostile pickle can neither call anything nor change it for the next file.
    """

    class Kept:
        """Stands for the array and for its type."""

        state: Any = None

        def __setstate__(self, state: Any) -> None:
            self.state = state

    def moment(packed: object) -> datetime:
        if not isinstance(packed, bytes) or len(packed) != 10:
            raise ValueError("a date that is not one of Python's")
        year, month, day, hour, minute, second = struct.unpack(">HBBBBB", packed[:7])
        return datetime(year, month, day, hour, minute, second, tzinfo=UTC)

    def end_of_day(packed: object) -> datetime:
        if not isinstance(packed, bytes) or len(packed) != 4:
            raise ValueError("a day that is not one of Python's")
        year, month, day = struct.unpack(">HBB", packed)
        return datetime(year, month, day, tzinfo=UTC) + DAY

    def encode(text: object, codec: object) -> bytes:  # of a pickle of protocol 2
        if not isinstance(text, str) or codec != "latin1" or len(text) > 10:
            raise ValueError("a date that is not one of Python's")
        return text.encode("latin1")

    known = {
        "numpy.core.multiarray._reconstruct": lambda *_: Kept(),
        "numpy._core.multiarray._reconstruct": lambda *_: Kept(),
        "numpy.ndarray": None,
        "numpy.dtype": lambda *_: Kept(),
        "datetime.datetime": moment,
        "datetime.date": end_of_day,
        "_codecs.encode": encode,
    }

    class DatesOnly(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f"{module}.{name}" not in known:
                raise ValueError(f"its dates ask for {module}.{name}: refused, it may run anything")
            return known[f"{module}.{name}"]

    try:
        array = DatesOnly(stored).load()
    except ValueError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of itself
        raise ValueError(f"its dates cannot be read ({error})") from error
    state = array.state if isinstance(array, Kept) else None
    dates = state[-1] if isinstance(state, tuple) and state else None
    if not isinstance(dates, list) or not all(type(entry) is datetime for entry in dates):
        raise ValueError("its dates are no list of dates")
    return dates


@lru_cache(maxsize=1)
def _archived(path: Path, size: int, changed: int) -> "_Archived":
    """The frames of the file that is being read, while it stays as it is."""
    return _Archived(path)


class _Archived:
    """The frames of one archive, read forwards: a whole one has 2.8 GB, which has to be unpacked in order."""

    def __init__(self, path: Path):
        """Unpacks all of it once, without keeping any: only its end tells whether it is whole (CRC-32)."""
        self.path = path
        with path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with _opened(path) as archive, archive.open("data.npy") as member:
            while member.read(BLOCK):
                pass
        self._frames: Iterator[NDArray[np.int16]] = iter(())
        self._next = MOST_FRAMES

    def frame(self, number: int, shape: tuple[int, int, int]) -> NDArray[np.int16]:
        """One frame (y, x).

        Raises:
            ValueError: if the array is not of this shape.
        """
        if number < self._next:
            self._frames, self._next = _in_order(self.path, shape), 0
        while True:
            frame = next(self._frames)
            self._next += 1
            if self._next > number:
                return frame


def _in_order(path: Path, shape: tuple[int, int, int]) -> Iterator[NDArray[np.int16]]:
    """All frames, one after the other."""
    with _opened(path) as archive, archive.open("data.npy") as member:
        found, dtype = _header(member)
        if found != shape or dtype.str != "<i2":
            raise ValueError(f"data of shape {found} and type {dtype}, expected {shape} of int16")
        size = shape[1] * shape[2] * dtype.itemsize
        for _ in range(shape[0]):
            read = member.read(size)
            if len(read) != size:
                raise ValueError("its data ends too early")
            yield np.frombuffer(read, dtype).reshape(shape[1:])
        if member.read(1):
            raise ValueError("its data goes on behind its end")
