"""`python -m benchmarks.sources [CONFIG...]`: every source on its real files, beside pysteps or another.

Ours twice: the frame as `Source.read` gives it in this process, and as `Decoder` gives it (copied, read in a
confined process, checked again on this side). Theirs: pysteps' importer where it has one, else the reader
that most use for the format. CPU time on one thread, of all processes together, each file by each in turn,
medians, with the files in the page cache and after a first round that is not counted. Memory: how far the
peak of the resident memory rises above what was resident before, while one frame is read and held, once
everything was read once; each in a process of its own, whose allocator gives freed memory back at once.

That both read the same fields is shown by tests/pipelines/sources/, cell by cell.
"""

import argparse
import ctypes
import gc
import gzip
import os
import statistics
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import BytesIO, StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import psutil

from benchmarks.damage import source_of
from pipelines.decode import Decoder
from pipelines.decoding.reader import Limits
from pipelines.sources.source import RemoteFile, Source

ROOT = Path(__file__).parent.parent
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "GDAL", "OPENCV_FOR")}
QUIET = {"PYTHONWARNINGS": "ignore", "CPL_LOG": os.devnull}  # peers that warn, between lines of the table
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
FOREVER = Limits(files=10**9)  # one reading process for all files, whose clock can be read
PROCESS_CLOCK = 2  # of the kernel's clocks of a process, the one of the scheduler (CPUCLOCK_SCHED)
HEADS = (
    "source",
    "against",
    "frames, cells",
    "ours ms",
    "theirs ms",
    "times as fast",
    "ours frames/s",
    "with `Decoder` ms",
    "ours MiB",
    "theirs MiB",
)

Values = Any  # the peers give arrays, masked arrays and lists of them
Peer = Callable[[RemoteFile], Values]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Contest:
    """A source, its real files, and who else reads them."""

    config: str  # in configs/source/
    folder: str  # in the folder of real files
    against: str
    peer: Peer
    settings: Mapping[str, object] | None = None  # of the source, besides those of its configuration

    @property
    def name(self) -> str:
        """The source as the table shows it."""
        told = ", ".join(f"{key}={value}" for key, value in (self.settings or {}).items())
        return f"`{self.config}`" + (f" {told}" if told else "")


@dataclass(frozen=True)
class Outcome:
    """One line of the table; times in s of CPU, memory in MiB."""

    contest: Contest
    frames: int
    cells: int
    ours: float
    theirs: float
    confined: float
    our_peak: float
    their_peak: float

    def cells_of_table(self) -> tuple[str, ...]:
        """As the table shows it."""
        return (
            self.contest.name,
            self.contest.against,
            f"{self.frames}, {self.frames * self.cells / 1e6:.1f} M",
            f"{1e3 * self.ours:.1f}",
            f"{1e3 * self.theirs:.1f}",
            f"{self.theirs / self.ours:.2f}",
            f"{1 / self.ours:.0f}",
            f"{1e3 * self.confined:.1f}",
            f"{self.our_peak:.1f}",
            f"{self.their_peak:.1f}",
        )


def by_pysteps(importer: str, **settings: object) -> Peer:
    """An importer of pysteps."""

    def read(file: RemoteFile) -> Values:
        with redirect_stdout(StringIO()):  # it says where its configuration lies
            from pysteps.io import importers
        return getattr(importers, importer)(file.url, **settings)[0]

    return read


def by_gdal(
    driver: str,
    archive: str = "",
    scale: float = 1.0,
    offset: float = 0.0,
    least: float = -np.inf,
    most: float = np.inf,
) -> Peer:
    """The first band of a raster by rasterio, in its units; NaN where what is stored lies outside bounds.

    `archive`: the file system of GDAL for a zipped one.
    """

    def read(file: RemoteFile) -> Values:
        import rasterio

        with rasterio.open(f"{archive}{file.url}", driver=driver) as raster:
            stored = raster.read(1)
        values = stored.astype(np.float32) * np.float32(scale) + np.float32(offset)
        values[(stored < least) | (stored > most)] = np.nan
        return values

    return read


def by_netcdf4(variable: str, flags: str | None = None) -> Peer:
    """A variable as the netCDF library unpacks it, with the flags that say which cells are good."""

    def read(file: RemoteFile) -> Values:
        import netCDF4

        with netCDF4.Dataset(file.url) as dataset:
            values = np.ma.filled(dataset[variable][...].astype(np.float32), np.nan)
            if flags is not None:
                values[np.ma.filled(dataset[flags][...], 255) != 0] = np.nan
            return values

    return read


