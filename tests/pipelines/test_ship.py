"""What ships: a finished run of open data, small enough, with a card that says what is known of it."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipelines import ship as shipping
from pipelines.bench_skill import Event
from pipelines.goals import BASELINES, Goal
from pipelines.ship import ship
from pipelines.trained import trained
from tests.pipelines.training import drifting, made_cube, trained_on

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = ["MODEL_CARD.md", "model.json", "model.safetensors"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    cubes = [made_cube(place / name, drifting(24)) for name in ("fmi", "knmi")]
    trained_on(cubes, place / "run", 1, validation=0.0)
    return place / "run"


def event(name: str, ratio: float) -> Event:
    told = {"value": ratio, "low": ratio - 0.0123, "high": ratio + 0.0123}
    return Event(
        name,
        9,
        1000,
        (5.0, 10.0),
        {"fair CRPS mm/h": {"values": {}, "ratio": dict.fromkeys(BASELINES, told)}},
    )


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_opens_as_the_run_does_and_says_what_it_learned_from(run, tmp_path):
    shipped = ship(str(run), "two cores", folder=tmp_path / "pretrained")
    assert files_of(tmp_path / "pretrained") == FILES
    assert trained(tmp_path / "pretrained").sha256 == trained(run).sha256
    assert shipped.events == ("fmi", "knmi")
    assert shipped.size == sum(path.stat().st_size for path in (tmp_path / "pretrained").iterdir())
    page = (tmp_path / "pretrained" / "MODEL_CARD.md").read_text()
    assert "1 steps, 0 minutes on two cores" in page
    assert "| Cadence | a frame every 5 minutes |" in page and "| Lead times | 5 to 15 minutes |" in page
    assert "Finnish Meteorological Institute" in page and "KNMI" in page and "| mrms |" not in page
    assert "must not be used" in page and "Not measured" in page
    assert "$" not in page, "a place of the template that nothing fills"


def test_no_place_on_this_machine_is_told(run, tmp_path):
    ship(str(run), "two cores", folder=tmp_path / "pretrained")
    card = json.loads((tmp_path / "pretrained" / "model.json").read_text())
    assert str(run.parent) in (run / "model.json").read_text()
    assert str(run.parent) not in json.dumps(card)
    assert card["config"]["cube"] == [cube["path"] for cube in card["cubes"]] == ["fmi", "knmi"]
    before = json.loads((run / "model.json").read_text())
    fitted = {"fitted_on": {"cubes": [before["cubes"][1]["path"]]}}
    assert shipping.without_places({**before, "calibration": fitted})["calibration"] == {
        "fitted_on": {"cubes": ["knmi"]}
    }
    same = set(before) - {"config", "cubes", "validation_cubes"}
    assert {key: card[key] for key in same} == {key: before[key] for key in same}


@pytest.mark.parametrize("extra", [["/home/me/x"], {"/home/me/x": 1}, {"path": {"of": "/home/me/x"}}])
def test_a_place_that_cannot_be_renamed_is_refused(run, extra):
    card = json.loads((run / "model.json").read_text())
    with pytest.raises(ValueError, match=r"names /home/me/x; expected no place on a machine"):
        shipping.without_places({**card, "config": {**card["config"], "extra": extra}})


def test_the_table_of_skill_is_that_of_skill_json(run, tmp_path):
    events = [event("mch2017", 0.9), event("bom_cscn", 1.0)]
    (tmp_path / "skill.json").write_text(json.dumps([asdict(each) for each in events]))
    ship(str(run), "two cores", str(tmp_path / "skill.json"), tmp_path / "pretrained")
    page = (tmp_path / "pretrained" / "MODEL_CARD.md").read_text()
    assert "| fair CRPS mm/h | runs | of STEPS |" in page
    cell = r"\*{0,2}(\d\.\d{3}) \((\d\.\d{3})-(\d\.\d{3})\)\*{0,2}"
    for name, ratio in (("mch2017", 0.9), ("bom_cscn", 1.0)):
        [row] = re.findall(rf"^\| {name} \| 9 \| (.*) \|$", page, re.MULTILINE)
        numbers = [tuple(map(float, found)) for found in re.findall(cell, row)]
        assert numbers == [pytest.approx((ratio, ratio - 0.0123, ratio + 0.0123), abs=6e-4)] * len(BASELINES)
    assert "Not measured" not in page and "| goal |" not in page


def test_the_card_tells_the_goals_and_which_were_missed(run, tmp_path):
    goal = Goal("fair CRPS, ratio to STEPS", "at most 0.95", 0.97, 0.96, 0.98, False)
    events = [replace(event("mch2017", 0.97), goals=(goal,)), event("bom_cscn", 1.0)]
    (tmp_path / "skill.json").write_text(json.dumps([asdict(each) for each in events]))
    ship(str(run), "two cores", str(tmp_path / "skill.json"), tmp_path / "pretrained")
    page = (tmp_path / "pretrained" / "MODEL_CARD.md").read_text()
    assert (
        f"| goal | wanted | mch2017 |\n|---|---|---|\n| {goal.name} | {goal.wanted} | 0.97 (0.96-0.98) **missed** |"
        in page
    )
    assert "| met | all | 0 of 1 |" in page


def test_a_model_that_ships_takes_the_place_of_the_last_one(run, tmp_path):
    folder = tmp_path / "pretrained"
    ship(str(run), "one machine", folder=folder)
    ship(str(run), "another machine", folder=folder)
    assert "another machine" in (folder / "MODEL_CARD.md").read_text()
    assert files_of(folder) == FILES and files_of(tmp_path) == ["pretrained"]


def unfinished(run, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    return tmp_path / "run", None, r"expected the run folder of a finished"


def too_large(run, tmp_path, monkeypatch):
    size = (run / "model.safetensors").stat().st_size
    monkeypatch.setattr(shipping, "LARGEST", size)
    return run, None, r"MB with its cards; expected at most .* MB in a package"


def of_closed_data(run, tmp_path, monkeypatch):
    made = tmp_path / "run"
    made.mkdir()
    (made / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    card = json.loads((run / "model.json").read_text())
    cubes = [*card["cubes"], {**card["cubes"][0], "path": "/x/cubes/nwcsaf"}]
    (made / "model.json").write_text(json.dumps({**card, "cubes": cubes}))
    return made, None, r"learned from nwcsaf; expected none but those whose terms allow it \(fmi, "


def begun_elsewhere(run, tmp_path, monkeypatch):
    made = tmp_path / "run"
    made.mkdir()
    (made / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    card = json.loads((run / "model.json").read_text())
    (made / "model.json").write_text(json.dumps({**card, "weights": {"sha256": "ab", "cubes": []}}))
    return made, None, r"began with other weights; expected one that learned from nothing but its cubes"


def without_skill(run, tmp_path, monkeypatch):
    (tmp_path / "skill.json").write_text('[{"name": 1}]')
    return run, str(tmp_path / "skill.json"), r"expected a skill\.json of metnet bench-skill"


@pytest.mark.parametrize("wrong", [unfinished, too_large, of_closed_data, begun_elsewhere, without_skill])
def test_what_must_not_ship_is_refused_and_what_ships_stays(run, tmp_path, monkeypatch, wrong):
    place = tmp_path / "package" / "pretrained"
    ship(str(run), "two cores", folder=place)
    given, skill, said = wrong(run, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=said):
        ship(str(given), "another", skill, place)
    assert "two cores" in (place / "MODEL_CARD.md").read_text()
    assert files_of(place.parent) == ["pretrained"]


def test_it_is_a_command(run, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(shipping, "ship", lambda *given: asked.append(given) or "shipped")
    for words, code in ((["out/run", "--machine", "one GPU", "--skill", "skill.json"], 0), (["out/run"], 2)):
        monkeypatch.setattr("sys.argv", ["ship", *words])
        with pytest.raises(SystemExit) as end:
            shipping.main()
        assert end.value.code == code
    assert asked == [("out/run", "one GPU", "skill.json")]
    assert Path(shipping.TEMPLATE).is_file()
