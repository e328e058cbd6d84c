"""What `quality` tells of a frame: planted faults are found, real rain is left alone, and nothing is changed."""

import gzip
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipelines.cf import BRIGHTNESS_TEMPERATURE, RAINFALL_RATE, REFLECTIVITY, Variable
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.quality import (
    CellFlag,
    FrameFlag,
    Statistics,
    cell_flags,
    flag_attributes,
    frame_flags,
    statistics,
)
from pipelines.sources.mrms import Mrms
from pipelines.sources.source import RemoteFile

Field = NDArray[np.float32]


def frame(values: Field, variable: Variable = RAINFALL_RATE) -> Frame:
    grid = Grid("EPSG:3035", 4e6, 1000.0, values.shape[1], 3e6, -1000.0, values.shape[0])
    time = datetime(2020, 6, 1, tzinfo=UTC)
    return Frame(variable, time, timedelta(minutes=5), grid, values, "test", "00" * 31 + "01")


def flagged(values: Field, flag: CellFlag, variable: Variable = RAINFALL_RATE) -> set[tuple[int, int]]:
    found = np.argwhere(cell_flags(frame(values, variable)) & np.uint8(flag))
    return {(int(y), int(x)) for y, x in found}


def showers(seed: int = 0, shape: tuple[int, int] = (200, 240)) -> Field:
    """Smooth rain (mm/h) in patches, up to 120 mm/h, with dry land between."""
    noise = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 8.0)
    return np.clip(np.exp(smooth / smooth.std() * 1.6) - 2, 0, 120).astype(np.float32)


def test_smooth_rain_holds_no_spike_and_no_beam_and_hardly_a_speckle():
    for seed in range(5):
        rain = showers(seed)
        assert rain.max() > 40
        assert flagged(rain, CellFlag.SPIKE) == flagged(rain, CellFlag.SPOKE) == set()
        assert len(flagged(rain, CellFlag.SPECKLE)) < 1e-3 * (rain >= 0.1).sum()


def test_a_lone_spike_is_found_in_rain_and_in_the_dry_and_at_the_border():
    rain = np.zeros((60, 70), np.float32)
    rain[20:50, 20:60] = 3.0
    for place in ((35, 40), (5, 5), (0, 0), (59, 30)):
        spiked = rain.copy()
        spiked[place] = 1205.0
        assert flagged(spiked, CellFlag.SPIKE) == {place}


def test_three_neighbouring_cells_far_above_the_rest_are_spikes():
    rain = np.full((40, 40), 2.0, np.float32)
    rain[20, 20:23] = 180.0
    assert flagged(rain, CellFlag.SPIKE) == {(20, 20), (20, 21), (20, 22)}


def test_the_core_of_a_storm_is_no_spike():
    y, x = np.mgrid[:60, :60]
    core = 140 * np.exp(-((y - 30) ** 2 + (x - 30) ** 2) / (2 * 1.5**2))
    assert flagged(core.astype(np.float32), CellFlag.SPIKE) == set()


def test_rain_beyond_what_is_possible_is_a_spike_however_wide():
    rain = np.full((40, 40), 2.0, np.float32)
    rain[10:30, 10:30] = 400.0
    assert flagged(rain, CellFlag.SPIKE) == {(y, x) for y in range(10, 30) for x in range(10, 30)}


def test_one_to_three_cells_with_nothing_around_are_speckle_and_four_are_not():
    for cells, expected in ((1, 1), (3, 3), (4, 0)):
        rain = np.zeros((50, 50), np.float32)
        rain[25, 20 : 20 + cells] = 1.0
        assert len(flagged(rain, CellFlag.SPECKLE)) == expected


def test_a_wet_cell_close_to_other_rain_is_no_speckle():
    rain = np.zeros((50, 50), np.float32)
    rain[10:20, 10:20] = 1.0
    rain[15, 24] = 1.0  # 5 cells from it
    rain[40, 40] = 1.0
    assert flagged(rain, CellFlag.SPECKLE) == {(40, 40)}


def test_a_wet_cell_at_the_edge_of_what_is_seen_is_not_judged():
    rain = np.zeros((50, 50), np.float32)
    rain[:, :26] = np.nan
    rain[25, 26] = 1.0
    rain[25, 40] = 1.0
    assert flagged(rain, CellFlag.SPECKLE) == {(25, 40)}


@pytest.mark.parametrize("angle", range(0, 180, 15))
def test_a_beam_in_any_direction_is_found(angle):
    rain = np.zeros((160, 160), np.float32)
    along = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    ends = [tuple(np.rint(80 + sign * 35 * along).astype(int).tolist()) for sign in (-1, 1)]
    cv2.line(rain, *ends, color=0.7, thickness=2)
    assert flagged(rain, CellFlag.SPOKE) == {(int(y), int(x)) for y, x in np.argwhere(rain)}