def by_xarray(name: str, **labels: object) -> Peer:
    """One time of a variable, as xarray decodes it."""

    def read(file: RemoteFile) -> Values:
        import xarray

        is_store = file.url.endswith(".zarr")
        opened = xarray.open_zarr(file.url) if is_store else xarray.open_dataset(file.url, engine="netcdf4")
        assert file.valid_time is not None
        with opened:
            time = np.datetime64(file.valid_time.replace(tzinfo=None))
            return opened[name].sel(labels).sel(time=time, method="nearest").values.squeeze()

    return read


def radolan_by_wradlib(file: RemoteFile) -> Values:
    """A RADOLAN composite, zipped as it is."""
    from wradlib.io import read_radolan_composite

    return read_radolan_composite(file.url)[0]


def radvor_by_wradlib(file: RemoteFile) -> Values:
    """The analysis in a RADVOR run."""
    from wradlib.io import read_radolan_composite

    with tarfile.open(file.url) as archive:
        for member in archive:
            if member.name.endswith("_000"):
                return read_radolan_composite(BytesIO(archive.extractfile(member).read()))[0]  # type: ignore[union-attr]
    raise ValueError(f"{file.url}: no analysis in it")


def ascii_by_numpy(file: RemoteFile) -> Values:
    """One hour out of a day's archive of ascii grids."""
    with tarfile.open(file.url) as archive:
        wanted = archive.extractfile(f"RW_{file.valid_time:%Y%m%d-%H%M}.asc")
        assert wanted is not None
        values = np.loadtxt(wanted, skiprows=6)
    values[values < 0] = np.nan
    return values


def meteonet_by_numpy(file: RemoteFile) -> Values:
    """One time out of an archive, trusted to be unpickled."""
    with np.load(file.url, allow_pickle=True) as archive:
        assert file.valid_time is not None
        place = list(archive["dates"]).index(file.valid_time.replace(tzinfo=None))
        values = archive["data"][place].astype(np.float32)
    values[values < 0] = np.nan
    return values


def etopo_by_numpy(file: RemoteFile) -> Values:
    """The three lists of numbers."""
    folder = Path(file.url)
    folder = folder if folder.is_dir() else folder.parent
    return [np.loadtxt(gzip.open(path)) for path in sorted(folder.glob("etopo20*.gz"))]


def srtm_by_gdal(file: RemoteFile) -> Values:
    """All tiles of the folder, which are one field."""
    import rasterio

    folder = Path(file.url)
    tiles = []
    for path in sorted((folder if folder.is_dir() else folder.parent).glob("*.hgt.zip")):
        (name,) = zipfile.ZipFile(path).namelist()
        with rasterio.open(f"/vsizip/{path}/{name}", driver="SRTMHGT") as tile:
            tiles.append(tile.read(1, masked=True))
    return np.block([[tiles[3], tiles[2]], [tiles[1], tiles[0]]])


def picture_by_gdal_and_scipy(file: RemoteFile) -> Values:
    """A picture of the X-band radar, its grey as rain rates, turned north."""
    import rasterio
    from scipy import ndimage

    with rasterio.open(file.url, driver="PNG") as picture:
        grey, alpha = (ndimage.rotate(band, 54, reshape=False, order=0) for band in picture.read())
    rates = (10 ** ((0.39216 * np.arange(256) - 8.6) / 10) / 100) ** (1 / 1.5)
    return np.where(alpha == 255, rates[grey], np.nan)


def grib1_by_eccodes(parameter: int) -> Peer:
    """The field of a parameter among the messages of a GRIB file."""

    def read(file: RemoteFile) -> Values:
        import eccodes

        with Path(file.url).open("rb") as opened:
            while (message := eccodes.codes_grib_new_from_file(opened)) is not None:
                try:
                    if eccodes.codes_get(message, "indicatorOfParameter") == parameter:
                        return eccodes.codes_get_values(message)
                finally:
                    eccodes.codes_release(message)
        raise ValueError(f"{file.url}: no parameter {parameter} in it")

    return read


GRIB2, ZIPPED_GRIB2 = by_gdal("GRIB", least=0), by_gdal("GRIB", "/vsigzip/", least=0)
ZIPPED_DBZ = by_gdal("GRIB", "/vsigzip/", least=-900)
RATE, SUM, ECHO = (by_pysteps("import_odim_hdf5", qty=quantity) for quantity in ("RATE", "ACRR", "DBZH"))
BOM = by_pysteps("import_bom_rf3")

