"""Every source keeps the contract of `files`: all of configs/source/ on the real folders, and on none."""

from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate

import cli
from pipelines.frame import ALWAYS
from pipelines.sources.source import Source

SOURCES = cli.CONFIGS / "source"
REAL: dict[str, tuple[str, int]] = {  # of each configuration: a folder, and how many frames are in it
    "arome_land": ("meteonet/masks", 1),
    "arome_relief": ("meteonet/masks", 1),
    "bom_c10": ("bom", 47),
    "bom_cscn": ("bom", 31),
    "dwd": ("dwd", 14),
    "dwd_rv": ("dwd", 1),
    "dwd_rw_ascii": ("dwd", 24),
    "etopo": ("dem/etopo20", 1),
    "fmi": ("fmi", 40),
    "fmi_geotiff": ("fmi", 4),
    "glm": ("goes/glm_gridded_conus", 1),
    "glm_lcfa": ("goes", 4),
    "goes": ("goes", 1),
    "goes_l1b": ("goes", 1),
    "goes_rrqpe": ("goes", 1),
    "gtopo": ("dem/gtopo_bonn", 1),
    "knmi": (".", 57),
    "knmi_mfbs": (".", 91),
    "mch": ("mch", 80),
    "meteonet": ("meteonet", 45),
    "meteonet_cloud_type": ("meteonet", 9),
    "meteonet_quality": ("meteonet", 3),
    "meteonet_reflectivity": ("meteonet", 29),
    "mrms": (".", 23),
    "nexrad": ("nexrad_l2", 1),
    "nwcsaf": ("saf", 23),
    "nwcsaf_cloud_type": ("saf", 1),
    "opera_cirrus": ("opera/cirrus_20241126", 1),
    "opera_nimbus": ("opera", 2),
    "opera_nimbus_hourly": ("opera", 2),
    "opera_odyssey": ("opera/odyssey_20180824", 11),
    "openrainer": ("openrainer", 11),
    "seviri": ("seviri", 25),
    "smhi_openmrg": ("smhi_openmrg", 31),
    "smhi_openmrg_rate": ("smhi_openmrg", 145),
    "srtm": ("dem/srtm3_azores", 1),
    "xband": ("xband_cagliari", 60),
}
CHOICES: dict[str, dict[str, Any]] = {"nexrad": {"station": "KLBB"}}  # where a folder holds several
NO_REAL_FILES = {"cf", "from_path", "goes_mcmip", "odim", "simulated"}
OTHER_FILES: list[tuple[str, str, dict[str, Any]]] = [  # of the same configurations with other settings
    *(("dwd", "dwd", {"product": product}) for product in ("RX", "RZ", "RW", "SF")),
    ("arome_relief", "meteonet/masks", {"name": r"SE_masks\.grib"}),  # and another grid, to read it
    ("mrms", ".", {"product": "PrecipFlag"}),
    ("mrms", ".", {"product": "ReflectivityAtLowestAltitude"}),
    ("nexrad", "nexrad_l2", {"station": "KLIX"}),
    ("glm", "goes/glm_gridded_meso", {}),
    ("seviri", "seviri", {"names": r"sat_data_15\.zarr", "select": {"channels": "IR_016"}}),
]
NO_FRAMES = {  # of the real folder
    "FORMATS.md",
    "MANIFEST.md",
    "SHA256SUMS",
    "meteonet/LICENCE.md",
    "seviri/LICENSE",
    "meteonet/radar/radar_coords_NW.npz",  # the grids of the archives beside it, which stand in configs/source/
    "meteonet/radar/radar_coords_SE.npz",
    "xband_cagliari/radarfootprint.tif",  # so does that of the pictures
}


def source(name: str, path: Path, /, **changes: Any) -> Source:
    page = yaml.safe_load((SOURCES / f"{name}.yaml").read_text())
    return instantiate(page | {"path": str(path)} | CHOICES.get(name, {}) | changes, _convert_="all")


def test_every_configuration_is_listed_here():
    assert {path.stem for path in SOURCES.glob("*.yaml")} == set(REAL) | NO_REAL_FILES


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_real_files_are_listed_by_rising_valid_time_and_within_what_is_asked_for(name, data):
    folder, count = REAL[name]
    listed = source(name, data / folder)
    every = list(listed.files(None, None))
    times = [file.valid_time for file in every]
    assert len(every) == count
    assert all(Path(file.url).is_relative_to(data / folder) for file in every)
    if times == [ALWAYS]:
        return
    assert times == sorted(times)
    assert {time.utcoffset() for time in times} == {timedelta(0)}
    first, last = times[count // 3], times[2 * count // 3]
    assert list(listed.files(first, last)) == [file for file in every if first <= file.valid_time <= last]
    after = times[-1].astimezone(UTC) + timedelta(seconds=1)
    assert list(listed.files(after, None)) == []


@pytest.mark.data
def test_some_source_reads_each_real_file(data):
    places = [(name, folder, {}) for name, (folder, _) in REAL.items()] + OTHER_FILES
    read = {
        Path(file.url)
        for name, folder, changes in places
        for file in source(name, data / folder, **changes).files(None, None)
    }
    read |= {data / "dem/etopo20" / f"etopo20{part}.gz" for part in ("data", "lats", "lons")}  # read together
    read |= set((data / "dem/srtm3_azores").glob("*.zip"))
    unread = {
        str(path.relative_to(data))
        for path in data.rglob("*")
        if path.is_file() and not read & {path, *path.parents}
    }
    assert unread == NO_FRAMES


@pytest.mark.parametrize("name", REAL)
def test_no_folder_and_an_empty_one_are_refused_with_their_names(name, tmp_path):
    nowhere = tmp_path / "nowhere"
    for path in (nowhere, tmp_path):
        with pytest.raises(ValueError, match=str(path)):
            list(source(name, path).files(None, None))
