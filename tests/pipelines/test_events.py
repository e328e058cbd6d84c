"""Events: each becomes a cube, once; those that ship are those of known terms; one recipe for all."""

import json

import pytest

import cli
from pipelines.events import cubes
from pipelines.plain import rain_cube
from pipelines.sources.simulated import Simulated
from pipelines.terms import TERMS


def test_each_event_becomes_a_cube_of_its_name_once(tmp_path):
    events = {"two": Simulated(seed=2, size=16, frames=2), "one": Simulated(seed=1, size=16, frames=2)}
    made = cubes(str(tmp_path), events, str(tmp_path / "new" / "cubes"))
    assert made == [str(tmp_path / "new" / "cubes" / name) for name in ("two", "one")]
    before = [rain_cube(path).snapshot for path in made]
    assert before[0] != before[1]
    assert cubes(str(tmp_path), events, str(tmp_path / "new" / "cubes")) == made
    assert [rain_cube(path).snapshot for path in made] == before


def test_a_folder_that_is_not_there_is_named_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"^data=.*nowhere: no such folder"):
        cubes(str(tmp_path / "nowhere"), {}, str(tmp_path / "cubes"))
    assert not (tmp_path / "cubes").exists()


def composed(command, *words):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cli.compose(command, list(words)))


@pytest.fixture(scope="module")
def shipping():
    return composed("train", "experiment=pretrained", "cube.data=x", "run=y")


@pytest.fixture(scope="module")
def measuring():
    return composed("bench-skill", "data=x", "out=y")


def test_the_terms_of_every_event_that_ships_are_known_and_of_no_other(shipping, measuring):
    ships, measured = shipping["cube"]["events"], measuring["events"]
    assert sorted(ships) == sorted(terms.event for terms in TERMS)
    assert set(measured) - set(ships) == {"nwcsaf", "bom_c10", "bom_cscn"}
    assert {name: measured[name] for name in ships} == ships


def test_what_ships_is_trained_by_the_recipe_whose_skill_is_measured(shipping, measuring):
    recipes = [
        {key: value for key, value in call.items() if key not in ("cube", "run", "_partial_")}
        for call in (shipping, measuring["training"])
    ]
    assert recipes[0] == recipes[1]
    assert recipes[0]["crop"] == 160, "and not that of metnet train by itself"


def test_an_experiment_is_of_your_own_unless_it_is_named(capsys):
    own = composed("train", "cube=x", "run=y")
    assert own["cube"] == "x" and own["crop"] == 128
    assert cli.answer("train", ["experiment=pretrained", "run=y"]) == 2
    assert "missing cube.data=" in capsys.readouterr().err
    assert cli.answer("bench-skill", ["out=y"]) == 2
    assert "missing data= (folder with the radar files" in capsys.readouterr().err


def test_the_events_are_made_before_they_are_learned_from(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(
        "pipelines.events.cubes", lambda data, events, folder: made.append(folder) or [*events]
    )
    monkeypatch.setattr(
        "pipelines.train.train", lambda cube, config, **_: json.dumps([cube, config["cube"]["data"]])
    )
    run = tmp_path / "run"
    assert cli.answer("train", ["experiment=pretrained", f"cube.data={tmp_path}", f"run={run}"]) == 0
    cube, data = json.loads(capsys.readouterr().out)
    assert sorted(cube) == sorted(terms.event for terms in TERMS) and data == str(tmp_path)
    assert made == [f"{run}/cubes"]
