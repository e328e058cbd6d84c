"""Rainfields files: real ones as pysteps reads them, written ones to the last number, damaged ones refused."""

import shutil
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import netCDF4
import numpy as np
import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pyproj import Geod, Proj

import cli
from pipelines.grid import Grid
from pipelines.sources.bom import Bom
from pipelines.sources.source import RemoteFile

C10 = "+proj=aea +lat_1=-26.2 +lat_2=-29.3 +lat_0=-27.7178 +lon_0=153.24 +ellps=GRS80 +units=m"
GRID = Grid(C10, -152000.0, 8000.0, 39, 152000.0, -8000.0, 39)
NAME = "66_20201031_001000.prcp-c10.nc"
END = datetime(2020, 10, 31, 0, 10, tzinfo=UTC)


def source(name: str, path: Path | None = None) -> Bom:
    config = OmegaConf.load(cli.CONFIGS / "source" / f"{name}.yaml")
    config.path = str(path) if path else None
    return instantiate(config)


def write(path: Path, counts: np.ndarray, *, cscn: bool = False, **changes) -> Path:
    """A file as Rainfields writes it: c10 with bounds and the radar's zone, cscn with the cells' corners."""
    told = {
        "station": 66,
        "seconds": 600,
        "end": END,
        "time_units": "seconds since 1970-01-01 00:00:00 UTC",
        "units": "kg m-2",
        "scale": 0.05,
        "offset": 0.0,
        "fill": -1,
        "parallels": [-26.2, -29.3],
        "shift": 0.0,  # km
    } | changes
    size = counts.shape[0]
    with netCDF4.Dataset(path, "w") as file:
        file.station_id = np.int32(told["station"])
        for name in ("y", "x"):
            file.createDimension(name, size)
        file.createDimension("n2", 2)
        for name, seconds in (("start_time", told["seconds"]), ("valid_time", 0)):
            time = file.createVariable(name, "i8")
            time.units = told["time_units"]
            time[...] = int(told["end"].timestamp()) - seconds
        half = 4.0  # km
        for name, centres in (("x", np.arange(size) * 8.0 - 152), ("y", 152 - np.arange(size) * 8.0)):
            centres = centres + told["shift"]
            side = -half if name == "x" else half
            line = file.createVariable(name, "f8", (name,))
            line.units = "km"
            line[:] = centres + side if cscn else centres
            if not cscn:
                bounds = file.createVariable(f"{name}_bounds", "f8", (name, "n2"))
                bounds[:] = np.stack([centres + side, centres - side], axis=1)
        rain = file.createVariable("precipitation", "i2", ("y", "x"), zlib=True, fill_value=told["fill"])
        rain.set_auto_maskandscale(False)
        rain.setncatts({"units": told["units"], "scale_factor": told["scale"], "add_offset": told["offset"]})
        rain[:] = counts
        crs = file.createVariable("proj", "i1")
        crs.setncatts(
            {
                "grid_mapping_name": "albers_conical_equal_area",
                "standard_parallel": told["parallels"],
                "longitude_of_central_meridian": 153.24,
                "latitude_of_projection_origin": -27.7178,
                "false_easting": 0.0,
                "false_northing": 0.0,
                "semi_major_axis": 6378137.0,
                "semi_minor_axis": 6356752.31414,
            }
        )
    return path


def read(path: Path, **settings) -> np.ndarray:
    return Bom(**({"grid": GRID, "station": 66} | settings)).read(RemoteFile(str(path), None)).values


def counts_of(value: int = 0) -> np.ndarray:
    return np.full(GRID.shape, value, np.int16)


def as_pysteps(path: Path) -> np.ndarray:
    """The rate (mm/h) by pysteps, with a disc of 147 km cut out by hand."""
    from pysteps.io.importers import import_bom_rf3

    amount, _, _ = import_bom_rf3(str(path))
    with netCDF4.Dataset(path) as file:
        hours = (int(file["valid_time"][:]) - int(file["start_time"][:])) / 3600
    rows, columns = np.mgrid[:512, :512]
    amount[np.hypot(rows - 255.5, columns - 255.5) * 0.5 > 147] = np.nan
    return amount / hours