CONTESTS = (
    Contest("mrms", "mrms", "GDAL", GRIB2),
    Contest("mrms", "mrms_other", "GDAL", ZIPPED_GRIB2, {"product": "PrecipFlag"}),
    Contest("mrms", "mrms_other", "GDAL", ZIPPED_DBZ, {"product": "ReflectivityAtLowestAltitude"}),
    Contest("opera_odyssey", "opera", "pysteps", RATE),
    Contest("opera_nimbus", "opera", "pysteps", RATE),
    Contest("opera_nimbus_hourly", "opera", "pysteps", SUM),
    Contest("opera_cirrus", "opera", "pysteps", ECHO),
    Contest("knmi", "knmi", "pysteps", by_pysteps("import_knmi_hdf5")),
    Contest("knmi_mfbs", "knmi_mfbs", "netCDF4", by_netcdf4("image1_image_data")),
    Contest("fmi", "fmi/pgm", "pysteps", by_pysteps("import_fmi_pgm", gzipped=True)),
    Contest("fmi_geotiff", "fmi/geotiff", "GDAL", by_gdal("GTiff", scale=0.5, offset=-32, most=254)),
    Contest("mch", "mch", "pysteps", by_pysteps("import_mch_gif", product="AQC", unit="mm", accutime=5)),
    Contest("bom_c10", "bom", "pysteps", BOM),
    Contest("bom_cscn", "bom", "pysteps", BOM),
    Contest("nwcsaf", "saf", "pysteps", by_pysteps("import_saf_crri")),
    Contest("nwcsaf_cloud_type", "saf", "netCDF4", by_netcdf4("CT")),
    *(
        Contest("dwd", "dwd", "wradlib", radolan_by_wradlib, {"product": product})
        for product in ("RY", "RX", "RZ", "RW", "SF")
    ),
    Contest("dwd_rv", "dwd/radvor_rv", "wradlib", radvor_by_wradlib),
    Contest("dwd_rw_ascii", "dwd/radolan_asc", "numpy", ascii_by_numpy),
    Contest("meteonet", "meteonet", "numpy", meteonet_by_numpy),
    Contest("meteonet_reflectivity", "meteonet", "numpy", meteonet_by_numpy),
    Contest("meteonet_cloud_type", "meteonet", "xarray", by_xarray("CT")),
    Contest("smhi_openmrg", "smhi_openmrg", "xarray", by_xarray("rainfall_amount")),
    Contest("smhi_openmrg_rate", "smhi_openmrg", "xarray", by_xarray("R")),
    Contest("openrainer", "openrainer", "xarray", by_xarray("rainfall_amount")),
    Contest("seviri", "seviri", "xarray", by_xarray("data", variable="IR_016")),
    Contest("goes_rrqpe", "goes/abi", "netCDF4", by_netcdf4("RRQPE", "DQF")),
    Contest("goes", "goes/abi", "netCDF4", by_netcdf4("CMI", "DQF")),
    Contest("goes_l1b", "goes/abi", "netCDF4", by_netcdf4("Rad", "DQF")),
    Contest("glm", "goes/glm_gridded_conus", "netCDF4", by_netcdf4("flash_extent_density")),
    Contest("xband", "xband_cagliari", "GDAL, scipy", picture_by_gdal_and_scipy),
    Contest("etopo", "dem/etopo20", "numpy", etopo_by_numpy),
    Contest("srtm", "dem/srtm3_azores", "GDAL", srtm_by_gdal),
    Contest("gtopo", "dem/gtopo_bonn", "GDAL", by_gdal("GTiff", least=-9998)),
    Contest("arome_relief", "meteonet/masks", "eccodes", grib1_by_eccodes(8)),
    Contest("arome_land", "meteonet/masks", "eccodes", grib1_by_eccodes(81)),
)


