"""A head that is trained on a finished run, and the forecaster of members that the two then are."""

import hashlib
import json
from functools import partial

import numpy as np
import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file

from metnet.axial_head import window_mean
from pipelines.cf import PROBABILITY_OF_EXCEEDANCE, RAINFALL_RATE
from pipelines.construct import construct
from pipelines.cube import Cube
from pipelines.forecast import forecast
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.past import past
from pipelines.plain import rain_cube
from pipelines.runs import ForecastStore
from pipelines.task import Task
from pipelines.train_head import train_head
from pipelines.trained import TrainedModel, trained, with_motion
from tests.pipelines.training import FIVE, MODEL, PUBLISHED, START, drifting, made_cube, trained_on

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 8
SMALL = {
    "lead_times": [5, 10],
    "crop": SIDE,
    "dim": 16,
    "heads": 2,
    "learning_rate": 0.01,
    "batch_size": 4,
    "validation_samples": 8,
    "check_every": 20,
}


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    return made_cube(tmp_path_factory.mktemp("cube") / "cube", drifting(40))


@pytest.fixture(scope="module")
def network(cube, tmp_path_factory):
    """The run folder of a network that has hardly learned, and whose calibration makes it drier."""
    folder = tmp_path_factory.mktemp("network") / "run"
    trained_on(cube, folder, steps=1)
    card = json.loads((folder / "model.json").read_text())
    level = [[-1.0, 0.0]] * len(card["bins"]["edges"])
    card["calibration"] = {**card["calibration"], "level": level}
    (folder / "model.json").write_text(json.dumps(card))
    return folder


def head_on(cube, network, run, steps, **changed):
    """`metnet train-head` with numbers small enough for a test."""
    settings, trainer = SMALL | changed, {"max_steps": steps}
    cubes = [str(each) for each in cube] if isinstance(cube, list) else str(cube)
    places = {"cube": cubes, "run": str(run), "network": str(network)}
    return train_head(
        **places,
        trainer=partial(Trainer, accelerator="cpu", gradient_clip_val=1.0, **trainer),
        config={**places, "trainer": trainer, **settings},
        **settings,
    )


@pytest.fixture(scope="module")
def told(cube, network, tmp_path_factory):
    return head_on(cube, network, tmp_path_factory.mktemp("head") / "run", steps=30)


def test_what_fell_beside_a_pixel_is_worth_nats_that_the_network_alone_does_not_have(told):
    assert told.coherent < 0.8 * told.independent
    assert f"{told.coherent:.4f} nats a pixel given those before it, {told.independent:.4f} by" in str(told)


def test_the_nats_of_the_network_alone_are_those_of_its_calibrated_forecast(network, told, cube):
    card = json.loads((told.run / "model.json").read_text())
    assert card["validation"]["val_loss_prior"] == told.independent
    base, both, opened = trained(network), trained(told.run), rain_cube(cube)
    batch = past(opened, START + 20 * FIVE, base.frames, (5.0, 10.0))
    forecast = base(batch).probability
    assert (base.uncalibrated()(batch).probability - forecast).abs().max() > 0.01
    torch.testing.assert_close(
        both.network.alone(with_motion(batch)).softmax(dim=2), forecast, atol=1e-4, rtol=0
    )


def test_the_network_is_left_as_it_is_and_kept_with_its_head(network, told):
    before, after = load_file(network / "model.safetensors"), load_file(told.run / "model.safetensors")
    for name, weight in before.items():
        assert torch.equal(after[f"network.{name}"], weight), name
    learned = sum(weight.numel() for name, weight in after.items() if name.startswith("head."))
    assert learned == told.parameters


