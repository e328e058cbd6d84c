"""A run is what the forecaster said, where something was seen, written once and whole."""

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from types import SimpleNamespace

import netCDF4
import numpy as np
import pytest
import torch
import xarray as xr
from scipy.ndimage import gaussian_filter

from metnet.batch import Batch
from metnet.calibration import Calibration, undone
from metnet.metnet1 import MetNet1
from metnet.model import MetNet
from metnet.rain import BinnedForecast, EnsembleForecast, RainBins
from pipelines import run_blocks
from pipelines.baselines.extrapolation import Extrapolation
from pipelines.baselines.persistence import Persistence
from pipelines.cf import ELEVATION, PRECIPITATION_FLAG, RAINFALL_RATE
from pipelines.cube import Cube
from pipelines.export import export as export_cube
from pipelines.forecast import Forecasted, _learned_leads, forecast, from_path
from pipelines.frame import ALWAYS, Frame
from pipelines.grid import Grid
from pipelines.plain import open_cube
from pipelines.pretrained import run_folder
from pipelines.run_facts import RunFacts
from pipelines.runs import ForecastStore, RunHeader
from pipelines.static import write_static
from pipelines.trained import TrainedModel, trained

START = datetime(2020, 6, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def grid(shape: tuple[int, int] = (4, 5)) -> Grid:
    return Grid("EPSG:3035", 4e6, 1000.0, shape[1], 3e6, -1000.0, shape[0])


def frame(minutes: float, values: np.ndarray) -> Frame:
    values = np.asarray(values, np.float32)
    digest = sha256(values.tobytes() + bytes(str(minutes), "ascii")).hexdigest()
    return Frame(
        RAINFALL_RATE, START + minutes * MINUTE, 5 * MINUTE, grid(values.shape), values, "test", digest
    )


def make_cube(path, frames: dict[float, np.ndarray]) -> str:
    shape = next(iter(frames.values())).shape
    cube = Cube.open_or_create(str(path), grid(shape), RAINFALL_RATE, START, 5 * MINUTE)
    cube.write([frame(minutes, values) for minutes, values in frames.items()])
    return str(path)


@pytest.fixture
def cube(tmp_path) -> str:
    """Four frames of rain that rises by 1 mm/h each; the last column is never seen."""
    field = np.arange(20, dtype=np.float32).reshape(4, 5)
    field[:, 4] = np.nan
    return make_cube(tmp_path / "cube", {5.0 * i: field + i for i in range(4)})


@pytest.fixture
def store(tmp_path) -> str:
    return str(tmp_path / "forecasts")


def newest(store: str) -> tuple[RunHeader, xr.Dataset]:
    opened = ForecastStore.open(store)
    name = opened.names()[-1]
    return opened.header(name), opened.dataset(name).load()


def test_persistence_of_a_tiny_grid_by_hand(cube, store):
    made = forecast(
        cube, Persistence(), store, lead_times=[5, 10], thresholds=[0.1, 10], quantiles=[0.1, 0.9]
    )

    header, run = newest(store)
    assert made.made == (header.name,) == ("20200601T001500Z",)
    field = np.arange(20.0).reshape(4, 5) + 3
    field[:, 4] = np.nan
    for lead in range(2):
        np.testing.assert_array_equal(run["rainfall_rate_median"][lead], field)
        np.testing.assert_array_equal(run["rainfall_rate_mean"][lead], field)
        for level in range(2):
            np.testing.assert_array_equal(run["rainfall_rate_quantile"][level, lead], field)
        chance = run["probability_of_exceedance"][lead]
        np.testing.assert_array_equal(chance[0], np.where(np.isnan(field), np.nan, 1))
        np.testing.assert_array_equal(chance[1], np.where(np.isnan(field), np.nan, field >= 10))
    assert run["lead_time"].values.tolist() == [5, 10]
    assert run["valid_time"].values[1] == np.datetime64("2020-06-01T00:25")


@dataclass(frozen=True)
class Certain:
    """A forecaster that says `rate` everywhere, seen or not."""

    rate: float
    frames: int = 2

    def __call__(self, batch: Batch) -> EnsembleForecast:
        shape = (1, 1, len(batch.lead_time), *batch.radar.shape[2:])
        return EnsembleForecast(torch.full(shape, self.rate))


def test_what_was_never_seen_has_no_forecast_whatever_the_forecaster_says(tmp_path, store):
    older, newer = np.zeros((3, 3)), np.zeros((3, 3))
    older[0], newer[1], older[2], newer[2] = np.nan, np.nan, np.nan, np.nan  # row 2 in neither

    made = forecast(
        make_cube(tmp_path / "cube", {0.0: older, 5.0: newer}), Certain(3.0), store, lead_times=[5]
    )

    _, run = newest(store)
    for field in ("rainfall_rate_median", "rainfall_rate_mean"):
        np.testing.assert_array_equal(run[field][0], [[3] * 3, [3] * 3, [np.nan] * 3])
    assert np.isnan(run["probability_of_exceedance"][0, :, 2]).all()
    assert np.isnan(run["rainfall_rate_quantile"][:, 0, 2]).all()
    assert made.covered == pytest.approx(2 / 3)


def test_the_same_run_twice_is_made_once(cube, store):
    calls = []

    @dataclass(frozen=True)
    class Counted(Certain):
        def __call__(self, batch: Batch) -> EnsembleForecast:
            calls.append(1)
            return super().__call__(batch)

    first = forecast(cube, Counted(1.0), store)
    snapshot = ForecastStore.open(store).snapshot
    second = forecast(cube, Counted(1.0), store)

    assert (first.made, first.there) == (second.there, second.made) == (("20200601T001500Z",), ())
    assert len(calls) == 1 and ForecastStore.open(store).snapshot == snapshot
    assert "already there: run 20200601T001500Z" in str(second)


def test_a_run_of_another_model_or_other_keys_is_not_taken_for_this_one(cube, store):
    forecast(cube, Certain(1.0), store, lead_times=[5])

    with pytest.raises(ValueError, match=r"Certain\(rate=1.0.*not Certain\(rate=2.0.*another forecasts="):
        forecast(cube, Certain(2.0), store, lead_times=[5])
    with pytest.raises(ValueError, match=r"lead_times=\(5.0,\) and not \(10.0,\)"):
        forecast(cube, Certain(1.0), store, lead_times=[10])
    assert (newest(store)[1]["rainfall_rate_mean"][0, :, :4] == 1).all()


def test_a_forecaster_that_fails_leaves_no_run(cube, store):
    class Failing:
        frames = 1

        def __call__(self, batch: Batch) -> EnsembleForecast:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        forecast(cube, Failing(), store)

    assert ForecastStore.open(store).names() == []
    assert forecast(cube, Certain(1.0), store).made == ("20200601T001500Z",)


def test_a_run_says_what_made_it_from_what(cube, store):
    config = {"cube": cube, "model": {"_target_": "a.b"}}
    forecast(cube, Extrapolation(frames=3), store, config=config)

    attributes = newest(store)[0].attributes
    assert attributes["model"] == "Extrapolation(frames=3)"
    assert attributes["input_snapshot"] == Cube.open(cube).snapshot
    assert json.loads(attributes["config"]) == config
    assert attributes["degraded"] == "false" and attributes["inputs_missing"] == "none"
    assert attributes["software_version"] and attributes["created"].endswith("Z")


@pytest.mark.parametrize("pattern", range(8))
def test_every_missing_frame_is_named_and_told_as_nan(tmp_path, store, pattern):
    """All patterns of the three frames before the newest."""
    gone = [i for i in range(3) if pattern >> i & 1]
    frames = {5.0 * i: np.full((3, 4), float(i)) for i in range(4) if i not in gone}
    cube = make_cube(tmp_path / "cube", {**frames, 0.0: frames.get(0.0, np.full((3, 4), np.nan))})
    seen = []

    @dataclass(frozen=True)
    class Looking(Certain):
        frames: int = 4

        def __call__(self, batch: Batch) -> EnsembleForecast:
            seen.extend(batch.radar[0, :, 0, 0].tolist())
            assert batch.age.tolist() == [[15, 10, 5, 0]]
            return super().__call__(batch)

    made = forecast(cube, Looking(1.0), store)

    header, _ = newest(store)
    missing = " ".join(f"2020-06-01T00:{5 * i:02}:00Z" for i in gone)
    assert header.attributes["inputs_missing"] == (missing or "none")
    assert header.attributes["degraded"] == ("true" if gone else "false")
    assert [i for i in range(4) if np.isnan(seen[i])] == gone and seen[3] == 3
    assert (f"without the frames of {missing}" in str(made)) == bool(gone)

    late = [frame(5 * i, np.full((3, 4), float(i))) for i in gone]
    Cube.open(cube).write(late, restate=True)
    told = f"without the frames of {missing}, which came since; restate=true makes it again"
    assert (told in str(forecast(cube, Looking(1.0), store))) == bool(gone)
    assert newest(store)[0].attributes == header.attributes

    again = forecast(cube, Looking(1.0), store, restate=True)
    assert (len(again.made), again.completed) == (int(bool(gone)), {})
    assert newest(store)[0].attributes["inputs_missing"] == "none"
    assert seen[-4:] == [0, 1, 2, 3]
    assert not forecast(cube, Looking(1.0), store, restate=True).made


def test_a_frame_that_is_no_longer_asked_for_has_not_come(tmp_path, store):
    """Once the late newest frame is there, the past begins later, and a gap lies before it."""
    frames = {5.0 * i: np.full((3, 4), float(i)) for i in (0, 1, 3, 4)}
    cube, model = make_cube(tmp_path / "cube", frames), Certain(1.0, frames=3)
    late = f"{START + 25 * MINUTE:%Y-%m-%dT%H:%M:%SZ}"
    forecast(cube, model, store, init_time=late)
    assert newest(store)[0].attributes["inputs_missing"] == "2020-06-01T00:10:00Z 2020-06-01T00:25:00Z"
    Cube.open(cube).write([frame(25, np.full((3, 4), 5.0))])
    assert forecast(cube, model, store, init_time=late).completed == {
        "20200601T002500Z": f"the frames of {late}"
    }


def test_init_times_without_data_name_those_that_exist(tmp_path, store):
    cube = make_cube(tmp_path / "cube", {0.0: np.ones((3, 3)), 5.0: np.ones((3, 3)), 20.0: np.ones((3, 3))})

    with pytest.raises(
        ValueError,
        match=r"no frame then, nor up to 5 min before \(stalest\); the nearest are 2020-06-01T00:05:00Z and .*00:20:00Z",
    ):
        forecast(cube, Persistence(), store, init_time="2020-06-01T00:15", stalest=5)
    with pytest.raises(ValueError, match=r"no frame then; the nearest are"):
        forecast(cube, Persistence(), store, init_time="2020-06-01T00:22")  # between two steps of the axis
    with pytest.raises(ValueError, match=r"of 3 frames from 2020-06-01T00:00:00Z to 2020-06-01T00:20:00Z"):
        forecast(cube, Persistence(), store, init_time="2021-06-01")
    with pytest.raises(
        ValueError, match=r"wants 4 frames.*begins at .*00:00:00Z; the first .* 2020-06-01T00:20"
    ):
        forecast(cube, Extrapolation(), store, init_time="2020-06-01T00:05")
    with pytest.raises(ValueError, match="init_time=soon is not a time: expected ISO 8601"):
        forecast(cube, Persistence(), store, init_time="soon")
    with pytest.raises(ValueError, match=r"wants 9 frames.*ingest more, or take model=persistence"):
        forecast(cube, Extrapolation(frames=9), store)
    with pytest.raises(ValueError, match=r"no such time with 3 successive frames.*holds 3 frames"):
        forecast(cube, Certain(1.0, frames=3), store, init_time="all")
    with pytest.raises(ValueError, match="cube without frames"):
        empty = Cube.open_or_create(str(tmp_path / "empty"), grid(), RAINFALL_RATE, START, 5 * MINUTE)
        forecast(empty.path, Persistence(), store)
    with pytest.raises(ValueError, match="lead_times"):
        forecast(cube, Persistence(), store, lead_times=[0, 5])
    with pytest.raises(ValueError, match="multiple of the cube's 5 minutes"):
        forecast(cube, Persistence(), store, init_time="all", every=7)
    with pytest.raises(ValueError, match="only choose from init_time=all"):
        forecast(cube, Persistence(), store, every=5)


def test_a_frame_without_a_single_observation_is_no_start(tmp_path, store):
    cube = make_cube(tmp_path / "cube", {0.0: np.ones((3, 3)), 5.0: np.full((3, 3), np.nan)})
    with pytest.raises(ValueError, match="holds no observation"):
        forecast(cube, Persistence(), store, stalest=0)
    with pytest.raises(
        ValueError, match=r"holds no observation, nor does any up to 30 min before \(stalest\)"
    ):
        blind = {0.0: np.full((3, 3), np.nan), 5.0: np.full((3, 3), np.nan)}
        forecast(make_cube(tmp_path / "blind", blind), Persistence(), store)


def test_a_late_source_is_forecast_from_the_frames_there_are_at_their_true_ages(tmp_path, store):
    frames = {5.0 * i: np.full((3, 4), float(i)) for i in range(5) if i != 3}
    frames[20.0][:] = np.nan  # written, and empty
    seen = []

    @dataclass(frozen=True)
    class Looking(Certain):
        frames: int = 3

        def __call__(self, batch: Batch) -> EnsembleForecast:
            seen.append((batch.radar[0, :, 0, 0].tolist(), batch.age[0].tolist(), batch.init_time.tolist()))
            return super().__call__(batch)

    cube = make_cube(tmp_path / "cube", frames)
    made = forecast(cube, Looking(1.0), store, init_time="2020-06-01T00:25")

    header, run = newest(store)
    assert seen == [([0, 1, 2], [25, 20, 15], [round((START + 25 * MINUTE).timestamp())])]
    assert header.init_time == START + 25 * MINUTE and run["valid_time"].values[0] == np.datetime64(
        "2020-06-01T00:30"
    )
    assert header.attributes["input_age_minutes"] == "15" and header.attributes["degraded"] == "true"
    missing = "2020-06-01T00:15:00Z 2020-06-01T00:20:00Z 2020-06-01T00:25:00Z"
    assert header.attributes["inputs_missing"] == missing and missing in str(made)
    assert RunFacts.of(header).input_age == 15 * MINUTE
    with pytest.raises(ValueError, match=r"no frame then, nor up to 30 min before \(stalest\)"):
        forecast(cube, Looking(1.0), store, init_time="2020-06-01T01:00")
    with pytest.raises(ValueError, match=r"stalest=-1: expected minutes from 0"):
        forecast(cube, Looking(1.0), store, stalest=-1)


def test_a_late_extrapolation_is_that_of_the_frames_it_has_carried_further(tmp_path, store):
    field = np.zeros((32, 48), np.float32)
    field[10:16, 8:14] = 5.0
    frames = {5.0 * i: np.roll(field, 2 * i, axis=1) for i in range(4)}
    cube = make_cube(tmp_path / "cube", frames)
    forecast(cube, Extrapolation(), store, init_time="2020-06-01T00:15", lead_times=[20])
    forecast(cube, Extrapolation(), store, init_time="2020-06-01T00:25", lead_times=[10])

    opened = ForecastStore.open(store)
    fresh, late = (opened.dataset(name)["rainfall_rate_mean"].values[0] for name in opened.names())
    np.testing.assert_allclose(late, fresh, atol=1e-4)


def test_all_passes_over_a_frame_without_an_observation_and_says_so(tmp_path, store, caplog):
    frames = {5.0 * i: np.full((3, 3), np.nan if i == 1 else 1.0) for i in range(3)}
    made = forecast(make_cube(tmp_path / "cube", frames), Persistence(), store, init_time="all")
    assert made.made == ("20200601T000000Z", "20200601T001000Z")
    assert made.there == ()
    assert "no run 20200601T000500Z" in caplog.text


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"lead_times": []}, "lead_times"),
        ({"lead_times": [float("nan")]}, "lead_times"),
        ({"lead_times": [5, 1e9]}, "lead_times"),
        ({"thresholds": [0, 1]}, "thresholds"),
        ({"quantiles": [0, 0.5]}, "quantiles"),
        ({"init_time": []}, "init_time"),
    ],
)
def test_keys_that_make_no_run_are_refused_by_name_and_leave_no_store(cube, store, tmp_path, keys, named):
    with pytest.raises(ValueError, match=named):
        forecast(cube, Persistence(), store, **keys)
    assert not (tmp_path / "forecasts").exists()


