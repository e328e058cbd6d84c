"""`bench_skill`: every forecaster counts on the same pixels, and what is left out is never learned from."""

import json
import math
import sys
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import numpy as np
import pytest
import torch
from lightning import Trainer

from metnet.batch import Batch
from metnet.rain import EnsembleForecast
from pipelines.bench_skill import (
    BenchedSkill,
    Event,
    _kept,
    _write,
    bench_skill,
    measured,
    picture,
    ratio_tables,
)
from pipelines.goals import BASELINES, Goal
from pipelines.report import DECIDED
from pipelines.sources.simulated import Simulated
from pipelines.train import train

MODEL = {
    "_target_": "metnet.model.MetNet",
    "_partial_": True,
    "frames": 2,
    "channels": 8,
    "fine_channels": 4,
    "depth": 0,
    "grid": [4, 4],
}


def storms(seed: int) -> Simulated:
    return Simulated(seed=seed, size=48, frames=24)


def recipe(**given):
    from pipelines.construct import construct

    model = construct(MODEL, ("metnet.",))
    trainer = partial(Trainer, max_steps=1, accelerator="cpu", logger=False)
    return partial(
        train,
        model=model,
        trainer=trainer,
        lead_times=[5, 10],
        crop=32,
        prior_steps=3,
        validation_samples=2,
        **given,
    )


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    out = tmp_path_factory.mktemp("skill")
    events = {"one": storms(1), "two": storms(2), "three": storms(3)}
    call = {"training": {"model": MODEL}}

    def again():
        return bench_skill(
            str(out),
            events,
            str(out),
            recipe(),
            ["one+two"],
            runs=3,
            side=40,
            members=2,
            resamples=20,
            config=call,
        )

    return out, again(), again


@pytest.mark.slow
def test_each_left_out_event_is_told_beside_every_baseline(benched):
    out, result, _ = benched
    assert [event.name for event in result.events] == ["one", "two"]
    told = json.loads((out / "skill.json").read_text(), parse_constant=refused)
    crps = told[0]["table"]["fair CRPS mm/h"]
    assert set(crps["values"]) == {"trained", *BASELINES}
    assert all(len(values) == 2 and np.isfinite(values).all() for values in crps["values"].values())
    means = {name: np.mean(values) for name, values in crps["values"].items()}
    assert crps["ratio"]["steps"]["value"] == pytest.approx(means["trained"] / means["steps"])
    assert (out / "skill.png").read_bytes() == picture(result.events)
    page = (out / "skill.md").read_text()
    assert "of STEPS" in page
    assert "one: fair CRPS" in page
    assert "of widened" in str(result)
    assert DECIDED in page


@pytest.mark.slow
def test_what_is_asked_of_it_stands_first_in_all_that_is_told(benched):
    out, result, _ = benched
    page = (out / "skill.md").read_text()
    assert page.startswith("| goal | wanted | one | two |\n")
    assert str(result).startswith("one: ")
    first = result.events[0].goals[0]
    assert f"| {first.name} | {first.wanted} | {first}".replace("missed", "**missed**") in page
    assert f"  {first.name}, {first.wanted}: {first}" in str(result)
    crps = result.events[0].table["fair CRPS mm/h"]["ratio"]["steps"]
    assert (first.value, first.met) == (crps["value"], crps["value"] <= 0.95)
    again = measured(out / "skill.json")
    assert [[str(goal) for goal in event.goals] for event in again] == [
        [str(goal) for goal in event.goals] for event in result.events
    ]


@pytest.mark.slow
def test_what_is_left_out_is_not_learned_from(benched):
    out, _, _ = benched
    card = json.loads((out / "runs" / "one+two" / "model.json").read_text())
    assert [cube["path"] for cube in card["cubes"]] == [str(out / "cubes" / "three")]
    assert card["config"]["cube"] == [str(out / "cubes" / "three")]


@pytest.mark.slow
def test_a_window_is_forecast_from_that_window_alone(benched):
    out, _, _ = benched
    [*kept] = (out / "steps" / "one").glob("*.zarr")
    import zarr

    assert len(kept) == 3
    assert zarr.load(kept[0]).shape == (1, 2, 2, 40, 40)


