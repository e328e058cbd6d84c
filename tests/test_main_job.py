"""The main job through the front door: on simulated storms, on real MRMS files, and the demo."""

import asyncio
import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import cli
from pipelines.cube import Cube
from pipelines.runs import ForecastStore
from serve.app import create_app
from serve.forecasts import Forecasts

ROOT = Path(__file__).parent.parent
QUICK = ["prior_samples=8", "prior_steps=30", "local_steps=60", "validation=0"]
TINY = ["model.channels=16", "model.depth=1", "model.frames=3", "crop=48", "batch_size=2"]


def run(command: str, *words: str, code: int = 0) -> None:
    assert cli.answer(command, list(words)) == code, f"metnet {command} {' '.join(words)}"


def get(store: Path, path: str) -> httpx.Response:
    """One answer of the server over a forecast store."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=create_app(Forecasts(str(store))))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(ask())


def tile_over(lon: float, lat: float, zoom: int) -> tuple[int, int]:
    """The web-mercator tile that holds a place."""
    count = 2**zoom
    x = int((lon + 180) / 360 * count)
    y = int((1 - np.arcsinh(np.tan(np.radians(lat))) / np.pi) / 2 * count)
    return x, y


def test_one_storm_through_the_whole_house(tmp_path, capsys):
    cube, store = tmp_path / "cube", tmp_path / "forecasts"
    run("ingest", "source=simulated", "source.size=96", "source.frames=40", f"cube={cube}")
    run(
        "forecast", f"cube={cube}", "model=extrapolation", f"forecasts={store}", "init_time=2020-06-01T02:00Z"
    )
    run("verify", f"cube={cube}", f"forecasts={store}", f"report={tmp_path / 'report'}")

    opened = Cube.open(str(cube))
    now = datetime(2020, 6, 1, 2, tzinfo=UTC)
    seen = opened.block(now, 1)[0]
    row, column = np.unravel_index(np.nanargmax(seen), seen.shape)
    lon, lat = (axis[row, column] for axis in opened.grid.lonlat())
    said = get(store, f"/forecast?lat={lat}&lon={lon}").json()
    first = said["forecast"][0]
    ahead = ForecastStore.open(str(store)).dataset("20200601T020000Z")
    at_place = ahead.rainfall_rate_median.isel(lead_time=0, y=row, x=column).item()
    assert first["valid_time"] == "2020-06-01T02:05:00Z"
    assert first["rainfall_rate_median"] == pytest.approx(at_place, rel=1e-5)
    assert at_place > 1, "where it rained hardest it still rains five minutes later"

    x, y = tile_over(lon, lat, 8)
    tile = get(store, f"/tiles/latest/rainfall_rate_median/5/8/{x}/{y}.png")
    assert tile.headers["content-type"] == "image/png"
    opaque = np.asarray(Image.open(io.BytesIO(tile.content)).convert("RGBA"))[..., 3] > 0
    assert 0.001 < opaque.mean() < 0.9, "rain is drawn, dry is not"
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report
    assert "CRPS" in capsys.readouterr().out


def test_asking_twice_changes_nothing(tmp_path, capsys):
    cube, store = tmp_path / "cube", tmp_path / "forecasts"
    words = ("source=simulated", "source.size=48", "source.frames=30", f"cube={cube}")
    ask = (f"cube={cube}", "model=persistence", f"forecasts={store}", "init_time=2020-06-01T01:00Z")
    run("ingest", *words)
    run("forecast", *ask)
    before = Cube.open(str(cube)).snapshot, ForecastStore.open(str(store)).snapshot
    capsys.readouterr()

    run("ingest", *words)
    run("forecast", *ask)

    assert (Cube.open(str(cube)).snapshot, ForecastStore.open(str(store)).snapshot) == before
    said = capsys.readouterr().out
    assert "Nothing changed" in said
    assert "already there" in said


@pytest.mark.data
def test_the_five_commands_on_real_mrms_files(tmp_path, data, capsys):
    cube, store, model = tmp_path / "cube", tmp_path / "forecasts", tmp_path / "run"
    window = "window=[768,4352,512,512]"
    run("ingest", "source=mrms", f"source.path={data / 'mrms'}", f"cube={cube}", window)
    ahead = "lead_times=[4,8,12,16,20]"
    run("train", f"cube={cube}", f"run={model}", ahead, *TINY, *QUICK, "trainer.max_steps=3")
    run("forecast", f"cube={cube}", f"model={model}", f"forecasts={store}", "init_time=2019-06-10T00:20Z")
    run("verify", f"cube={cube}", f"forecasts={store}", f"report={tmp_path / 'report'}", "resamples=50")

    opened = Cube.open(str(cube))
    assert opened.grid.shape == (512, 512)
    assert opened.cadence == timedelta(minutes=2)
    assert opened.observed.sum() == 23
    rain = opened.block(opened.times[0], 23)
    assert np.nanmax(rain) < 200
    assert (rain[~np.isnan(rain)] >= 0).all(), "-3 is no coverage, never rain"
    run_of = ForecastStore.open(str(store)).dataset("20190610T002000Z")
    probability = run_of.probability_of_exceedance
    assert probability.dims == ("lead_time", "threshold", "y", "x")
    assert run_of.lead_time.values.tolist() == [4, 8, 12, 16, 20]
    falling = probability.diff("threshold").max().item()
    assert falling <= 1e-6, "the higher the threshold, the less likely"
    lon, lat = (axis[256, 256] for axis in opened.grid.lonlat())
    assert get(store, f"/forecast?lat={lat}&lon={lon}").json()["run"] == "20190610T002000Z"
    assert "persistence" in capsys.readouterr().out


def test_the_demo_leaves_all_it_promises(tmp_path):
    out = tmp_path / "with a blank"
    words = [f"out={out}", "serve=false", "train_time=00:00:00:05", "every=60"]
    environment = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "demo", *words],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    for name in (
        "cube",
        "run/model.safetensors",
        "run/model.json",
        "forecasts",
        "report/report.html",
        "report/report.json",
    ):
        assert (out / name).exists(), name
    assert "CRPS" in done.stdout
    assert "extrapolation" in done.stdout
    forecasts = ForecastStore.open(str(out / "forecasts"))
    likely = forecasts.dataset(forecasts.names()[-1]).probability_of_exceedance.sel(threshold=1) > 0.5
    assert likely.isel(lead_time=0).mean() > 0.01, "the newest map, which is shown first, shows rain"


def test_wrong_inputs_are_answered_in_one_line(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    cube, store = tmp_path / "cube", tmp_path / "forecasts"
    run("ingest", "source=simulated", "source.size=48", "source.frames=12", f"cube={cube}")
    run("forecast", f"cube={cube}", "model=persistence", f"forecasts={store}", "init_time=2020-06-01T00:30Z")
    capsys.readouterr()
    cases = [
        (("ingest", "source=mrms", f"source.path={empty}", f"cube={tmp_path / 'new'}"), "no"),
        (("inspect", str(empty)), "empty"),
        (("train", f"cube={empty}", f"run={tmp_path / 'run'}"), "empty"),
        (("train", f"cube={cube}", f"run={tmp_path / 'run'}"), "12 frames"),
        (
            ("forecast", f"cube={cube}", "model=persistence", f"forecasts={store}", "init_time=2031-01-01"),
            "2031-01-01",
        ),
        (("forecast", f"cube={cube}", f"model={tmp_path / 'nowhere'}", f"forecasts={store}"), "nowhere"),
        (
            (
                "forecast",
                f"cube={cube}",
                "model=extrapolation",
                f"forecasts={store}",
                "init_time=2020-06-01T00:30Z",
            ),
            "another",
        ),
        (("verify", f"cube={store}", f"forecasts={store}", f"report={tmp_path / 'r'}"), "forecast"),
        (("verify", f"cube={cube}", f"forecasts={empty}", f"report={tmp_path / 'r'}"), "empty"),
        (("serve", f"forecasts={cube}"), "cube"),
    ]
    for (command, *words), says in cases:
        run(command, *words, code=1)
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert says in said, said
        assert "Traceback" not in said