def test_all_takes_every_time_with_a_complete_past(tmp_path, store):
    frames = {5.0 * i: np.full((2, 3), float(i)) for i in range(13) if i != 5}
    cube = make_cube(tmp_path / "cube", frames)

    made = forecast(cube, Certain(1.0, frames=2), store, init_time="all", every=10, start="2020-06-01T00:10")

    assert made.made == tuple(
        f"20200601T{m // 60:02}{m % 60:02}00Z" for m in (10, 20, 40, 50, 60)
    )  # 30 lacks 25
    assert ForecastStore.open(store).names() == list(made.made)
    some = forecast(cube, Certain(1.0, frames=2), store, init_time=["2020-06-01T00:15", "latest"])
    assert some.made == ("20200601T001500Z",) and some.there == ("20200601T010000Z",)


def test_lead_times_go_to_an_hour_in_steps_of_the_cadence(cube, store):
    assert forecast(cube, Persistence(), store).lead_times == tuple(range(5, 61, 5))


def test_the_export_is_the_run(cube, store, tmp_path):
    target = tmp_path / "exports" / "run.nc"

    forecast(cube, Extrapolation(), store, lead_times=[5, 15], export=str(target))
    forecast(cube, Extrapolation(), store, lead_times=[5, 15], export=str(target))

    _, run = newest(store)
    with xr.open_dataset(target, decode_timedelta=False, decode_coords="all") as file:
        xr.testing.assert_equal(file.load(), run)
        assert file.attrs["model"] == "Extrapolation(frames=4)"
    with netCDF4.Dataset(target) as file:
        median = file["rainfall_rate_median"]
        assert median.grid_mapping == "crs" and np.isnan(median._FillValue) and median.units == "mm h-1"
    assert [path.name for path in target.parent.iterdir()] == ["run.nc"]
    with pytest.raises(ValueError, match="holds one run: expected one init_time, got 3"):
        forecast(cube, Certain(1.0), store + "2", init_time="all", export=str(target))