@pytest.mark.slow
def test_what_was_made_is_used_again_and_says_the_same(benched, monkeypatch):
    _, before, again = benched
    monkeypatch.setattr("pipelines.baselines.steps.Steps.__call__", None)
    after = again()
    assert json.dumps([event.table for event in before.events]) == json.dumps(
        [event.table for event in after.events]
    )


@pytest.mark.parametrize("other", ["rain", "motion"])
def test_members_of_other_rain_or_another_motion_of_it_are_not_used_again(tmp_path, monkeypatch, other):
    def forecaster(batch):
        made.append(batch)
        return EnsembleForecast(torch.zeros(1, 2, 1, 8, 8))

    made = []
    start = datetime(2024, 6, 1, tzinfo=UTC)
    radar = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    one = Batch(
        radar,
        torch.tensor([[5.0, 0.0]]),
        torch.tensor([int(start.timestamp())]),
        torch.tensor([5.0]),
        torch.ones(1),
    )
    for _ in range(2):
        _kept(tmp_path, start, (0, 0, 8, 8), forecaster, one)
    assert len(made) == 1
    if other == "rain":
        one = replace(one, radar=radar.flip(1))
    else:
        monkeypatch.setattr("pipelines.trained.motion_and_doubt", lambda *_: np.ones((3, 8, 8), np.float32))
    _kept(tmp_path, start, (0, 0, 8, 8), forecaster, one)
    assert len(made) == 2


def test_a_skill_json_that_tells_no_goals_is_read_and_one_with_others_is_refused(tmp_path):
    event = {"name": "one", "runs": 3, "pixels": 9, "lead_times": [5.0], "table": {}}
    path = tmp_path / "skill.json"
    path.write_text(json.dumps([event]))
    assert measured(path) == (Event("one", 3, 9, [5.0], {}),)
    for wrong in ([{**event, "goals": [{"best": 1}]}], ["one"], {"one": event}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"skill\.json: expected a skill\.json of metnet bench-skill"):
            measured(path)


def refused(token):
    raise AssertionError(f"{token} is no JSON")


def test_what_is_not_known_is_null_in_skill_json_a_dash_in_words_and_not_measured_again(tmp_path):
    nothing = {"value": math.nan, "low": math.nan, "high": math.nan}
    ratio = {"steps": {"value": math.inf, "low": math.nan, "high": math.inf}, "widened": nothing}
    table = {
        "CSI >= 5 mm/h": {"values": {"steps": [math.nan, 0.5]}, "ratio": {**ratio, "extrapolation": nothing}}
    }
    goal = Goal("CSI", "at least 1.05", math.nan, math.nan, math.nan, None)
    known = Goal("CRPS", "at most 0.95", 0.5, math.nan, math.nan, True)
    _write(tmp_path, [Event("one", 3, 9, (5.0, 10.0), table, (goal, known))])

    [told] = json.loads((tmp_path / "skill.json").read_text(), parse_constant=refused)
    assert told["table"]["CSI >= 5 mm/h"]["ratio"]["steps"] == {"value": None, "low": None, "high": None}
    assert [goal["met"] for goal in told["goals"]] == [None, True]
    [event] = measured(tmp_path / "skill.json")
    assert [str(goal) for goal in event.goals] == ["not measured", "0.5 met"]
    assert "| one | 3 | - | - | - |" in list(ratio_tables([event]))
    assert "CSI >= 5 mm/h: - of steps" in str(BenchedSkill("out", (event,)))


def told(name, runs, **ratios):
    """An event of such CRPS by that of every baseline, and of other scores, by their names."""
    known = {"fair CRPS mm/h" if score == "crps" else score: value for score, value in ratios.items()}
    table = {
        score: {"ratio": {name: {"value": value, "low": value, "high": value} for name in BASELINES}}
        for score, value in known.items()
    }
    return Event(name, runs, 9, (5.0,), table)