@pytest.mark.data
@pytest.mark.parametrize("name", ["bom_c10", "bom_cscn"])
@pytest.mark.parametrize("step", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_real_files_read_as_pysteps_reads_them_within_the_radars_reach(name, step, data):
    bom = source(name, data / "bom")
    files = list(bom.files(None, None))
    negative = 0
    for file in files[::step]:
        frame, reference = bom.read(file), as_pysteps(Path(file.url))
        negative += int((reference < 0).sum())
        reference[reference < 0] = np.nan  # a single count of -2, which pysteps takes for -0.6 mm/h
        assert frame.valid_time == file.valid_time
        assert np.array_equal(np.isnan(frame.values), np.isnan(reference))
        assert np.nanmax(np.abs(frame.values - reference)) < 1e-5
    if step == 1:
        assert negative == (1 if name == "bom_c10" else 0)


@pytest.mark.data
def test_the_real_folders_have_a_frame_every_ten_and_every_six_minutes(data):
    for name, count, minutes in (("bom_c10", 47, 10), ("bom_cscn", 31, 6)):
        bom = source(name, data / "bom")
        times = [file.valid_time for file in bom.files(None, None)]
        assert len(times) == count
        assert {(late - soon).total_seconds() / 60 for soon, late in pairwise(times)} == {minutes}
        assert bom.cadence == minutes


@pytest.mark.parametrize(
    ("name", "projection", "corners"),
    [
        ("bom_c10", C10, [(151.958, -26.559), (154.550, -28.864)]),
        (
            "bom_cscn",
            "+proj=aea +lat_1=-18 +lat_2=-36 +lat_0=-37.852 +lon_0=144.752 +a=6378137 +rf=298.257222101",
            None,
        ),
    ],
)
def test_the_corners_are_where_the_projection_puts_them_to_a_metre(name, projection, corners):
    grid = source(name).grid
    lon, lat = grid.lonlat()
    places = Proj(projection)([-127750, 127750], [127750, -127750], inverse=True)
    _, _, metres = Geod(ellps="GRS80").inv([lon[0, 0], lon[-1, -1]], [lat[0, 0], lat[-1, -1]], *places)
    assert np.max(metres) < 1
    if corners is not None:  # the first and the last cell of c10, to a thousandth of a degree
        assert np.allclose([(lon[0, 0], lat[0, 0]), (lon[-1, -1], lat[-1, -1])], corners, atol=6e-4)


def test_zero_is_dry_near_the_radar_and_unknown_beyond_its_reach(tmp_path):
    rate = read(write(tmp_path / NAME, counts_of(0)))
    distance = np.hypot(*np.meshgrid(GRID.x, GRID.y)) / 1000
    assert np.array_equal(np.isnan(rate), distance > 147)
    assert (rate[distance <= 147] == 0).all()
    assert np.array_equal(np.isnan(read(tmp_path / NAME, reach=100.0)), distance > 100)


def test_a_count_is_three_tenths_of_a_millimetre_an_hour_of_c10_and_five_of_cscn(tmp_path):
    counts = counts_of()
    counts[19, 10:13] = 1, 2, 1000
    rate = read(write(tmp_path / NAME, counts))
    assert rate.dtype == np.float32
    assert rate[19, 10:13] == pytest.approx([0.3, 0.6, 300])
    other = write(tmp_path / "cscn.nc", counts, cscn=True, seconds=360, fill=-32768)
    assert read(other, cadence=6.0)[19, 10:13] == pytest.approx([0.5, 1.0, 500])


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), code=st.sampled_from([-1, -2]))
def test_what_is_masked_and_nothing_else_is_not_observed(seed, code, tmp_path_factory):
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 300, GRID.shape).astype(np.int16)
    masked = generator.random(GRID.shape) < generator.random()
    path = write(tmp_path_factory.mktemp("bom") / NAME, np.where(masked, code, counts).astype(np.int16))
    rate = read(path, reach=1000.0)
    assert np.array_equal(np.isnan(rate), masked)
    assert np.allclose(rate[~masked], counts[~masked] * 0.3)