def test_an_exported_store_is_replaced_whole(cube, store, tmp_path):
    target = tmp_path / "run.zarr"
    forecast(cube, Persistence(), store, lead_times=[5, 15], export=str(target))
    (target / "left over").write_text("")
    forecast(cube, Persistence(), store, lead_times=[5, 15], export=str(target))
    _, run = newest(store)
    with xr.open_zarr(target, decode_timedelta=False, decode_coords="all") as there:
        xr.testing.assert_equal(there.load(), run)
    assert not (target / "left over").exists()
    assert [path.name for path in tmp_path.glob("*run*")] == ["run.zarr"]


def test_no_store_but_an_exported_run_is_replaced(cube, store, tmp_path):
    radar = str(tmp_path / "radar.zarr")
    export_cube(cube, radar)
    for place, keys, said in (
        (radar, {}, "a folder without an exported run"),
        (radar, {"cube": radar}, "a folder without an exported run"),
        (store + ".zarr", {"forecasts": store + ".zarr"}, "is the cube or the forecasts"),
    ):
        with pytest.raises(ValueError, match=said):
            forecast(**{"cube": cube, "model": Persistence(), "forecasts": store, **keys}, export=place)
    assert open_cube(radar).observed.any()
    inner = str(tmp_path / "r.zarr" / "forecasts")
    with pytest.raises(ValueError, match="a folder without an exported run"):
        forecast(cube, Persistence(), inner, export=str(tmp_path / "r.zarr"))
    assert ForecastStore.open(inner).names()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("notes.txt", "expected a Zarr store that ends in .zarr or a NetCDF file that ends in .nc"),
        ("s3://bucket/run.nc", "expected a Zarr store .* on this machine"),
        ("folder.nc", "is a folder"),
        ("file.zarr", "is a file"),
        ("folder.zarr", "a folder without an exported run"),
        ("link.zarr", "is a link to nothing"),
        ("file.zarr/run.nc", "run.nc: its folder=.*file.zarr: is a file"),
    ],
)
def test_a_place_that_no_export_can_take_is_refused_before_any_work(cube, store, tmp_path, place, said):
    for name in ("folder.nc", "folder.zarr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("precious")
    (tmp_path / "file.zarr").write_text("precious")
    (tmp_path / "link.zarr").symlink_to(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match=f"^export=.*{said}"):
        forecast(cube, Persistence(), store, export=place if "://" in place else str(tmp_path / place))
    assert not (tmp_path / "forecasts").exists()
    assert (tmp_path / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"start": "yesterday"}, "start=yesterday is not a time"),
        ({"end": "later"}, "end=later is not a time"),
        ({"start": "2020-06-01T00:10", "end": "2020-06-01T00:05"}, "a start that is not after the end"),
        (
            {"start": "2031-01-01"},
            r"start=2031-01-01, end=None: the cube .* no such time .* 4 frames, from 2020",
        ),
    ],
)
def test_an_interval_that_holds_no_time_is_told_with_what_there_is(cube, store, keys, said):
    with pytest.raises(ValueError, match=said):
        forecast(cube, Certain(1.0), store, init_time="all", **keys)


