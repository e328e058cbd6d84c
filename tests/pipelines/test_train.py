import hashlib
import json
import logging
import math
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np
import pytest
import torch
from filelock import FileLock
from lightning import Trainer
from safetensors.torch import load_file

from metnet.attention.axial import AxialAttention
from metnet.batch import Batch
from metnet.model import MetNet
from pipelines.cf import RAINFALL_RATE
from pipelines.construct import construct
from pipelines.cube import Cube
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.samples import Samples
from pipelines.task import Learning, Task
from pipelines.train import train
from pipelines.trained import trained

START = datetime(2024, 6, 1, tzinfo=UTC)
FIVE = timedelta(minutes=5)
ATTENTION = {
    "_target_": "metnet.attention.axial.AxialAttention",
    "_partial_": True,
    "heads": 2,
    "dim_index": 1,
}
MODEL = {
    "_target_": "metnet.model.MetNet",
    "_partial_": True,
    "frames": 2,
    "channels": 8,
    "fine_channels": 4,
    "depth": 1,
    "attention": ATTENTION,
    "grid": [4, 4],
}


def drifting(count):
    """A shower of 3 mm/h that drifts east by two cells a frame, over a dry field with one blind corner."""
    for i in range(count):
        rain = np.zeros((24, 32), np.float32)
        rain[8:16, (2 * i) % 28 : (2 * i) % 28 + 4] = 3.0
        rain[:3, :3] = np.nan
        yield rain


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("cube") / "cube")
    grid = Grid("EPSG:3035", 4e6, 1000.0, 32, 3e6, -1000.0, 24)
    frames = [
        Frame(
            RAINFALL_RATE,
            START + i * FIVE,
            FIVE,
            grid,
            rain,
            "drifting",
            hashlib.sha256(bytes([i])).hexdigest(),
        )
        for i, rain in enumerate(drifting(40))
    ]
    Cube.open_or_create(path, grid, RAINFALL_RATE, START, FIVE).write(frames)
    return path


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Layers this small only wait for each other on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained_on(cube, run, steps, **changed):
    """`metnet train` with numbers small enough for a test."""
    settings = {"lead_times": [5, 10, 15], "crop": 16, "batch_size": 2, "check_every": 3}
    settings |= {
        "prior_steps": 0,
        "validation_samples": 3,
        "leads_per_step": 2,
        "learning_rate": 0.01,
    } | changed
    trainer = {"max_steps": steps}
    return train(
        cube=cube if isinstance(cube, list) else str(cube),
        run=str(run),
        model=construct(MODEL, ("metnet.",)),
        trainer=partial(Trainer, accelerator="cpu", **trainer),
        config={
            "cube": cube if isinstance(cube, list) else str(cube),
            "run": str(run),
            "model": MODEL,
            "trainer": trainer,
            **settings,
        },
        **settings,
    )