def test_cscn_numbers_its_cells_by_their_corners(tmp_path):
    path = write(tmp_path / NAME, counts_of(), cscn=True)
    assert read(path).shape == GRID.shape
    moved = Grid(C10, -156000.0, 8000.0, 39, 156000.0, -8000.0, 39)
    with pytest.raises(ValueError, match="not the registered one"):
        read(path, grid=moved)


REFUSALS = {
    "another radar": ({"station": 2}, "radar 2, expected 66"),
    "a longer sum": ({"seconds": 3600}, "sums over 3600 s, expected 600 s"),
    "no sum": ({"seconds": 0}, "sums over 0 s"),
    "another clock": ({"time_units": "hours since 1970-01-01"}, "counted in 'hours"),
    "another unit": ({"units": "m"}, "expected 0.05 kg m-2"),
    "another scale": ({"scale": 0.5}, "counts 0.5"),
    "an offset": ({"offset": 1.0}, "from 1"),
    "a fill that is rain": ({"fill": 7}, "expected a number below 0"),
    "another map": ({"parallels": [-18.0, -36.0]}, "not the registered one"),
    "another place": ({"shift": 0.25}, "not the registered one"),
    "negative rain": ({}, "below 0, such as -7"),
}


@pytest.mark.parametrize("change", REFUSALS)
def test_what_is_not_this_product_is_refused_with_its_name_and_a_reason(change, tmp_path):
    changes, reason = REFUSALS[change]
    counts = counts_of()
    counts[5, 5] = -7 if change == "negative rain" else 0
    path = write(tmp_path / NAME, counts, **changes)
    with pytest.raises(ValueError, match=rf"^{NAME}: .*{reason}"):
        read(path)


def test_another_size_is_refused_before_it_is_read(tmp_path):
    path = write(tmp_path / NAME, np.zeros((40, 40), np.int16))
    with pytest.raises(ValueError, match=r"\(40, 40\) cells, expected \(39, 39\)"):
        read(path)


def test_a_field_that_was_never_written_is_refused(tmp_path):
    path = write(tmp_path / NAME, counts_of())
    with netCDF4.Dataset(path, "a") as file:
        file.renameVariable("precipitation", "old")
        rain = file.createVariable("precipitation", "i2", ("y", "x"), fill_value=-1, chunksizes=(13, 39))
        rain.setncatts({"units": "kg m-2", "scale_factor": 0.05, "add_offset": 0.0})
        rain[:13] = 0
    with pytest.raises(ValueError, match="precipitation lacks some of its chunks"):
        read(path)


@pytest.mark.data
def test_a_cut_file_is_refused(data, tmp_path):
    whole = next((data / "bom" / "prcp-c10").rglob("*.nc"))
    bom = source("bom_c10")
    for share in (0, 100, 5000, whole.stat().st_size - 10):
        path = tmp_path / whole.name
        path.write_bytes(whole.read_bytes()[:share])
        with pytest.raises(ValueError, match=rf"^{whole.name}: "):
            bom.read(RemoteFile(str(path), None))


def test_names_of_other_radars_and_products_are_passed_over(tmp_path):
    for name in (
        NAME,
        "2_20201031_001000.prcp-c10.nc",
        "66_20201031_001000.prcp-cscn.nc",
        "66_x.prcp-c10.nc",
    ):
        (tmp_path / name).touch()
    bom = Bom(GRID, 66, path=str(tmp_path))
    assert [file.valid_time for file in bom.files(None, None)] == [END]
    shutil.move(tmp_path / NAME, tmp_path / "other")
    with pytest.raises(ValueError, match=r"no files of Rainfields prcp-c10 of radar 66"):
        list(bom.files(None, None))