@pytest.mark.parametrize(("covered", "said"), [(0.0, "0%"), (0.004, "less than 1%"), (0.5, "50%")])
def test_what_is_covered_is_said_in_words(covered, said):
    told = str(Forecasted("out", "MetNet", (5.0,), ("run",), (), {}, {}, covered, 1.0, None))
    assert f"{said} of the cells" in told
    assert "1 lead time to 5 min" in told


@dataclass
class Network:
    """Stands for a MetNet: the class of each pixel is that of the mean over its 3 x 3 neighbourhood."""

    frames: int = 2

    def __call__(self, batch: Batch) -> BinnedForecast:
        rain = batch.radar[:, -1].nan_to_num()
        mean = torch.nn.functional.avg_pool2d(rain[:, None], 3, 1, 1)[:, 0]
        classes = torch.nn.functional.one_hot(BINS.classify(mean), len(BINS)).movedim(-1, 1)
        return BinnedForecast(classes[:, None].float().repeat(1, len(batch.lead_time), 1, 1, 1), BINS)


BINS = RainBins((0.1, 1.0, 5.0), 20.0)


def network(cadence: float = 5.0, leads: tuple[float, ...] = (5.0, 10.0)) -> TrainedModel:
    card = {"cadence_minutes": [cadence], "lead_times": list(leads)}
    return TrainedModel(Network(), card, "ab" * 32)  # type: ignore[arg-type]


