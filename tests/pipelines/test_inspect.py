"""What is at a path is told and drawn as it is."""

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colorbar import Colorbar
from PIL import Image

from pipelines.baselines.persistence import Persistence
from pipelines.cf import RAINFALL_RATE, REFLECTIVITY
from pipelines.cube import Cube
from pipelines.forecast import forecast
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.inspect import inspect
from pipelines.palette import MISSING_COLOUR, RAIN_COLOURS, RAIN_LEVELS, rain_colours
from pipelines.repository import Repository
from pipelines.runs import ForecastStore

START = datetime(2020, 6, 1, tzinfo=UTC)
GRID = Grid("EPSG:4326", -100.0, 0.01, 40, 35.0, -0.01, 30)


def field(top: float) -> np.ndarray:
    """A quarter unobserved, a quarter at `top` mm/h, the rest dry."""
    values = np.zeros(GRID.shape, np.float32)
    values[:15, :20] = np.nan
    values[:15, 20:] = top
    return values


@pytest.fixture
def cube(tmp_path) -> str:
    """Steps 0, 1 and 5 of 10 minutes are there."""
    path = str(tmp_path / "cube")
    opened = Cube.open_or_create(path, GRID, RAINFALL_RATE, START, timedelta(minutes=10))
    opened.write(
        [
            Frame(
                RAINFALL_RATE,
                START + timedelta(minutes=10 * step),
                timedelta(minutes=10),
                GRID,
                field(top),
                "test",
                sha256(str(step).encode()).hexdigest(),
            )
            for step, top in ((0, 30.0), (1, 60.5), (5, 3.0))
        ],
        "three frames",
    )
    return path


def colours(path) -> set[tuple[int, ...]]:
    with Image.open(path) as picture:
        return {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=2**24)}


def rgb(text: str) -> tuple[int, ...]:
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def test_a_cube_is_told_in_numbers(cube):
    found = inspect(cube, picture=None)
    facts = dict(found.facts)

    assert facts["frames"] == "3 of 6 steps of 10 min, 2020-06-01 00:00 to 2020-06-01 00:50 UTC"
    assert facts["gaps"] == "1: 2020-06-01 00:20 to 2020-06-01 00:40 (3 steps)"
    assert facts["observed"].startswith("75.0% of the cells")
    assert "33.3% of the observed cells" in facts["rain"]
    assert "60.5 mm/h at 2020-06-01 00:10" in facts["rain"]
    assert facts["grid"].startswith("30 rows x 40 columns of 0.01 degrees (1.0") and "WGS 84" in facts["grid"]
    assert facts["corners"].startswith("NW 35.000N 100.000W; NE 35.000N 99.610W; SE 34.710N")
    assert "three frames" in facts["history"] and Cube.open(cube).snapshot in facts["history"]
    assert "MB in" in facts["size"] and found.picture is None
    for label, text in facts.items():
        assert label in str(found) and text.split()[0] in str(found)


def test_what_is_no_rain_rate_is_not_told_as_one(tmp_path):
    path = str(tmp_path / "cube")
    opened = Cube.open_or_create(path, GRID, REFLECTIVITY, START, timedelta(minutes=5))
    digest = sha256(b"dBZ").hexdigest()
    opened.write([Frame(REFLECTIVITY, START, timedelta(minutes=5), GRID, field(40.0), "test", digest)])
    told = str(inspect(path, None))
    assert f"40 {REFLECTIVITY.units}, in 1 frames" in told
    assert "mm/h" not in told


def test_a_repository_without_a_commit_says_so(tmp_path):
    path = str(tmp_path / "cube")
    Repository.open_or_create(path)
    with pytest.raises(ValueError, match="nothing was written here yet"):
        inspect(path, None)


def test_the_picture_of_a_cube_is_its_newest_frame(cube, tmp_path):
    target = tmp_path / "pictures" / "cube.png"

    found = inspect(cube, picture=str(target))

    assert found.picture == str(target) and str(target) in str(found)
    seen = colours(target)
    newest = RAIN_COLOURS[max(i for i, level in enumerate(RAIN_LEVELS) if level <= 3.0)]
    with Image.open(target) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    drawn = (pixels == rgb(newest)).all(axis=2).mean()
    grey = (pixels == rgb(MISSING_COLOUR)).all(axis=2).mean()
    assert drawn > 0.1 and grey > 0.1 and drawn == pytest.approx(grey, rel=0.2)
    assert rgb("#ffffff") in seen
    assert [path.name for path in target.parent.iterdir()] == ["cube.png"]