@pytest.fixture(scope="module")
def run(cube, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    trained_on(cube, folder, steps=6)
    return folder


def weights_of(run):
    return load_file(run / "model.safetensors")


def a_batch():
    rain = torch.from_numpy(np.stack(list(drifting(2))))[None]
    age, lead_time = torch.tensor([[5.0, 0.0]]), torch.tensor([5.0, 10.0])
    motion = torch.full((1, 2, *rain.shape[2:]), 0.1)
    return Batch(rain, age, torch.tensor([0]), lead_time, torch.tensor([1000.0]), motion)


def test_a_loaded_model_gives_what_the_trained_one_gave_bit_for_bit(cube, tmp_path, monkeypatch):
    made = []

    def remembered(*arguments):
        made.append(Task(*arguments))
        return made[0]

    monkeypatch.setattr("pipelines.train.Task", remembered)
    settings = {"lead_times": [5], "crop": 16, "batch_size": 2, "check_every": 3, "validation": 0.0}
    settings["prior_steps"] = 5
    train(
        str(cube), str(tmp_path), construct(MODEL, ("metnet.",)), partial(Trainer, max_steps=3, accelerator="cpu"),
        config={"model": MODEL}, **settings,
    )  # fmt: skip
    with torch.inference_mode():
        expected = made[0].average(a_batch()).probability
    assert torch.equal(trained(tmp_path)(a_batch()).probability, expected)


def test_training_lowers_the_loss(cube, tmp_path):
    long = trained_on(cube, tmp_path / "long", steps=60, check_every=20)
    assert long.steps == 60
    assert long.validation["val_crps"] < 0.9 * long.validation["val_crps_prior"]


def test_the_card_says_where_the_model_comes_from(cube, run):
    card = json.loads((run / "model.json").read_text())
    assert card["cubes"] == [
        {"path": cube, "snapshot": Cube.open(cube).snapshot, "cell_size": pytest.approx(1000.0)}
    ]
    assert card["sha256"] == hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    assert (card["frames"], card["cadence_minutes"], card["lead_times"]) == (2, [5.0], [5.0, 10.0, 15.0])
    assert card["config"]["model"] == MODEL
    assert card["steps"] == 6
    assert card["validation"]["val_crps"] > 0
    assert len(card["bins"]["edges"]) == 19
    assert card["software"].startswith("metnet-nowcast ")
    forecaster = trained(run)
    assert (forecaster.frames, forecaster.cadences, forecaster.lead_times) == (2, (FIVE,), (5.0, 10.0, 15.0))


def test_a_finished_run_is_left_alone_and_says_so(cube, run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = trained_on(cube, run, steps=6)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert again.before
    assert "nothing to do" in str(again)


@pytest.mark.parametrize("stop_at", [2, 5, 6])
def test_a_killed_run_goes_on_to_the_same_weights(cube, run, tmp_path, monkeypatch, stop_at):
    class Killed(Exception):
        pass

    step = Task.training_step

    def mortal(self, batch):
        if self.global_step == stop_at:
            raise Killed
        return step(self, batch)

    monkeypatch.setattr(Task, "training_step", mortal)
    if stop_at < 6:
        with pytest.raises(Killed):
            trained_on(cube, tmp_path / "run", steps=6)
        assert not (tmp_path / "run" / "model.json").exists()
    monkeypatch.undo()

    after = trained_on(cube, tmp_path / "run", steps=6)

    assert after.steps == 6
    expected = weights_of(run)
    for name, weight in weights_of(tmp_path / "run").items():
        assert torch.equal(weight, expected[name]), name


def test_a_longer_limit_goes_on_with_a_finished_run(cube, tmp_path):
    trained_on(cube, tmp_path, steps=3)
    first = weights_of(tmp_path)
    longer = trained_on(cube, tmp_path, steps=6)
    assert (longer.steps, longer.before) == (6, False)
    assert not torch.equal(first["head.classify.weight"], weights_of(tmp_path)["head.classify.weight"])


def test_a_run_folder_of_another_call_is_refused(cube, run):
    with pytest.raises(ValueError, match=r"learning_rate=0.5 \(it was 0.01\); choose another run folder"):
        trained_on(cube, run, steps=6, learning_rate=0.5)


def test_a_wrong_setting_may_be_put_right_in_the_same_folder(cube, tmp_path):
    with pytest.raises(ValueError, match="batch_size"):
        trained_on(cube, tmp_path / "run", steps=1, batch_size=0)
    assert trained_on(cube, tmp_path / "run", steps=1).steps == 1


def test_a_run_folder_of_another_call_names_only_what_differs(cube, run, monkeypatch):
    monkeypatch.setitem(MODEL, "depth", 2)
    with pytest.raises(ValueError, match=r"other settings: model.depth=2 \(it was 1\); choose"):
        trained_on(cube, run, steps=6)


@pytest.mark.parametrize("key", ["leads_per_step", "check_every"])
def test_counts_below_one_are_refused(cube, tmp_path, key):
    with pytest.raises(ValueError, match=f"{key}=0"):
        trained_on(cube, tmp_path / "run", steps=1, **{key: 0})
    assert not (tmp_path / "run").exists()


def test_ctrl_c_is_ctrl_c_and_not_an_exit_without_a_word(cube, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Task, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained_on(cube, tmp_path / "run", steps=1)


def test_time_ends_a_training_too_and_its_weights_are_kept(cube, tmp_path):
    settings = {"lead_times": [5], "crop": 16, "batch_size": 2, "check_every": 1000}
    result = train(
        str(cube), str(tmp_path), construct(MODEL, ("metnet.",)),
        partial(Trainer, max_steps=-1, max_time="00:00:00:01", accelerator="cpu"),
        config={"model": MODEL}, **settings,
    )  # fmt: skip
    assert 0 < result.steps < 1000
    assert result.seconds == pytest.approx(1, abs=2)
    assert trained(tmp_path).card["steps"] == result.steps
    assert result.validation["val_crps"] > 0


def test_a_training_without_an_end_is_refused(cube, tmp_path):
    with pytest.raises(ValueError, match="never ends"):
        trained_on(cube, tmp_path, steps=-1)


def test_a_short_cube_is_trained_on_without_validation_and_that_is_said(cube, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        result = trained_on(cube, tmp_path, steps=2, validation=0.45, lead_times=[60])
    assert "too few to keep some for validation" in caplog.text
    assert "no validation" in str(result)
    assert trained(tmp_path).card["validation"] is None


def test_nothing_outside_the_wanted_times_is_read(cube, tmp_path, monkeypatch):
    seen = set()

    def watched(self, times, window):
        seen.update(times.tolist())
        return read(self, times, window)

    read = Samples._read
    monkeypatch.setattr(Samples, "_read", watched)
    trained_on(
        cube, tmp_path, steps=30, validation_samples=20, start="2024-06-01T00:25Z", end="2024-06-01T02:00Z"
    )
    assert (min(seen), max(seen)) == (5, 24)


def test_lead_times_off_the_cadence_are_refused(cube, tmp_path):
    with pytest.raises(ValueError, match="7 minutes is no multiple of the cube's cadence, 5 minutes"):
        trained_on(cube, tmp_path, steps=2, lead_times=[7])


def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_step(cube, tmp_path, monkeypatch):
    def broken(self, batch):
        return logits(self, batch) * torch.nan

    logits = MetNet.logits
    monkeypatch.setattr(MetNet, "logits", broken)
    with pytest.raises(ValueError, match=r"the loss is nan at step 0 \(init times 2024-06-01T"):
        trained_on(cube, tmp_path, steps=2)
    assert not (tmp_path / "model.json").exists()


def test_the_learning_rate_rises_then_falls():
    learning = Learning(warm_up=0.1)
    factors = [learning.factor(progress) for progress in np.linspace(0, 1, 101)]
    peak = int(np.argmax(factors))
    assert peak == 10
    assert factors[peak] == pytest.approx(1)
    assert (np.diff(factors[: peak + 1]) >= 0).all() and (np.diff(factors[peak:]) <= 0).all()
    assert 0 < factors[-1] <= factors[0] < 0.02


@pytest.mark.parametrize(
    "target", ["os.system", "torch.load", "metnet.model.torch.load", "metnet.model.math.exp", "metnet.nothing.Here",
               "metnet.rain._quantile", "metnet", 7, None, "metnet.model.MetNet.__init__.__globals__"],
)  # fmt: skip
def test_a_model_file_can_only_make_what_is_in_metnet(target):
    with pytest.raises(ValueError, match="expected a class or function of this software's `metnet`"):
        construct({"_target_": target}, ("metnet.",))


def test_a_nested_foreign_target_is_refused_too(run, tmp_path):
    card = json.loads((run / "model.json").read_text())
    card["config"]["model"]["attention"]["_target_"] = "pathlib.Path.unlink"
    (tmp_path / "model.json").write_text(json.dumps(card))
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"pathlib\.Path\.unlink"):
        trained(tmp_path)


def test_a_written_call_becomes_the_object_it_names():
    bins = construct({"_target_": "metnet.rain.RainBins.linear", "width": 0.5, "count": 4}, ("metnet.",))
    assert bins.edges == (0.5, 1.0, 1.5)
    attention = construct(ATTENTION, ("metnet.",))
    assert isinstance(attention(8), AxialAttention)
    with pytest.raises(ValueError, match="unexpected keyword"):
        construct({"_target_": "metnet.model.MetNet", "chanels": 8}, ("metnet.",))


@pytest.mark.parametrize(
    "damage", ["flipped bit", "no weights", "no card", "not JSON", "other bins", "other width"]
)
def test_a_damaged_run_folder_is_refused(run, tmp_path, damage):
    weights = bytearray((run / "model.safetensors").read_bytes())
    card = json.loads((run / "model.json").read_text())
    says = {
        "flipped bit": "the file is damaged",
        "no weights": "model.safetensors is not",
        "no card": "no model.json there",
        "not JSON": "not JSON",
        "other bins": "its bins are not those",
        "other width": "not the weights of the model",
    }[damage]
    if damage == "flipped bit":
        weights[-5] ^= 1
    if damage == "other bins":
        card["bins"]["top"] = 151.0
    if damage == "other width":
        card["config"]["model"]["channels"] = 16
    if damage != "no card":
        (tmp_path / "model.json").write_text("{" if damage == "not JSON" else json.dumps(card))
    if damage != "no weights":
        (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=says):
        trained(tmp_path)


def test_two_trainings_do_not_share_a_run_folder(cube, tmp_path):
    with FileLock(tmp_path / "train.lock"), pytest.raises(ValueError, match="another training is at work"):
        trained_on(cube, tmp_path, steps=1)
    assert not (tmp_path / "model.json").exists()


def test_a_network_that_diverged_is_never_written(cube, tmp_path, monkeypatch):
    monkeypatch.setattr(Task, "on_validation_epoch_end", lambda self: self.scores.update(val_crps=math.inf))
    with pytest.raises(ValueError, match="it has diverged"):
        trained_on(cube, tmp_path, steps=1)
    assert not (tmp_path / "model.json").exists()


def test_a_training_that_spoils_the_start_gives_the_start_back(cube, tmp_path, caplog):
    spoiled = trained_on(cube, tmp_path, steps=3, learning_rate=1.0).validation
    assert spoiled["val_crps"] == spoiled["val_crps_prior"]
    assert "the untrained network validates better" in caplog.text
    kept = load_file(tmp_path / "model.safetensors")
    assert not kept["head.classify.weight"].any(), "its last layer still says nothing"


def test_the_prior_is_fitted_first_and_kept_for_a_training_that_goes_on(cube, tmp_path):
    plain = trained_on(cube, tmp_path / "plain", steps=1, learning_rate=1e-9).validation
    fitted = trained_on(cube, tmp_path / "fitted", steps=1, learning_rate=1e-9, prior_steps=40).validation
    assert fitted["val_loss"] < plain["val_loss"]
    kept = load_file(tmp_path / "fitted" / "prior.safetensors")
    assert kept["level"].any() and torch.equal(kept["level"], weights_of(tmp_path / "fitted")["prior.level"])
    before = (tmp_path / "fitted" / "prior.safetensors").stat().st_mtime_ns
    trained_on(cube, tmp_path / "fitted", steps=2, learning_rate=1e-9, prior_steps=40)
    assert (tmp_path / "fitted" / "prior.safetensors").stat().st_mtime_ns == before


def test_several_cubes_are_learned_from_and_others_validated_on(cube, tmp_path):
    result = trained_on([cube, cube], tmp_path, steps=2, validation_cubes=[cube, cube])
    card = json.loads((tmp_path / "model.json").read_text())
    assert [each["path"] for each in card["cubes"]] == [cube, cube]
    assert len(card["validation_cubes"]) == 2 and result.validation["val_crps"] > 0
    with pytest.raises(ValueError, match="at least one to learn from"):
        trained_on([], tmp_path / "none", steps=1)


def test_the_kept_weights_follow_the_newest_slowly(cube, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("pipelines.train.Task", lambda *given: made.append(Task(*given)) or made[0])
    trained_on(cube, tmp_path, steps=9, validation=0.0)
    newest, average = (dict(part.named_parameters()) for part in (made[0].network, made[0].average))
    start = construct(MODEL, ("metnet.",))().state_dict()
    moved = {
        name: ((newest[name] - start[name]).norm(), (average[name] - start[name]).norm()) for name in newest
    }
    assert all(weight.requires_grad is False for weight in average.values())
    assert sum(slow < fast for fast, slow in moved.values()) > len(moved) / 2
    assert torch.equal(weights_of(tmp_path)["head.classify.weight"], average["head.classify.weight"])