def test_a_network_gives_the_same_run_in_tiles_as_at_once(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    field = np.where(rng.random((50, 41)) < 0.5, 0, rng.gamma(1, 4, (50, 41)))
    field[20:24] = np.nan
    field[:, 33:] = np.nan  # whole tiles unseen
    cube = make_cube(tmp_path / "cube", {0.0: field, 5.0: field})
    forecast(cube, network(), str(tmp_path / "once"))

    monkeypatch.setattr(run_blocks, "WHOLE", 1000)
    monkeypatch.setattr(run_blocks, "TILE", 16)
    monkeypatch.setattr(run_blocks, "HALO", 3)
    monkeypatch.setattr(run_blocks, "LEADS_OF_CELLS", 600)  # both lead times of some tiles, one of others
    forecast(cube, network(), str(tmp_path / "tiles"))

    header, once = newest(str(tmp_path / "once"))
    _, tiles = newest(str(tmp_path / "tiles"))
    xr.testing.assert_equal(once, tiles)
    assert header.attributes["model"] == "Network" and header.attributes["model_sha256"] == "ab" * 32
    assert header.lead_times == (5.0, 10.0)
    unseen = np.isnan(field)
    assert np.array_equal(np.isnan(once["rainfall_rate_mean"][0]), unseen)
    assert once["probability_of_exceedance"][0, 0].values[~unseen].mean() > 0.5


def test_all_tiles_are_told_the_motion_of_the_whole_grid(tmp_path, monkeypatch):
    rain = gaussian_filter(np.random.default_rng(0).normal(size=(48, 40)), 2) * 40
    cube = make_cube(tmp_path / "cube", {5.0 * i: np.roll(rain, i, 1).clip(min=0) for i in range(4)})
    told = []

    class Listening(Network):
        def __call__(self, batch: Batch) -> BinnedForecast:
            told.append(batch.motion)
            return super().__call__(batch)

    model = replace(network(), network=Listening(frames=4))  # type: ignore[arg-type]
    forecast(cube, model, str(tmp_path / "once"))
    (whole,) = told
    told.clear()
    monkeypatch.setattr(run_blocks, "WHOLE", 1000)
    monkeypatch.setattr(run_blocks, "TILE", 16)
    monkeypatch.setattr(run_blocks, "HALO", 4)
    forecast(cube, model, str(tmp_path / "tiles"))

    assert whole.abs().max() > 0.05 and len(told) == 9
    corners = [(y, x) for y in range(0, 48, 16) for x in range(0, 40, 16)]
    for (y, x), motion in zip(corners, told, strict=True):
        assert torch.equal(motion, whole[..., max(0, y - 4) : y + 20, max(0, x - 4) : x + 20])


@pytest.mark.parametrize(("changing", "most", "usual"), [(10, 0.03, 0.005), (0, 0.1, 0.001)])
def test_where_tiles_of_the_model_that_ships_meet_the_seam_is_faint(
    tmp_path, monkeypatch, changing, most, usual
):
    """Rain in the east alone: the means of wide areas reach from one tile into the next.

    The frequencies of `chances` reach as far again as the cascade does, which twice the margin would hold.
    (In rain that never changes but for its place the cascade leaves 0.4 dB open, and hardly a cell lies
    between dry and wet: which value is exceeded as often as 0.1 mm/h hangs on next to nothing there, and the
    seam is 0.05 at one place.)
    """
    random = np.random.default_rng(0)
    rain = gaussian_filter(random.normal(size=(64, 1100)), 8, mode="wrap") * 120 + 2
    changes = gaussian_filter(random.normal(size=(4, 64, 1100)), (0, 3, 3)) * changing
    rain[:, :600] = changes[:, :, :600] = 0.0
    frames = {5.0 * i: np.roll(rain + changes[i], i, 1).clip(min=0) for i in range(4)}
    cube = make_cube(tmp_path / "cube", frames)
    model = trained(run_folder("pretrained"))

    def said(name: str) -> np.ndarray:
        forecast(cube, model, str(tmp_path / name), lead_times=[10, 60], thresholds=[0.1, 1.0])
        return newest(str(tmp_path / name))[1]["probability_of_exceedance"].values

    once = said("once")
    monkeypatch.setattr(run_blocks, "WHOLE", 1000)
    monkeypatch.setattr(run_blocks, "TILE", 512)
    tiles = said("tiles")
    monkeypatch.setattr(run_blocks, "HALO", 2 * run_blocks.HALO)
    wide = said("wide")
    monkeypatch.setattr(run_blocks, "HALO", 16)
    narrow = said("narrow")
    assert np.nanmax(np.abs(tiles - once)) < most and np.nanquantile(np.abs(tiles - once), 0.99) < usual
    assert np.nanmax(np.abs(wide - once)) < 0.005
    assert np.nanmax(np.abs(narrow - once)) > 0.2, "too little around a tile would be seen"


def test_a_large_grid_is_written_lead_by_lead_to_the_same_run(tmp_path, monkeypatch):
    field = np.random.default_rng(0).gamma(1, 2, (30, 20))
    cube = make_cube(tmp_path / "cube", {5.0 * i: np.roll(field, i, 1) for i in range(4)})
    forecast(cube, Extrapolation(), str(tmp_path / "once"), lead_times=[5, 10, 15])

    monkeypatch.setattr(run_blocks, "CELLS_AT_ONCE", 100)
    monkeypatch.setattr(run_blocks, "RATES_AT_ONCE", 1200)
    forecast(cube, Extrapolation(), str(tmp_path / "apart"), lead_times=[5, 10, 15])

    once, apart = newest(str(tmp_path / "once"))[1], newest(str(tmp_path / "apart"))[1]
    xr.testing.assert_allclose(once, apart, atol=1e-4)
    assert float(once["rainfall_rate_mean"].mean()) > 0.5


def calibrated_network() -> TrainedModel:
    """Its probabilities of 1 mm/h and more are halved in odds."""
    level = ((0.0, 0.0), (-float(np.log(2)), 0.0), (0.0, 0.0))
    nothing = ((0.0, 0.0),) * 3
    calibration = Calibration((0.0,) * 3, level, nothing, (5.0, 10.0))
    return replace(network(), network=Unsure(), calibration=calibration)


@dataclass
class Unsure(Network):
    """Stands for a MetNet that gives every class the same probability."""

    bins: RainBins = BINS

    def __call__(self, batch: Batch) -> BinnedForecast:
        shape = (1, len(batch.lead_time), 4, *batch.radar.shape[2:])
        return BinnedForecast(torch.full(shape, 0.25), self.bins)


def test_a_calibrated_run_says_so_and_how_to_undo_it(cube, store, tmp_path):
    forecast(cube, calibrated_network(), store, thresholds=[0.1, 0.5, 1.0])
    forecast(cube, calibrated_network(), str(tmp_path / "raw"), thresholds=[0.1, 0.5, 1.0], calibrated=False)

    header, run = newest(store)
    said = run["probability_of_exceedance"][:, :, 0, 0].values
    raw_header, raw_run = newest(str(tmp_path / "raw"))
    raw = raw_run["probability_of_exceedance"][:, :, 0, 0].values
    np.testing.assert_allclose(raw, [[0.75, 0.75 - 0.25 * 4 / 9, 0.5]] * 2, atol=1e-5)
    np.testing.assert_allclose(said[:, [0, 2]], [[0.75, 1 / 3]] * 2, atol=1e-5)
    facts = RunFacts.of(header)
    assert sorted(facts.calibration) == [0.1, 1.0]
    offset, slope = torch.tensor(facts.calibration[1.0]).unbind(dim=1)
    np.testing.assert_allclose(undone(torch.from_numpy(said[:, 2]), offset, slope), raw[:, 2], atol=1e-5)
    assert (header.attributes["calibrated"], raw_header.attributes["calibrated"]) == ("true", "false")
    assert RunFacts.of(raw_header) == RunFacts()
    with pytest.raises(ValueError, match="calibrated=true and not false"):
        forecast(cube, calibrated_network(), store, thresholds=[0.1, 0.5, 1.0], calibrated=False)


def test_a_calibrated_run_says_so_where_no_threshold_is_an_edge_too(cube, store):
    forecast(cube, calibrated_network(), store, thresholds=[0.25])
    header, _ = newest(store)
    assert header.attributes["calibrated"] == "true" and not RunFacts.of(header).calibration
    with pytest.raises(ValueError, match="calibrated=true and not false"):
        forecast(cube, calibrated_network(), store, thresholds=[0.25], calibrated=False)


def test_no_frame_is_missed_at_a_cadence_of_no_whole_tenths_of_a_minute(tmp_path, store):
    every = timedelta(seconds=100)
    frames = [
        replace(frame(i, np.full((4, 5), i)), valid_time=START + i * every, cadence=every) for i in range(8)
    ]
    Cube.open_or_create(str(tmp_path / "cube"), grid(), RAINFALL_RATE, START, every).write(frames)
    forecast(str(tmp_path / "cube"), Extrapolation(), store, lead_times=[5])
    attributes = newest(store)[0].attributes
    assert (attributes["degraded"], attributes["inputs_missing"]) == ("false", "none")


def test_a_network_that_sees_place_and_surroundings_is_shown_them(cube, store):
    torch.manual_seed(0)
    net = MetNet(
        frames=2, channels=8, fine_channels=4, depth=0, grid=(4, 4), position=True, surroundings=4, bins=BINS
    )
    card = {"cadence_minutes": [5.0], "lead_times": [5.0], "config": {"satellite": [], "static": []}}
    forecast(cube, TrainedModel(net.eval(), card, "ab" * 32), store)
    _, run = newest(store)
    assert np.isfinite(run["rainfall_rate_mean"][0, :, :4]).all()

    strange = {**card, "config": {"satellite": ["brightness_temperature"]}}
    with pytest.raises(ValueError, match="was made to see 0"):
        forecast(cube, TrainedModel(net, strange, "ab" * 32), store + "2")


def test_a_network_without_its_sources_says_so_until_they_have_come(cube, store, caplog):
    torch.manual_seed(0)
    seen = {"satellite": [(250.0, 25.0)], "static": [(300, 500)]}
    net = MetNet(frames=2, channels=8, fine_channels=4, depth=0, bins=BINS, **seen).eval()
    beside = {"satellite": ["msg"], "static": ["elevation"]}
    card = {"cadence_minutes": [5.0], "lead_times": [5.0], "config": beside}
    model = TrainedModel(net, card, "ab" * 32)

    made = forecast(cube, model, store)

    attributes = newest(store)[0].attributes
    assert (attributes["sources_missing"], attributes["inputs_missing"]) == ("msg elevation", "none")
    assert attributes["degraded"] == "true" and "was made without msg, elevation" in str(made)
    assert "made without msg, elevation, which it learned with" in caplog.text
    height = np.ones((4, 5), np.float32)
    write_static(cube, Frame(ELEVATION, ALWAYS, None, grid(), height, "hills", "cd" * 32, group="static"))
    told = "was made without elevation, which came since; restate=true makes it again"
    assert told in str(forecast(cube, model, store))
    forecast(cube, model, store, restate=True)
    assert newest(store)[0].attributes["sources_missing"] == "msg"


@pytest.mark.parametrize(("seconds", "every", "stride"), [(20, 5.0, 15), (100, 5.0, 3), (300, 10.0, 2)])
def test_every_is_a_multiple_of_any_cadence(tmp_path, store, seconds, every, stride):
    step = timedelta(seconds=seconds)
    frames = [
        replace(frame(0, np.ones((4, 5))), valid_time=START + i * step, cadence=step) for i in range(31)
    ]
    Cube.open_or_create(str(tmp_path / "cube"), grid(), RAINFALL_RATE, START, step).write(frames)
    keys = {"init_time": "all", "lead_times": [5], "thresholds": [1.0], "quantiles": [0.5]}
    made = forecast(str(tmp_path / "cube"), Persistence(), store, every=every, **keys).made
    assert made == tuple(f"{START + i * step:%Y%m%dT%H%M%SZ}" for i in range(0, 31, stride))
    for wrong in (every + 1 / 60, 0.0, -every, float("inf")):
        with pytest.raises(ValueError, match=r"every=.*: expected a multiple of the cube's"):
            forecast(str(tmp_path / "cube"), Persistence(), store, every=wrong, **keys)


def test_a_model_of_another_cadence_is_refused(cube, store):
    with pytest.raises(ValueError, match=r"learned from frames every 2 min, the cube .* one every 5 min"):
        forecast(cube, network(cadence=2.0), store)


@pytest.mark.parametrize(
    ("learned_leads", "leads"), [((4.0, 5.0, 10.0, 12.0), (5.0, 10.0)), ((4.0, 12.0), (4.0, 12.0))]
)
def test_a_cadence_between_those_learned_is_forecast_with_a_warning(
    cube, store, caplog, learned_leads, leads
):
    card = {"cadence_minutes": [2.0, 10.0], "lead_times": list(learned_leads)}
    made = forecast(cube, TrainedModel(Network(), card, "ab" * 32), store)  # type: ignore[arg-type]
    assert made.lead_times == leads, "those that the cube can verify, if there are any"
    assert "learned from frames every 2 or 10 min" in caplog.text and "lies between" in caplog.text


@pytest.mark.parametrize(
    ("minutes", "leads"),
    [
        (5, list(range(5, 65, 5))),
        (3, list(range(3, 61, 3))),
        (7, list(range(7, 60, 7))),
        (11, list(range(11, 60, 11))),
        (13, list(range(13, 60, 13))),
        (14, list(range(14, 60, 14))),
    ],
)
def test_the_model_that_ships_forecasts_an_hour_of_a_cube_of_any_cadence(minutes, leads):
    other = SimpleNamespace(cadence=timedelta(minutes=minutes))
    assert list(_learned_leads(other, trained(run_folder("pretrained")))) == leads


def test_a_published_network_which_is_told_of_no_ages_wants_a_cadence_it_learned_from(cube, store):
    card = {"cadence_minutes": [2.0, 10.0], "lead_times": [5.0]}
    with pytest.raises(ValueError, match="train a model on a cube like this one"):
        forecast(cube, TrainedModel(object.__new__(MetNet1), card, "ab" * 32), store)


def test_another_grid_in_the_same_store_is_warned_of(cube, store, tmp_path, caplog):
    forecast(cube, Persistence(), store)
    assert not caplog.messages
    field = np.ones((6, 6), np.float32)
    forecast(make_cube(tmp_path / "other", {5.0 * i: field for i in range(6)}), Persistence(), store)
    (said,) = caplog.messages
    assert f"{store}: its newest run, " in said and "has another grid than the cube" in said


def test_lead_times_between_frames_are_warned_of(cube, store, caplog):
    forecast(cube, Persistence(), store, lead_times=[5, 7, 10, 13])
    (said,) = caplog.messages
    assert said.startswith("lead_times: at 7, 13 min the cube ") and "one every 5 min" in said


def test_lead_times_never_learned_are_warned_of(cube, store, caplog):
    forecast(cube, network(), store, lead_times=[5, 30])
    assert "beyond 10 min" in caplog.text


def test_a_path_without_a_cube_makes_no_forecast_store(tmp_path, store):
    with pytest.raises(ValueError, match="cube"):
        forecast(str(tmp_path / "nothing"), Persistence(), store)
    assert not (tmp_path / "forecasts").exists()


def test_a_model_that_is_neither_folder_nor_baseline_is_told_what_there_is(tmp_path):
    with pytest.raises(
        ValueError, match=r"model=persistance: no such folder.*expected persistence, extrapolation"
    ):
        from_path("persistance")
    with pytest.raises(ValueError, match=r"model\.json"):
        from_path(str(tmp_path))


def test_what_is_no_rain_is_not_forecast(tmp_path, store):
    path = str(tmp_path / "flags")
    Cube.open_or_create(path, grid(), PRECIPITATION_FLAG, START, 5 * MINUTE)
    with pytest.raises(ValueError, match=r"holds precipitation_flag \(1\), and rain is forecast from"):
        forecast(path, Persistence(), store)