def test_all_events_together_stand_below_each_score_that_several_have():
    events = [told("one", 3, crps=0.5, fss=0.7), told("two", 4, crps=2.0, csi=1.2), told("six", 5, csi=0.3)]
    rows = list(ratio_tables(events))
    assert [row for row in rows if row.startswith("| mean")] == [
        "| mean of 2 events | 7 | 1.000 | 1.000 | 1.000 |",
        "| mean of 2 events | 9 | 0.600 | 0.600 | 0.600 |",
    ]
    assert not any("mean of" in row for row in ratio_tables(events[:1]))
    assert str(BenchedSkill("out", tuple(events))).splitlines()[-3:-1] == [
        "mean of 2 events, fair CRPS mm/h: 1.000 of steps, 1.000 of widened, 1.000 of extrapolation",
        "mean of 2 events, csi: 0.600 of steps, 0.600 of widened, 0.600 of extrapolation",
    ]
    assert "mean of" not in str(BenchedSkill("out", tuple(events[:1])))


def test_an_event_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="no event four; expected some of one"):
        bench_skill(str(tmp_path), {"one": storms(1)}, str(tmp_path), recipe(), ["four"])


def test_an_event_that_is_left_out_twice_is_named_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"^leave_out: one more than once; expected each event once"):
        bench_skill(str(tmp_path), {"one": storms(1)}, str(tmp_path / "out"), recipe(), ["one", "one"])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        bench_skill(str(tmp_path / "x"), {"one": storms(1)}, str(tmp_path), recipe())


def test_a_file_in_place_of_the_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"^out=.*: is a file; expected a folder"):
        bench_skill(str(tmp_path), {"one": storms(1)}, str(tmp_path / "out"), recipe())


@pytest.mark.parametrize(
    ("key", "value"),
    [*((key, 0) for key in ("runs", "side", "members", "resamples")), ("widened", "nowhere"), ("members", 1)],
)
def test_a_wrong_argument_is_refused_before_any_training(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"^{key}={value}: .*(expected|at least 2)"):
        bench_skill(str(tmp_path), {"one": storms(1)}, str(tmp_path / "out"), recipe(), **{key: value})
    assert not (tmp_path / "out").exists()


def test_what_is_to_be_installed_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pysteps.nowcasts", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install 'metnet-nowcast\[verify\]'"):
        bench_skill(str(tmp_path), {"one": storms(1)}, str(tmp_path / "out"), recipe())
    assert not (tmp_path / "out").exists()


def test_cubes_to_validate_on_are_refused_for_they_may_be_left_out(tmp_path):
    config = {"training": {"validation_cubes": ["cubes/one"]}}
    with pytest.raises(ValueError, match=r"^training.validation_cubes=\['cubes/one'\]: expected none"):
        bench_skill(str(tmp_path), {"one": storms(1)}, str(tmp_path / "out"), recipe(), config=config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "model", [{**MODEL, "advection": False}, {"_target_": "metnet.metnet1.MetNet1", "_partial_": True}]
)
def test_a_network_without_a_prior_of_its_own_is_refused_before_any_work(tmp_path, model):
    config = {"training": {"model": model}}
    with pytest.raises(
        ValueError, match=r"^training.model: expected a MetNet with advection=true, or widened="
    ):
        bench_skill(str(tmp_path), {"one": storms(1)}, str(tmp_path / "out"), recipe(), config=config)
    assert not (tmp_path / "out").exists()


def test_stochastic_depth_without_advection_is_refused_before_any_work(tmp_path):
    config = {"training": {"model": {**MODEL, "advection": False, "stochastic_depth": 0.5}}}
    with pytest.raises(ValueError, match=r"^training.model.stochastic_depth=0.5: expected 0 with"):
        bench_skill(str(tmp_path), {"one": storms(1)}, str(tmp_path / "out"), recipe(), config=config)
    assert not (tmp_path / "out").exists()


def test_weights_that_may_have_learned_from_what_is_left_out_are_refused_before_any_work(tmp_path):
    config = {"training": {"weights": "pretrained"}}
    with pytest.raises(ValueError, match=r"^training.weights=pretrained: expected null"):
        bench_skill(str(tmp_path), {"one": storms(1)}, str(tmp_path / "out"), recipe(), config=config)
    assert not (tmp_path / "out").exists()