def test_a_forecast_store_is_told_with_its_runs_and_models(cube, tmp_path):
    store = str(tmp_path / "forecasts")
    forecast(cube, Persistence(), store, init_time=["2020-06-01T00:10", "latest"], lead_times=[10, 20, 30])

    found = inspect(store, picture=str(tmp_path / "run.png"))
    facts = dict(found.facts)

    assert facts["forecasts"] == "2 runs" and facts["made by"] == "Persistence() (2)"
    assert facts["init times"] == "2020-06-01 00:10 to 2020-06-01 00:50 UTC"
    assert facts["lead times"] == "10, 20, 30 min" and facts["degraded"] == "none"
    assert "20200601T005000Z: at 10 min 75.0% of the cells have a forecast" in facts["newest"]
    assert "probability of 33.3% for 0.1 mm/h" in facts["newest"]
    assert rgb(RAIN_COLOURS[4]) in colours(tmp_path / "run.png")


def test_empty_places_are_told_and_not_drawn(tmp_path):
    cube = Cube.open_or_create(str(tmp_path / "cube"), GRID, RAINFALL_RATE, START, timedelta(minutes=5)).path
    store = ForecastStore.open_or_create(str(tmp_path / "store")).path

    for path, hint in ((cube, "metnet ingest"), (store, "metnet forecast")):
        found = inspect(path, picture=str(tmp_path / "nothing.png"))
        assert hint in str(found) and found.picture is None
    assert not (tmp_path / "nothing.png").exists()


def test_what_is_neither_is_said(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("rain")
    for name in ("folder", "missing"):
        with pytest.raises(ValueError, match=name):
            inspect(str(tmp_path / name))


def test_a_projected_grid_is_drawn_too(tmp_path):
    grid = Grid("EPSG:3035", 4.2e6, 1000.0, 64, 3.2e6, -1000.0, 48)
    cube = Cube.open_or_create(str(tmp_path / "cube"), grid, RAINFALL_RATE, START, timedelta(minutes=5))
    rain = np.full(grid.shape, 8.0, np.float32)
    cube.write([Frame(RAINFALL_RATE, START, timedelta(minutes=5), grid, rain, "test", "ab" * 32)])

    inspect(cube.path, picture=str(tmp_path / "map.png"))

    assert rgb(RAIN_COLOURS[6]) in colours(tmp_path / "map.png")


@pytest.mark.parametrize("shape", [(6, 1), (1, 6)])
def test_a_single_line_of_cells_that_saw_nothing_is_drawn_and_not_called_dry(tmp_path, shape):
    grid = Grid("EPSG:3035", 4.2e6, 1000.0, shape[1], 3.2e6, -1000.0, shape[0])
    cube = Cube.open_or_create(str(tmp_path / "cube"), grid, RAINFALL_RATE, START, timedelta(minutes=5))
    unseen = np.full(shape, np.nan, np.float32)
    cube.write([Frame(RAINFALL_RATE, START, timedelta(minutes=5), grid, unseen, "test", "ab" * 32)])

    told = dict(inspect(cube.path, picture=str(tmp_path / "map.png")).facts)

    assert told["rain"] == "unknown: no cell was observed"
    assert rgb(MISSING_COLOUR) in colours(tmp_path / "map.png")


def test_a_picture_that_cannot_be_put_in_place_leaves_nothing_behind(cube, tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        inspect(cube, picture=str(tmp_path / "map.png"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        ("map.jpg", "map.jpg: expected a file that ends in .png"),
        ("map", "map: expected a file that ends in .png"),
        ("file/map.png", "map.png: its folder=.*file: is a file; expected a folder"),
    ],
)
def test_a_picture_of_another_kind_or_without_a_place_is_refused_before_any_work(tmp_path, picture, told):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"^picture=.*{told}"):
        inspect("nowhere", picture=str(tmp_path / picture))


def test_a_history_has_no_fewer_than_no_commits(cube):
    with pytest.raises(ValueError, match=r"^history=-1: expected how many commits to list, from 0 on"):
        inspect(cube, None, history=-1)
    assert "history" not in dict(inspect(cube, None, history=0).facts)


def test_grey_is_not_observed_in_a_cube_and_no_forecast_in_a_run(cube, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Colorbar, "set_label", lambda self, text, **_: told.append(text))
    store = str(tmp_path / "forecasts")
    forecast(cube, Persistence(), store, init_time=["latest"], lead_times=[10])

    for path in (cube, store):
        inspect(path, picture=str(tmp_path / "map.png"))

    assert list(filter(None, told)) == [
        "mm/h; grey: not observed",
        "probability, %; grey: no forecast",
        "mm/h; grey: no forecast",
    ]


def test_each_level_begins_its_colour_and_the_order_survives_in_grey():
    scale, norm = rain_colours()
    for level, colour in zip(RAIN_LEVELS, RAIN_COLOURS, strict=True):
        shown = tuple(round(255 * part) for part in scale(norm(level))[:3])
        assert shown == rgb(colour)
    assert tuple(round(255 * part) for part in scale(np.ma.masked)[:3]) == rgb(MISSING_COLOUR)
    assert tuple(round(255 * part) for part in scale(norm(0.0))[:3]) == rgb("#ffffff")
    assert len(set(RAIN_COLOURS)) == len(RAIN_LEVELS)