def test_short_wide_and_bent_bands_are_no_beams():
    short, wide, bent = (np.zeros((120, 120), np.float32) for _ in range(3))
    cv2.line(short, (30, 60), (52, 60), color=1.0, thickness=2)
    cv2.line(wide, (20, 60), (100, 60), color=1.0, thickness=9)
    cv2.ellipse(bent, (60, 60), (30, 30), 0, 0, 120, color=1.0, thickness=2)
    for rain in (short, wide, bent):
        assert rain.any()
        assert flagged(rain, CellFlag.SPOKE) == set()


def test_reflectivity_is_judged_as_the_rain_it_stands_for():
    echo = np.full((60, 60), -32.0, np.float32)
    echo[10:30, 10:30] = 30.0
    echo[20, 20] = 62.0
    echo[45, 45] = 15.0
    found = cell_flags(frame(echo, REFLECTIVITY))
    assert {tuple(place) for place in np.argwhere(found).tolist()} == {(20, 20), (45, 45)}
    assert found[20, 20] == CellFlag.SPIKE
    assert found[45, 45] == CellFlag.SPECKLE


def test_other_quantities_have_no_cell_flags():
    warm = np.full((40, 40), 280.0, np.float32)
    warm[20, 20] = 440.0
    assert not cell_flags(frame(warm, BRIGHTNESS_TEMPERATURE)).any()


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_flags_lie_on_wet_observed_cells_only_and_the_values_stay(seed):
    rng = np.random.default_rng(seed)
    rain = showers(seed, (80, 90))
    spoilt = rng.random(rain.shape)
    rain[spoilt < 0.02] = rng.choice([0.0, 5.0, 900.0, 1205.0], (spoilt < 0.02).sum())
    rain[rng.random(rain.shape) < rng.random() * 0.5] = np.nan
    before = rain.copy()
    found = cell_flags(frame(rain))
    assert (rain[found > 0] >= 0.1).all()
    assert (found[rain > 300] & CellFlag.SPIKE).all()
    np.testing.assert_array_equal(rain, before)
    np.testing.assert_array_equal(found, cell_flags(frame(before)))


def test_nothing_observed_has_no_cell_flags():
    assert not cell_flags(frame(np.full((30, 30), np.nan, np.float32))).any()
    assert not cell_flags(frame(np.full((1, 1), 0.0, np.float32))).any()


def test_the_statistics_are_of_the_observed_cells():
    rain = np.array([[np.nan, 0.0, 0.05, 0.1], [2.0, 0.0, np.nan, 7.5]], np.float32)
    told = statistics(frame(rain))
    assert (told.observed_share, told.wet_share) == (0.75, 0.5)
    assert (told.minimum, told.maximum) == (0.0, 7.5)


def test_equal_values_have_one_fingerprint_and_any_change_another():
    rain = showers()
    rain[3:9, 3:9] = np.nan
    rain[50, 50] = 0.0
    same = rain.copy()
    same[50, 50] = -0.0
    same.view(np.uint32)[4, 4] ^= 1  # another NaN
    assert np.isnan(same[4, 4])
    assert statistics(frame(same)).fingerprint == statistics(frame(rain)).fingerprint
    for y, x, value in ((50, 50, np.nan), (50, 50, 1e-3), (4, 4, 0.0)):
        other = rain.copy()
        other[y, x] = value
        assert statistics(frame(other)).fingerprint != statistics(frame(rain)).fingerprint


def test_a_fingerprint_is_the_same_in_every_process_and_fits_64_bits():
    told = statistics(frame(np.array([[1.0, np.nan]], np.float32)))
    assert told.fingerprint == int.from_bytes(bytes.fromhex("c5a9838fc5dcd30b"), "little", signed=True)


def flags_of(fields: list[Field | None], variable: Variable = RAINFALL_RATE) -> list[FrameFlag]:
    """Of successive frames; None: there is no frame."""
    none = Statistics(np.nan, np.nan, np.nan, np.nan, 0)
    told = [none if field is None else statistics(frame(field, variable)) for field in fields]
    shares = [
        np.array([getattr(one, name) for one in told])
        for name in ("observed_share", "wet_share", "minimum", "maximum")
    ]
    flags = frame_flags(*shares, np.array([one.fingerprint for one in told], np.int64))
    return [FrameFlag(int(flag)) for flag in flags]


NOTHING = FrameFlag(0)
DRY = np.zeros((20, 30), np.float32)


def test_changing_rain_and_dry_frames_have_no_frame_flags():
    rain = [showers(seed) for seed in range(3)]
    assert flags_of([*rain, np.zeros_like(rain[0]), np.zeros_like(rain[0]), rain[0]]) == [NOTHING] * 6


def test_the_same_rain_again_is_frozen_even_after_a_gap_and_the_same_dry_field_is_not():
    rain = showers()
    assert flags_of([rain, rain, None, rain, showers(1), rain]) == [
        NOTHING,
        FrameFlag.FROZEN,
        NOTHING,
        FrameFlag.FROZEN,
        NOTHING,
        NOTHING,
    ]
    assert flags_of([DRY, DRY, DRY]) == [NOTHING] * 3