def source_and_files(number: int, data: Path, count: int) -> tuple[Source, list[RemoteFile]]:
    """The source of a contest, and so many of its frames, spread over all of them."""
    contest = CONTESTS[number]
    source = source_of(contest.config, data / contest.folder, **(contest.settings or {}))
    files = list(source.files(None, None))
    step = max(1, len(files) // count)
    return source, files[::step][:count]


def timed(number: int, data: Path, count: int, rounds: int) -> tuple[int, int, list[float]]:
    """How many frames of how many cells; CPU seconds of ours, of theirs, and of ours confined (medians)."""
    source, files = source_and_files(number, data, count)
    with Decoder(source, FOREVER) as decoder:
        arms: list[Callable[[RemoteFile], object]] = [source.read, CONTESTS[number].peer, decoder.decode]
        cells = source.read(files[0]).values.size
        check_size(CONTESTS[number], cells, CONTESTS[number].peer(files[0]))
        taken: list[list[float]] = [[] for _ in arms]
        for turn in range(rounds + 1):
            for file in files:
                for arm, seconds in zip(arms, taken, strict=True):
                    others, own = spent_by_others(), time.process_time()
                    arm(file)
                    own = time.process_time() - own  # asking for the others' time takes some itself
                    if turn:
                        seconds.append(own + spent_by_others() - others)
    return len(files), cells, [statistics.median(seconds) for seconds in taken]


def check_size(contest: Contest, cells: int, theirs: Values) -> None:
    """Refuses a peer that reads a field of another size, but for a line that the earth has twice.

    Raises:
        ValueError: naming both sizes.
    """
    sizes = [np.size(part) for part in theirs] if isinstance(theirs, list) else [np.size(theirs)]
    if not any(abs(size / cells - 1) < 0.01 for size in sizes):
        raise ValueError(f"{contest.name}: ours has {cells} cells, {contest.against} reads {sizes}")


def spent_by_others() -> float:
    """CPU seconds of all processes that this one started, those that ended too."""
    seconds = 0.0
    for process in psutil.Process().children(recursive=True):
        seconds += time.clock_gettime(~process.pid << 3 | PROCESS_CLOCK)  # clock_getcpuclockid(3)
        ended = process.cpu_times()
        seconds += ended.children_user + ended.children_system
    return seconds


def peak(number: int, data: Path, ours: bool) -> float:
    """MiB that reading one frame adds to the resident memory at its peak."""
    source, files = source_and_files(number, data, 2)
    read: Callable[[RemoteFile], object] = source.read if ours else CONTESTS[number].peer
    for file in files:
        read(file)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc_pid_clear_refs(5))
    before = resident("VmRSS")
    held = read(files[0])
    after = resident("VmHWM")
    del held
    return (after - before) / 1024


def resident(what: str) -> int:
    """KiB, of what the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def apart(work: Callable[..., Answer], *arguments: object, **environment: str) -> Answer:
    """What a function returns in a fresh process with one thread."""
    with (
        patch.dict(os.environ, {**ONE_THREAD, **QUIET, **environment}),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
    ):
        return process.submit(work, *arguments).result()


def raced(number: int, data: Path, frames: int, rounds: int) -> Outcome:
    """A contest, in three processes one after the other."""
    count, cells, seconds = apart(timed, number, data, frames, rounds)
    peaks = [apart(peak, number, data, ours, **GIVES_BACK) for ours in (True, False)]
    ours, theirs, confined = seconds
    return Outcome(CONTESTS[number], count, cells, ours, theirs, confined, *peaks)


def summary(outcomes: list[Outcome]) -> str:
    """How many reach the aim, and which do not."""
    fast = [outcome for outcome in outcomes if outcome.theirs >= 2 * outcome.ours]
    small = [outcome for outcome in outcomes if outcome.our_peak <= outcome.their_peak]
    slower = [outcome.contest.name for outcome in outcomes if outcome.theirs < outcome.ours]
    larger = [outcome.contest.name for outcome in outcomes if outcome not in small]
    return (
        f"{len(fast)} of {len(outcomes)} at least twice as fast, {len(small)} with less memory.\n"
        f"Slower: {', '.join(slower) or 'none'}.\nMore memory: {', '.join(larger) or 'none'}."
    )


def main() -> int:
    """Prints the table line by line; 0 also where there are no real files to read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sources", description=__doc__)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="of configs/source/; none: all")
    parser.add_argument("--frames", type=int, default=6, help="of each source, spread over its files")
    parser.add_argument("--rounds", type=int, default=5, help="how often each of them is read")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    asked = parser.parse_args()
    known = sorted({contest.config for contest in CONTESTS})
    if unknown := set(asked.configs) - set(known):
        parser.error(f"{' '.join(sorted(unknown))}: none of {', '.join(known)}")
    if not asked.data.is_dir():
        print(f"skipped: no real files at {asked.data}; give their folder with --data")
        return 0
    chosen = [
        number
        for number, contest in enumerate(CONTESTS)
        if not asked.configs or contest.config in asked.configs
    ]
    begin = time.monotonic()
    for line in (HEADS, ("---",) * len(HEADS)):
        print("| " + " | ".join(line) + " |", flush=True)
    outcomes = []
    for number in chosen:
        outcomes.append(raced(number, asked.data, asked.frames, asked.rounds))
        print("| " + " | ".join(outcomes[-1].cells_of_table()) + " |", flush=True)
    print(f"\n{summary(outcomes)}\n{time.monotonic() - begin:.0f} s, load {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
