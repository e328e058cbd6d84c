"""`model=pretrained`: found by its name from anywhere, without a network, and never in place of a folder of yours."""

import json
import logging
import shutil
import socket
from pathlib import Path

import pytest
import torch
from hatchling.builders.wheel import WheelBuilder

import cli
from pipelines import pretrained
from pipelines.export_model import export
from pipelines.forecast import forecast
from pipelines.runs import ForecastStore
from pipelines.ship import ship
from pipelines.trained import trained
from tests.pipelines.known_answer import FILE, answer
from tests.pipelines.training import ROOT, drifting, made_cube, trained_on

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cube, a run that learned from it, and the run as it ships."""
    place = tmp_path_factory.mktemp("made")
    cube, run, shipped = (
        made_cube(place / "fmi", drifting(24)),
        place / "run",
        place / "inside" / "pretrained",
    )
    trained_on(cube, run, 1, validation=0.0)
    ship(str(run), "a test", folder=shipped)
    return cube, run, shipped


@pytest.fixture
def installed(made, monkeypatch, tmp_path):
    """The same in an installation with a model, seen from an empty working directory."""
    monkeypatch.setattr(pretrained, "FOLDER", made[2])
    monkeypatch.chdir(tmp_path)
    return made


def test_it_opens_by_name_from_any_working_directory_and_without_a_network(installed, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", None)
    model, run = trained("pretrained"), trained(installed[1])
    assert model.sha256 == run.sha256
    weights = run.network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.network.state_dict().items())


def test_a_forecast_with_it_needs_no_training_and_says_what_made_it(installed, capsys):
    cube, run, _ = installed
    words = [f"cube={cube}", "model=pretrained", "forecasts=forecasts", "lead_times=[5,10]"]
    assert cli.answer("forecast", words) == 0
    assert "by MetNet: 2 lead times to 10 min" in capsys.readouterr().out
    forecast(cube, trained(run), "others", lead_times=[5, 10])
    ours, others = (ForecastStore.open(place) for place in ("forecasts", "others"))
    [name] = ours.names()
    assert ours.dataset(name).equals(others.dataset(name))
    assert ours.header(name).attributes["model_sha256"] == trained(run).sha256


def test_the_model_that_ships_says_what_it_said_when_it_shipped():
    model, known = trained("pretrained"), json.loads(FILE.read_text())
    said = answer(model)
    for told in ("sha256", "forward"):
        assert said.pop(told) == known.pop(told), "it is new: python -m tests.pipelines.known_answer"
    for name, numbers in known.items():
        assert said[name] == pytest.approx(numbers, abs=5e-4), f"{name}: if you mean it, raise FORWARD"


def test_a_folder_of_yours_with_that_name_is_named_with_its_path(installed, caplog):
    _, run, _ = installed
    shutil.copytree(run, "pretrained")
    card = json.loads(Path("pretrained/model.json").read_text())
    Path("pretrained/model.json").write_text(json.dumps({**card, "steps": 77}))
    with caplog.at_level(logging.WARNING):
        assert trained("pretrained").card["steps"] != 77
    assert "for what is called so here, say ./pretrained" in caplog.text
    assert trained("./pretrained").card["steps"] == trained(Path("pretrained")).card["steps"] == 77


def test_it_exports_by_name(installed, monkeypatch):
    seen = []
    monkeypatch.setattr("pipelines.export_model.write_graph", lambda *given: seen.append(given))
    export("pretrained", "model.pt2", cube=installed[0])
    assert seen[0][0].sha256 == trained(installed[1]).sha256


def test_where_none_ships_it_is_said_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "nothing")
    words = ["cube=x", "model=pretrained", f"forecasts={tmp_path / 'forecasts'}"]
    assert cli.answer("forecast", words) == 1
    said = capsys.readouterr().err
    assert "no pretrained model in this installation" in said
    assert "metnet train experiment=pretrained" in said


def test_the_wheel_holds_it_and_all_that_is_read_beside_it(made, tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE", "cli.py"):
        shutil.copy(ROOT / name, tmp_path)
    for room in ("metnet", "pipelines", "configs", "serve"):
        shutil.copytree(
            ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("pretrained", "__pycache__")
        )
    shutil.copytree(made[2], tmp_path / "metnet" / "pretrained")
    held = {file.distribution_path for file in WheelBuilder(str(tmp_path)).recurse_included_files()}
    names = {f"metnet/pretrained/{name}" for name in ("model.safetensors", "model.json", "MODEL_CARD.md")}
    assert {*names, "pipelines/model_card.md", "configs/experiment/pretrained.yaml"} <= held
    assert Path(pretrained.__file__).parents[1] / "metnet" / "pretrained" == pretrained.FOLDER