def test_one_value_everywhere_is_told_unless_it_is_that_of_dry():
    some = np.where(np.arange(600).reshape(20, 30) % 2, np.nan, 5.1).astype(np.float32)
    assert flags_of([some]) == [FrameFlag.ALL_EQUAL]
    assert flags_of([DRY + 0.05]) == [FrameFlag.ALL_EQUAL]
    assert flags_of([DRY]) == [NOTHING]
    assert flags_of([DRY - 32], REFLECTIVITY) == [NOTHING]
    assert flags_of([DRY + 280], BRIGHTNESS_TEMPERATURE) == [FrameFlag.ALL_EQUAL]


def test_a_frame_of_nothing_is_empty_and_a_change_of_coverage():
    nothing = np.full_like(DRY, np.nan)
    assert flags_of([nothing, nothing]) == [FrameFlag.EMPTY] * 2
    assert flags_of([DRY, nothing, DRY]) == [
        NOTHING,
        FrameFlag.EMPTY | FrameFlag.COVERAGE_CHANGE,
        FrameFlag.COVERAGE_CHANGE,
    ]


def test_a_radar_that_drops_out_and_comes_back_changes_the_coverage_twice():
    less = DRY.copy()
    less[:, :1] = np.nan  # a thirtieth
    slightly = DRY.copy()
    slightly[0, 0] = np.nan
    assert flags_of([DRY, slightly, less, less, DRY]) == [
        NOTHING,
        NOTHING,
        FrameFlag.COVERAGE_CHANGE,
        NOTHING,
        FrameFlag.COVERAGE_CHANGE,
    ]


def test_an_empty_time_axis_has_no_flags():
    assert frame_flags(*np.empty((4, 0)), np.empty(0, np.int64)).shape == (0,)


def test_the_attributes_say_each_bit_as_cf_wants_it():
    told = flag_attributes(CellFlag)
    assert told["flag_masks"] == [1, 2, 4]
    assert told["flag_meanings"] == "spike speckle spoke"
    assert flag_attributes(FrameFlag)["flag_meanings"] == "empty all_equal frozen coverage_change"


def odyssey(data: Path, time: str) -> Field:
    with h5py.File(data / f"opera/odyssey_20180824/T_PAAH21_C_EUOC_20180824{time}00.hdf") as file:
        raw = file["dataset1/data1/data"][:]
    rain = raw.astype(np.float32)
    rain[raw == -8888000] = 0
    rain[raw == -9999000] = np.nan
    return rain


@pytest.mark.data
def test_the_spike_and_the_beam_of_a_real_composite_are_found_and_little_else(data):
    rain = odyssey(data, "1800")
    found = cell_flags(frame(rain))
    assert rain[407, 391] == pytest.approx(1205, abs=1)
    assert found[407, 391] & CellFlag.SPIKE
    spokes = np.argwhere(found & CellFlag.SPOKE)
    assert 100 < len(spokes) < 200  # of an interference seen with the eye from (1420, 1190) to (1462, 1222)
    assert (np.abs(spokes - [1441, 1205]) <= 25).all()
    wet = (rain >= 0.1).sum()
    shares = [((found & flag) > 0).sum() / wet for flag in CellFlag]
    assert shares < [1.5e-4, 2e-3, 1e-3]
    assert (found[np.isnan(rain)] == 0).all()


@pytest.mark.data
def test_half_of_what_a_dry_day_shows_is_flagged_as_speckle(data):
    path = next((data / "dwd/ry_20200101").glob("*1500-*"))
    message = gzip.decompress(path.read_bytes())
    counts = np.frombuffer(message[message.index(b"\x03") + 1 :], "<u2").reshape(900, 900)[::-1]
    rain = (counts & 0x0FFF).astype(np.float32) * np.float32(0.12)
    rain[counts & 0x2000 > 0] = np.nan
    found = cell_flags(frame(rain))
    assert ((found & CellFlag.SPECKLE) > 0).sum() > 0.2 * (rain >= 0.1).sum()


@pytest.mark.data
def test_real_rain_is_left_alone(data):
    path = next((data / "mrms/2019/06/10").glob("*-002200.grib2"))
    whole = Mrms().read(RemoteFile(str(path), None))
    rain = whole.window(1800, 3800, 1000, 1200).values  # thunderstorms, up to 150 mm/h
    found = cell_flags(frame(rain))
    wet = (rain >= 0.1).sum()
    assert rain[rain > 0].max() > 100
    assert wet > 100_000
    assert ((found & CellFlag.SPIKE) > 0).sum() / wet < 1e-4
    assert ((found & CellFlag.SPECKLE) > 0).sum() / wet < 1e-3
    assert ((found & CellFlag.SPOKE) > 0).sum() / wet < 1e-3


@pytest.mark.data
def test_a_swiss_radar_that_was_away_for_one_step_is_told(data):
    paths = sorted((data / "mch/20150515").glob("*.gif"))
    shares = np.array([(np.asarray(Image.open(BytesIO(path.read_bytes()))) != 255).mean() for path in paths])
    none = np.zeros(shares.size)
    flags = frame_flags(shares, none, none, none, np.arange(shares.size))
    changes = np.flatnonzero(flags == FrameFlag.COVERAGE_CHANGE)
    assert changes.tolist() == [1, 2]
    assert np.count_nonzero(flags) == changes.size