def test_a_killed_training_goes_on_to_the_same_weights(cube, network, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    step = Task.training_step

    def mortal(self, batch, batch_idx):
        if self.global_step == 3:
            raise Killed
        return step(self, batch, batch_idx)

    few = {"steps": 4, "check_every": 2, "validation_samples": 2, "dropout": 0.1}
    whole = head_on(cube, network, tmp_path / "whole", **few)
    monkeypatch.setattr(Task, "training_step", mortal)
    with pytest.raises(Killed):
        head_on(cube, network, tmp_path / "killed", **few)
    monkeypatch.undo()
    after = head_on(cube, network, tmp_path / "killed", **few)
    assert (after.coherent, after.independent) == (whole.coherent, whole.independent)
    expected = load_file(whole.run / "model.safetensors")
    for name, weight in load_file(after.run / "model.safetensors").items():
        assert torch.equal(weight, expected[name]), name


def test_a_finished_training_is_left_alone_and_another_network_refused(cube, network, told, tmp_path):
    again = head_on(cube, network, told.run, steps=30)
    assert again.before
    assert (again.coherent, again.independent) == (told.coherent, told.independent)
    assert "nothing to do" in str(again)
    other = tmp_path / "other"
    trained_on(cube, other, steps=2, validation=0.0)
    with pytest.raises(ValueError, match=r"other settings: .*network_sha256=.*choose another run folder"):
        head_on(cube, other, told.run, steps=30)


# ---- as a forecaster --------------------------------------------------------------------------------


def cut(path, count=30, cadence=FIVE):
    """A cube of `SIDE` x `SIDE` cells of the same rain."""
    grid = Grid("EPSG:3035", 4e6, 1000.0, SIDE, 3e6, -1000.0, SIDE)
    frames = [
        Frame(
            RAINFALL_RATE,
            START + i * cadence,
            cadence,
            grid,
            rain[8:16, 8:16],
            "cut",
            hashlib.sha256(bytes([i])).hexdigest(),
        )
        for i, rain in enumerate(drifting(count))
    ]
    Cube.open_or_create(str(path), grid, RAINFALL_RATE, START, cadence).write(frames)
    return str(path)


def test_it_forecasts_members_on_a_cube_of_its_grid_at_its_lead_times(told, tmp_path):
    model, place = trained(told.run), str(tmp_path / "forecasts")
    made = forecast(cut(tmp_path / "cut"), model, place)
    assert (made.model, made.lead_times, made.covered) == ("Coherent", (5.0, 10.0), 1.0)
    [name] = made.made
    above = ForecastStore.open(place).dataset(name)[PROBABILITY_OF_EXCEEDANCE.name].values
    members = model.network.count
    np.testing.assert_allclose(above * members, np.round(above * members), atol=1e-3)
    assert 0 < above.mean() < 1
    assert forecast(str(tmp_path / "cut"), model, place).there == (name,)


def test_it_draws_from_the_networks_own_probabilities_where_they_are_not_to_be_calibrated(told, tmp_path):
    model, cube = trained(told.run), cut(tmp_path / "cube")
    means = {}
    for calibrated in (True, False):
        place = str(tmp_path / f"{calibrated}")
        forecast(cube, model, place, calibrated=calibrated)
        store = ForecastStore.open(place)
        [name] = store.names()
        assert store.header(name).attributes["calibrated"] == str(calibrated).lower()
        means[calibrated] = store.dataset(name)[PROBABILITY_OF_EXCEEDANCE.name].values.mean()
    assert means[True] < means[False], "the calibration of the fixture makes it drier"
    assert model.network.calibration is not None, "the one that was given stays as it was"


def test_it_refuses_another_grid_and_lead_times_that_it_does_not_draw(told, cube, tmp_path):
    model, place = trained(told.run), str(tmp_path / "forecasts")
    with pytest.raises(ValueError, match="24 x 32 cells: this head draws maps of 8 x 8"):
        forecast(cube, model, place)
    with pytest.raises(ValueError, match=r"lead_times=\[15.0\]: this head draws maps at 5, 10 min"):
        forecast(cut(tmp_path / "cut"), model, place, lead_times=[5, 15])


def test_an_accumulation_over_a_window_is_had_from_its_members(told, tmp_path):
    """As docs/model.md shows it."""
    model = trained(told.run)
    batch = past(rain_cube(cut(tmp_path / "cut")), START + 20 * FIVE, model.frames, model.lead_times)
    members = model(batch).members
    window = window_mean(members, batch.lead_time)
    hours = (model.lead_times[-1] - model.lead_times[0]) / 60
    millimetres = window.members * hours
    expected = members.mean(dim=2, keepdim=True) * hours  # of two lead times the trapezoidal rule is the mean
    torch.testing.assert_close(millimetres, expected)
    assert 0 < window.probability_above(1.0).max() <= 1


# ---- what is refused, before any work ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"crop": 32}, r"^crop=32: the grid of .* has 24 x 32 cells"),
        ({"lead_times": [5, 7]}, "7 minutes is no multiple of the cube's cadence"),
        ({"lead_times": [5, 200]}, "cube: the cube has 40 frames on a time axis of 40: a sample needs"),
        ({"lead_times": [5, 190], "twice": True}, "^lead_times: .* has 40 frames, too few for 190 min"),
        ({"layers": 3}, r"layers=3: expected 2, 4"),
        ({"heads": 5}, "heads=5"),
        ({"dropout": 1.0}, "dropout=1.0: expected a share from 0 to below 1"),
        ({"dropout": -0.1}, "dropout=-0.1: expected a share"),
        ({"learning_rate": 0.0}, "^learning_rate=0.0: expected"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name_before_any_work(cube, network, tmp_path, changed, said):
    changed = dict(changed)
    cubes = [cube, cube] if changed.pop("twice", False) else cube
    with pytest.raises(ValueError, match=said):
        head_on(cubes, network, tmp_path / "run", steps=1, **changed)
    assert not (tmp_path / "run").exists()


def test_lead_times_without_a_plane_in_the_network_are_refused_before_any_work(cube, tmp_path):
    planes = {"_target_": "metnet.lead_time.LeadTimePlanes", "step": 5.0, "count": 2}
    trained_on(cube, tmp_path / "network", steps=1, lead_times=[5, 10], model={**MODEL, "lead_time": planes})
    with pytest.raises(ValueError, match="lead times 15 min: the network's planes stand for 5 to 10 min"):
        head_on(cube, tmp_path / "network", tmp_path / "run", steps=1, lead_times=[5, 15])
    assert not (tmp_path / "run").exists()


def test_lead_times_that_the_network_never_learned_are_told(cube, network, tmp_path, caplog):
    head_on(cube, network, tmp_path / "known", steps=0)
    assert "the model never saw any" not in caplog.text
    head_on(cube, network, tmp_path / "run", steps=0, lead_times=[5, 20])
    assert "lead times beyond 15 min: the model never saw any" in caplog.text


def test_a_cube_of_a_cadence_that_the_network_never_saw_is_refused(network, tmp_path):
    rare = cut(tmp_path / "rare", cadence=3 * FIVE)
    with pytest.raises(
        ValueError, match="a frame every 15 min, and the network learned from one every 5 min"
    ):
        head_on(rare, network, tmp_path / "run", steps=1)


def test_only_a_finished_run_of_a_network_that_sees_what_it_forecasts_gets_a_head(
    cube, network, told, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="expected the run folder of a finished"):
        head_on(cube, tmp_path / "unfinished", tmp_path / "run", steps=1)
    with pytest.raises(ValueError, match="is a Coherent; expected the run folder of a MetNet"):
        head_on(cube, told.run, tmp_path / "run", steps=1)
    published = TrainedModel(construct({**PUBLISHED["metnet1"], "_partial_": False}, ("metnet.",)), {}, "")
    monkeypatch.setattr("pipelines.train_head.trained", lambda path: published)
    with pytest.raises(ValueError, match="is a MetNet1; expected the run folder of a MetNet"):
        head_on(cube, network, tmp_path / "run", steps=1)
