import hashlib
import json
import logging
import shutil
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pipelines.train
from metnet.attention.axial import AxialAttention
from metnet.batch import Batch
from metnet.model import MetNet
from metnet.rain import BinnedForecast
from pipelines.construct import construct
from pipelines.cube import Cube
from pipelines.drop_out import DropOut
from pipelines.task import Learning, Task
from pipelines.train import train
from pipelines.trained import CARD, trained
from tests.pipelines.training import (
    ATTENTION,
    FIVE,
    MODEL,
    PUBLISHED,
    START,
    WIDE,
    drifting,
    made_cube,
    made_wide_cube,
    trained_on,
)

pytestmark = pytest.mark.usefixtures("one_thread", "uncalibrated")
CALIBRATED = pipelines.train._calibrated


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    return made_cube(tmp_path_factory.mktemp("cube") / "cube", drifting(40))


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
    settings |= {"prior_samples": 4, "prior_crop": 16, "prior_steps": 5, "local_steps": 5}
    train(
        str(cube), str(tmp_path), construct(MODEL, ("metnet.",)), partial(Trainer, max_steps=3, accelerator="cpu"),
        config={"model": MODEL}, **settings,
    )  # fmt: skip
    with torch.inference_mode():
        expected = made[0].average(a_batch()).probability
    assert torch.equal(trained(tmp_path)(a_batch()).probability, expected)


@pytest.mark.parametrize(
    "advection", [pytest.param(False, id="plain"), pytest.param(True, id="prior", marks=pytest.mark.slow)]
)
def test_training_lowers_the_score_of_the_plain_network_and_of_the_fitted_prior(advection, cube, tmp_path):
    model = {**MODEL, "advection": advection}
    long = trained_on(cube, tmp_path / "long", steps=160, check_every=40, model=model)
    assert long.steps == 160
    assert long.validation["val_crps"] < 0.99 * long.validation["val_crps_prior"]


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


def test_a_network_with_classes_of_its_own_is_opened_again(cube, tmp_path):
    bins = {
        "_target_": "metnet.rain.RainBins",
        "edges": [0.1, 1, 10],
        "top": 100,
    }  # as the command line has it
    trained_on(cube, tmp_path / "run", steps=1, model={**MODEL, "bins": bins})
    assert trained(tmp_path / "run").network.bins.edges == (0.1, 1.0, 10.0)


def test_a_finished_run_is_left_alone_and_says_so(cube, run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = trained_on(cube, run, steps=6)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert again.before
    assert "nothing to do" in str(again)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_finished_run_whose_weights_are_lost_makes_them_again(cube, run, tmp_path, caplog, damage):
    lost = tmp_path / "run"
    shutil.copytree(run, lost)
    damage(lost / "model.safetensors")
    with pytest.raises(ValueError, match="the training's command makes it again"):
        trained(lost)
    assert not trained_on(cube, lost, steps=6).before
    assert "making it again, from the newest checkpoint if any" in caplog.text
    assert (lost / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stop_at", [2, 5, 6])
def test_a_killed_run_goes_on_to_the_same_weights(cube, run, tmp_path, monkeypatch, stop_at):
    class Killed(Exception):
        pass

    step = Task.training_step

    def mortal(self, batch, batch_idx):
        if self.global_step == stop_at:
            raise Killed
        return step(self, batch, batch_idx)

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


def test_a_killed_run_goes_on_with_the_frames_it_began_with(cube, run, tmp_path, monkeypatch, caplog):
    """More may have come since, and would be other samples, and scores of others."""
    grows = str(shutil.copytree(cube, tmp_path / "cube"))
    step = Task.training_step

    def stopped(self, batch, batch_idx):
        if self.global_step == 5:
            raise TimeoutError
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Task, "training_step", stopped)
    with pytest.raises(TimeoutError):
        trained_on(grows, tmp_path / "run", steps=6)
    monkeypatch.undo()
    began_with = Cube.open(grows).snapshot
    made_cube(grows, drifting(60))
    assert Cube.open(grows).snapshot != began_with

    trained_on(grows, tmp_path / "run", steps=6)
    expected = weights_of(run)
    for name, weight in weights_of(tmp_path / "run").items():
        assert torch.equal(weight, expected[name]), name
    card = json.loads((tmp_path / "run" / "model.json").read_text())
    assert [told["snapshot"] for told in card["cubes"]] == [began_with]
    assert "since it was learned from" not in caplog.text
    assert trained_on(grows, tmp_path / "run", steps=6).before
    assert f"{grows} has changed since it was learned from; to learn" in caplog.text


def test_where_the_frames_it_began_with_are_gone_it_goes_on_with_a_warning(cube, tmp_path, caplog):
    trained_on(cube, tmp_path, steps=3)
    began = json.loads((tmp_path / "config.json").read_text())
    began["cube_snapshots"] = {cube: "ZZZZZZZZZZZZZZZZZZZ0"}
    (tmp_path / "config.json").write_text(json.dumps(began))
    assert trained_on(cube, tmp_path, steps=6).steps == 6
    assert f"{cube} has changed since this training began, and what it was is gone" in caplog.text


def test_what_only_an_unfinished_checkpoint_is_left_of_may_be_begun_anew(cube, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "unfinished.ckpt").write_bytes(b"half of it")
    (tmp_path / "config.json").write_text(json.dumps({"config": {"learning_rate": 7}, "cube_snapshots": {}}))
    assert trained_on(cube, tmp_path, steps=2).steps == 2


def test_a_radar_that_is_dead_at_the_end_is_not_validated_on_and_named(tmp_path, caplog):
    fields = [rain if i < 24 else np.full_like(rain, np.nan) for i, rain in enumerate(drifting(36))]
    dead = made_cube(tmp_path / "dead", fields)
    with caplog.at_level("WARNING"):
        assert trained_on(dead, tmp_path / "run", steps=2).validation == {}
    assert f"{dead} is not validated on: nothing was observed" in caplog.text
    blind = made_cube(tmp_path / "blind", [np.full_like(rain, np.nan) for rain in drifting(36)])
    with pytest.raises(
        ValueError, match=r"blind: nothing was observed at any of the \d+ init times to learn"
    ):
        trained_on([dead, blind], tmp_path / "both", steps=2)


def test_the_card_tells_the_lead_times_that_were_learned(tmp_path, caplog):
    short = [made_cube(tmp_path / name, drifting(12)) for name in "ab"]
    with caplog.at_level("INFO"):
        trained_on(short, tmp_path / "run", steps=2, lead_times=[5, 10, 60])
    assert json.loads((tmp_path / "run" / "model.json").read_text())["lead_times"] == [5.0, 10.0]
    assert "no cube is of a cadence, and long enough, to learn from at lead times of 60 min" in caplog.text


def test_a_longer_limit_goes_on_with_a_finished_run(cube, tmp_path):
    trained_on(cube, tmp_path, steps=3)
    first = weights_of(tmp_path)
    longer = trained_on(cube, tmp_path, steps=6)
    assert (longer.steps, longer.before) == (6, False)
    assert not torch.equal(first["head.classify.weight"], weights_of(tmp_path)["head.classify.weight"])


def test_a_limit_below_what_was_learned_takes_nothing_back_and_says_so(cube, run, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "run")
    assert trained_on(cube, tmp_path / "run", steps=2).steps == 6
    assert f"trainer.max_steps=2: {tmp_path / 'run'} has learned for 6 steps already" in caplog.text
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_a_run_folder_of_another_call_is_refused(cube, run):
    with pytest.raises(ValueError, match=r"learning_rate=0.5 \(it was 0.01\); choose another run folder"):
        trained_on(cube, run, steps=6, learning_rate=0.5)


@pytest.mark.parametrize("card", [True, False], ids=["finished", "cut off"])
def test_a_run_of_software_that_computes_otherwise_does_not_go_on(cube, run, tmp_path, card):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "model.json").unlink() if not card else None
    begun = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**begun, "forward": 0}))
    with pytest.raises(
        ValueError, match=r"config\.json: expected forward=\d+, got 0: .* into another folder"
    ):
        trained_on(cube, tmp_path / "run", steps=6)


def test_a_wrong_setting_may_be_put_right_in_the_same_folder(cube, tmp_path):
    with pytest.raises(ValueError, match="batch_size"):
        trained_on(cube, tmp_path / "run", steps=1, batch_size=0)
    assert trained_on(cube, tmp_path / "run", steps=1).steps == 1


def test_with_another_number_of_workers_a_run_goes_on(cube, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    assert trained_on(cube, tmp_path / "run", steps=6, workers=1).before


def test_a_run_folder_of_another_call_tells_long_settings_in_short(cube, run):
    leads = [5.0 * step for step in range(1, 60)]
    with pytest.raises(ValueError, match=r"lead_times=\[5.0, 10.0, [^(]*\.\.\. \(it was") as told:
        trained_on(cube, run, steps=6, lead_times=leads)
    assert len(str(told.value)) < 400


def test_a_run_folder_of_another_call_names_only_what_differs(cube, run, monkeypatch):
    monkeypatch.setitem(MODEL, "depth", 2)
    with pytest.raises(ValueError, match=r"other settings: model.depth=2 \(it was 1\); choose"):
        trained_on(cube, run, steps=6)


def test_a_prior_that_was_fitted_with_other_settings_is_not_taken_over(cube, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.train._fit", None)  # stopped before its first step
    place = tmp_path / "run" / "prior.safetensors"
    with pytest.raises(TypeError):
        trained_on(cube, tmp_path / "run", steps=1, prior_steps=4)
    first = place.read_bytes()
    with pytest.raises(TypeError):
        trained_on(cube, tmp_path / "run", steps=1, prior_steps=4)
    assert place.read_bytes() == first
    with pytest.raises(TypeError):
        trained_on(cube, tmp_path / "run", steps=1, prior_steps=9)
    second = place.read_bytes()
    assert second != first
    monkeypatch.setattr("pipelines.run_folder.rank_zero_only.rank", 1, raising=False)
    with pytest.raises(TypeError):
        trained_on(cube, tmp_path / "run", steps=1, prior_steps=4)
    assert place.read_bytes() == first, "a process that comes before the first one sees it too"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, 0) for key in ("leads_per_step", "check_every", "batch_size")),
        *(
            (key, -1)
            for key in ("crop", "workers", "validation_samples", "prior_steps", "local_steps", "seed")
        ),
        *(("learning_rate", rate) for rate in (0.0, -1.0, float("nan"), float("inf"))),
        *(("importance", steps) for steps in ([[5]], [[5, 2, 3]], [[5, 2], [5, 3]])),
        ("start", "2030-01-01"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name_before_any_work(cube, tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"^{key}=.*: (expected|nothing of)"):
        trained_on(cube, tmp_path / "run", steps=1, **{key: value})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("precision", name) for name in ("16-mixed", "16-true", "bf16-true", "64-true", "8", "half")),
        ("log_every_n_steps", -1),
        *((key, 2) for key in ("devices", "num_nodes")),
        *(("accumulate_grad_batches", count) for count in (0, -2)),
        *(("gradient_clip_val", norm) for norm in (-1.0, float("nan"))),
    ],
)
def test_what_lightning_would_take_and_get_wrong_is_refused(cube, tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"^trainer\.{key}={value}: expected"):
        trained_on(cube, tmp_path / "run", steps=1, trainer={key: value})
    assert not (tmp_path / "run").exists(), "before any work"


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("strategy", "ddp", "choose strategy=ddp or fsdp"),
        ("max_epochs", 3, "leave it out"),
        ("val_check_interval", 1, "leave it out"),
    ],
)
def test_what_a_training_sets_by_itself_is_refused_and_not_silently_replaced(
    cube, tmp_path, key, value, instead
):
    with pytest.raises(ValueError, match=rf"^trainer\.{key}={value}: expected no such key.*; {instead}"):
        trained_on(cube, tmp_path / "run", steps=1, trainer={key: value})


@pytest.mark.parametrize("shares", [2, 8])
def test_weights_shared_out_among_other_processes_than_there_are_are_refused_before_any_work(
    cube, tmp_path, shares
):
    strategy = ModelParallelStrategy(shares, 1, save_distributed_checkpoint=False)
    with pytest.raises(ValueError, match=rf"^strategy\.data_parallel_size={shares}: expected 1, as many"):
        trained_on(cube, tmp_path / "run", steps=1, strategy=strategy)
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_is_refused_by_what_to_take(cube, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for accelerator in ("cuda", "tpus"):
        with pytest.raises(ValueError, match=rf"^trainer\.accelerator={accelerator}: .*such as cpu, or auto"):
            trained_on(cube, tmp_path / "run", steps=1, trainer={"accelerator": accelerator})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_16_bits_of_little_range_are_refused_by_what_to_take_wherever_they_are_asked_for(
    cube, tmp_path, accelerator
):
    with pytest.raises(ValueError, match=r"^trainer\.precision=16-mixed: .*take bf16-mixed"):
        trained_on(cube, tmp_path, steps=1, trainer={"accelerator": accelerator, "precision": "16-mixed"})


@pytest.mark.parametrize(
    ("instructions", "precision"), [({"avx2"}, "32-true"), ({"avx512_bf16"}, "bf16-mixed")]
)
def test_the_quicker_precision_is_the_one_that_the_processor_has_instructions_for(
    cube, tmp_path, monkeypatch, caplog, instructions, precision
):
    has = {name: name in instructions for name in ("avx2", "avx512_bf16", "amx_bf16")}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**has, "architecture": "x86_64"})
    trained_on(cube, tmp_path / "run", steps=1, trainer={"accelerator": "cpu", "precision": "auto"})
    assert json.loads((tmp_path / "run" / CARD).read_text())["config"]["trainer"]["precision"] == precision
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, precision == "32-true"))
    on_another_machine = {"accelerator": "cpu", "precision": "auto"}
    trained_on(cube, tmp_path / "run", steps=2, trainer=on_another_machine)
    assert json.loads((tmp_path / "run" / CARD).read_text())["config"]["trainer"]["precision"] == precision
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**has, "architecture": "x86_64"})
    caplog.clear()
    trained_on(cube, tmp_path / "asked", steps=1, trainer={"accelerator": "cpu", "precision": "bf16-mixed"})
    slow = "trainer.precision=bf16-mixed: this machine has no known instructions for bfloat16"
    assert (slow in caplog.text) == (precision == "32-true")


def test_several_processes_want_a_strategy_and_the_refusal_names_it(cube, tmp_path):
    with pytest.raises(ValueError, match=r"devices=2: expected 1 with strategy=alone; .* strategy=ddp"):
        trained_on(cube, tmp_path, steps=1, trainer={"devices": 2})


def test_that_nothing_is_validated_without_samples_is_said(cube, tmp_path, caplog, monkeypatch):
    kept = []
    monkeypatch.setattr("pipelines.train._calibrated", lambda network, validation: kept.append(validation))
    with caplog.at_level(logging.WARNING):
        result = trained_on(cube, tmp_path, steps=1, validation_samples=0)
    assert "validation_samples=0: nothing is validated" in caplog.text
    assert not result.validation and kept == [[]]
    caplog.clear()
    trained_on(cube, tmp_path / "none", steps=1, validation_samples=0, validation=0.0)
    assert "nothing is validated" not in caplog.text, "as it was asked for"


def test_a_file_is_no_run_folder(cube, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match=r"run=.*: is a file; expected a folder"):
        trained_on(cube, tmp_path / "run", steps=1)


def test_ctrl_c_is_ctrl_c_and_not_an_exit_without_a_word(cube, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Task, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained_on(cube, tmp_path / "run", steps=1)


def test_time_ends_a_training_too_and_its_weights_are_kept(cube, tmp_path):
    settings = {"lead_times": [5], "crop": 16, "batch_size": 2, "check_every": 1000}
    settings |= {"prior_steps": 0, "validation_samples": 3, "pictures": False}
    result = train(
        str(cube), str(tmp_path), construct(MODEL, ("metnet.",)),
        partial(Trainer, max_steps=-1, max_time="00:00:00:01", accelerator="cpu"),
        config={"model": MODEL}, **settings,
    )  # fmt: skip
    assert 0 < result.steps < 1000
    assert result.seconds >= 1
    assert trained(tmp_path).card["steps"] == result.steps
    assert result.validation["val_crps"] > 0


def test_a_training_without_an_end_is_refused(cube, tmp_path):
    with pytest.raises(ValueError, match="never ends"):
        trained_on(cube, tmp_path, steps=-1)


@pytest.mark.parametrize("time", ["20s", 5, "00:00"])
def test_a_time_that_is_none_is_refused_by_its_key(cube, tmp_path, time):
    with pytest.raises(
        ValueError, match=rf"^trainer\.max_time={time}: expected days:hours:minutes:seconds, such as"
    ):
        trained_on(cube, tmp_path, steps=-1, trainer={"max_time": time})


def test_a_short_cube_is_trained_on_without_validation_and_that_is_said(cube, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        result = trained_on(cube, tmp_path, steps=2, validation=0.45, lead_times=[60])
    assert "too few to keep 0.45 of them for validation" in caplog.text
    assert "no validation" in str(result)
    assert trained(tmp_path).card["validation"] is None


def test_nothing_outside_the_wanted_times_is_learned_from_or_validated_on(cube, tmp_path, monkeypatch):
    seen = []

    def watched(name):
        whole = getattr(Task, name)

        def step(self, batch, *place):
            init = batch.init_time.double()[:, None] / 60
            seen.append(torch.cat([init - batch.age, init + batch.lead_time], dim=1))
            return whole(self, batch, *place)

        monkeypatch.setattr(Task, name, step)

    watched("training_step")
    watched("validation_step")
    trained_on(
        cube,
        tmp_path,
        steps=20,
        check_every=20,
        validation_samples=20,
        start="2024-06-01T00:25Z",
        end="2024-06-01T02:00Z",
    )
    steps = (torch.cat(seen) - START.timestamp() / 60) / 5
    assert (steps.min(), steps.max()) == (5, 24)


def test_steps_that_may_not_fit_into_memory_are_told(cube, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("pipelines.train.MANY_CELLS", 500)
    trained_on(cube, tmp_path, steps=1)
    assert "of which a million want some 15 GiB of memory" in caplog.text


def test_lead_times_off_the_cadence_are_refused(cube, tmp_path):
    with pytest.raises(ValueError, match="7 minutes is no multiple of the cube's cadence, 5 minutes"):
        trained_on(cube, tmp_path, steps=2, lead_times=[7])


def test_lead_times_without_a_plane_are_refused_before_any_work(cube, tmp_path):
    planes = {"_target_": "metnet.lead_time.LeadTimePlanes", "step": 10.0, "count": 3}
    with pytest.raises(ValueError, match="5 min: the network's planes stand for 10 to 30 min"):
        trained_on(cube, tmp_path, steps=2, model={**MODEL, "lead_time": planes})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", PUBLISHED)
def test_samples_and_lead_times_that_a_published_network_was_not_made_for_are_refused_before_any_work(
    name, tmp_path
):
    wide, model = made_wide_cube(tmp_path / "wide", 72), PUBLISHED[name]
    with pytest.raises(ValueError, match=r"^crop=32: samples of .* have 32 x 32 cells, .*; expected crop=64"):
        trained_on(wide, tmp_path / "run", steps=1, model=model, **{**WIDE, "crop": 32})
    with pytest.raises(ValueError, match=r"^lead times? 20 min: .* to 15 min"):
        trained_on(wide, tmp_path / "run", steps=1, model=model, lead_times=[5, 20], **WIDE)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_step(cube, tmp_path, monkeypatch):
    def broken(self, batch):
        return logits(self, batch) * torch.nan

    logits = MetNet.logits
    monkeypatch.setattr(MetNet, "logits", broken)
    with pytest.raises(
        ValueError, match=rf"step 0: the loss is nan \(cube {cube}, init time 2024-06-01T\d\d:\d\dZ, rows \d"
    ):
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
        "other width": "not the weights that this",
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
    monkeypatch.setattr(BinnedForecast, "crps", lambda self, observed: observed * torch.nan)
    with pytest.raises(ValueError, match="it has diverged"):
        trained_on(cube, tmp_path, steps=1)
    assert not (tmp_path / "model.json").exists()


def test_a_training_that_spoils_the_start_gives_the_start_back(cube, tmp_path, caplog):
    spoiled = trained_on(cube, tmp_path, steps=3, learning_rate=1.0).validation
    assert spoiled["val_crps"] == spoiled["val_crps_prior"]
    assert "the network as it began validates better" in caplog.text
    kept = load_file(tmp_path / "model.safetensors")
    assert not kept["head.classify.weight"].any(), "its last layer still says nothing"


def test_the_prior_is_fitted_first_and_kept_for_a_training_that_goes_on(cube, tmp_path):
    plain = trained_on(cube, tmp_path / "plain", steps=1, learning_rate=1e-9).validation
    fitted = trained_on(cube, tmp_path / "fitted", steps=1, learning_rate=1e-9, prior_steps=40).validation
    assert fitted["val_loss"] < plain["val_loss"]
    kept = load_file(tmp_path / "fitted" / "prior.safetensors")
    assert kept["level"].any() and torch.equal(kept["level"], weights_of(tmp_path / "fitted")["prior.level"])
    save_file(kept, tmp_path / "fitted" / "prior.safetensors")  # what it was fitted for, nobody asks
    before = (tmp_path / "fitted" / "prior.safetensors").stat().st_mtime_ns
    trained_on(cube, tmp_path / "fitted", steps=2, learning_rate=1e-9, prior_steps=40)
    assert (tmp_path / "fitted" / "prior.safetensors").stat().st_mtime_ns == before


def local_of(run):
    """What is local, as it was fitted."""
    return load_file(run / "local.safetensors")


def test_the_prior_is_fitted_on_samples_of_a_side_of_their_own(cube, tmp_path, monkeypatch):
    seen, pixels = set(), MetNet.pixels

    def remembered(network, batch, *others):
        seen.add(tuple(batch.radar.shape[2:]))
        return pixels(network, batch, *others)

    monkeypatch.setattr(MetNet, "pixels", remembered)
    trained_on(cube, tmp_path, steps=1, prior_steps=1, prior_crop=20)
    assert seen == {(20, 20)}


def test_what_is_local_is_fitted_after_the_prior_and_kept_for_a_training_that_goes_on(cube, tmp_path):
    start = {"learning_rate": 1e-9, "prior_steps": 5}
    without = trained_on(cube, tmp_path / "without", steps=1, local_steps=0, **start).validation
    with_it = trained_on(cube, tmp_path / "with", steps=1, local_steps=150, **start).validation
    assert with_it["val_loss"] < without["val_loss"]
    assert not local_of(tmp_path / "without")["last.weight"].any()
    priors = [load_file(tmp_path / name / "prior.safetensors")["level"] for name in ("with", "without")]
    assert torch.equal(*priors), "what the prior learns does not hang on it"
    kept = local_of(tmp_path / "with")
    trained_weights = weights_of(tmp_path / "with")
    for name, weight in kept.items():
        torch.testing.assert_close(trained_weights[f"local.{name}"], weight, atol=1e-6, rtol=0)
    assert kept["last.weight"].any()
    place = tmp_path / "with" / "local.safetensors"
    before = place.stat().st_mtime_ns
    trained_on(cube, tmp_path / "with", steps=2, local_steps=150, **start)
    assert place.stat().st_mtime_ns == before


def test_what_is_local_is_loaded_by_a_training_that_was_stopped_before_its_first_step(
    cube, tmp_path, monkeypatch
):
    monkeypatch.setattr("pipelines.train._fit", None)
    with pytest.raises(TypeError):
        trained_on(cube, tmp_path, steps=1, prior_steps=3, local_steps=3, learning_rate=1e-9)
    monkeypatch.undo()
    kept = local_of(tmp_path)
    monkeypatch.setattr("pipelines.beginning._fit_on_pixels", None)
    trained_on(cube, tmp_path, steps=1, prior_steps=3, local_steps=3, learning_rate=1e-9)
    assert torch.equal(local_of(tmp_path)["first.weight"], kept["first.weight"])
    weights = weights_of(tmp_path)
    torch.testing.assert_close(weights["local.first.weight"], kept["first.weight"], atol=1e-6, rtol=0)
    assert torch.equal(weights["local.spread"], kept["spread"])


def test_what_is_local_is_fitted_anew_where_half_of_the_start_is_missing(cube, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.train._fit", None)  # stopped before its first step
    with pytest.raises(TypeError):
        trained_on(cube, tmp_path, steps=1, prior_steps=3, local_steps=3)
    prior, local = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("prior", "local"))
    (tmp_path / "local.safetensors").unlink()
    with pytest.raises(TypeError):
        trained_on(cube, tmp_path, steps=1, prior_steps=3, local_steps=3)
    assert (tmp_path / "prior.safetensors").read_bytes() == prior
    assert (tmp_path / "local.safetensors").read_bytes() == local, "to the same weights"


def test_what_is_local_is_left_out_where_it_makes_the_validation_worse(cube, tmp_path, monkeypatch, caplog):
    def spoil(self, *_, **__):
        torch.nn.init.constant_(self.last.bias, 3.0)  # wide open, at twenty times the rate
        self.centre.fill_(1.0)

    monkeypatch.setattr("metnet.local.Local.fit", spoil)
    trained_on(cube, tmp_path, steps=1, prior_steps=3, learning_rate=1e-9)
    assert "what is local makes the validation worse by" in caplog.text
    kept = local_of(tmp_path)
    assert kept["last.bias"].max() <= 0 and not kept["last.weight"].any() and not kept["centre"].any()


def test_a_killed_run_goes_on_to_the_same_weights_from_what_was_fitted(cube, tmp_path, monkeypatch):
    step, fitted = Task.training_step, {"prior_steps": 3, "local_steps": 3, "validation": 0}

    def mortal(self, batch, batch_idx):
        if self.global_step == 4:
            raise TypeError
        return step(self, batch, batch_idx)

    trained_on(cube, tmp_path / "whole", steps=5, **fitted)
    monkeypatch.setattr(Task, "training_step", mortal)
    with pytest.raises(TypeError):
        trained_on(cube, tmp_path / "killed", steps=5, **fitted)
    monkeypatch.undo()
    trained_on(cube, tmp_path / "killed", steps=5, **fitted)
    whole, killed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert not torch.equal(whole["local.last.weight"], local_of(tmp_path / "whole")["last.weight"])
    assert all(torch.equal(weight, whole[name]) for name, weight in killed.items())


def test_without_validation_what_is_local_is_kept_as_fitted(cube, tmp_path, caplog):
    trained_on(cube, tmp_path, steps=1, prior_steps=3, local_steps=3, validation=0.0)
    assert local_of(tmp_path)["last.weight"].any()
    assert caplog.text == ""


def test_a_training_begins_with_the_weights_of_a_finished_run_and_fits_no_prior(
    cube, run, tmp_path, monkeypatch
):
    monkeypatch.setattr("pipelines.beginning._fit_on_pixels", None)  # would fail if it were called
    begun = trained_on(cube, tmp_path, steps=1, learning_rate=1e-9, prior_steps=5, weights=str(run))
    before, after = weights_of(run), weights_of(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    card = json.loads((run / "model.json").read_text())
    assert begun.validation["val_crps_prior"] == pytest.approx(card["validation"]["val_crps"], rel=1e-4)
    told = json.loads((tmp_path / "model.json").read_text())["weights"]
    assert told == {
        "sha256": card["sha256"],
        **{key: card[key] for key in ("cubes", "validation_cubes", "weights")},
    }
    kept = load_file(tmp_path / "prior.safetensors")
    assert all(torch.equal(kept[name], before[f"prior.{name}"]) for name in kept)


def test_a_killed_training_that_began_with_weights_goes_on_to_the_same(cube, run, tmp_path, monkeypatch):
    step = Task.training_step

    def mortal(self, batch, batch_idx):
        if self.global_step == 4:
            raise TypeError
        return step(self, batch, batch_idx)

    gone = shutil.copytree(run, tmp_path / "gone")
    deep = {**MODEL, "stochastic_depth": 0.5}  # random in training, and no other network than that of the run
    trained_on(cube, tmp_path / "whole", steps=5, model=deep, weights=str(run))
    monkeypatch.setattr(Task, "training_step", mortal)
    with pytest.raises(TypeError):
        trained_on(cube, tmp_path / "killed", steps=5, model=deep, weights=str(gone))
    monkeypatch.undo()
    prior = (tmp_path / "killed" / "prior.safetensors").read_bytes()
    shutil.rmtree(gone)
    trained_on(cube, tmp_path / "killed", steps=5, model=deep, weights=str(gone))
    assert (tmp_path / "killed" / "prior.safetensors").read_bytes() == prior
    cards = [json.loads((tmp_path / name / "model.json").read_text()) for name in ("whole", "killed")]
    assert cards[0]["weights"] == cards[1]["weights"]
    whole, killed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert all(torch.equal(weight, whole[name]) for name, weight in killed.items())


def test_weights_tell_all_that_they_ever_learned_from_and_warn_of_validating_on_it(
    cube, run, tmp_path, caplog
):
    trained_on(cube, tmp_path / "next", steps=1, weights=str(run))
    assert "may have learned from what is validated on" in caplog.text
    trained_on(cube, tmp_path / "last", steps=1, weights=str(tmp_path / "next"))
    first, last = (json.loads((each / "model.json").read_text()) for each in (run, tmp_path / "last"))
    assert last["weights"]["weights"]["sha256"] == first["sha256"]


@pytest.mark.parametrize(
    ("weights", "model", "said"),
    [
        ("nowhere", MODEL, "weights=nowhere: no model.json"),
        (
            "run",
            {**MODEL, "channels": 16},
            r"expected the network that model= .* model.channels=16 \(there 8\)",
        ),
        ("run", {**MODEL, "local": 0}, r"model.local=0 \(there None\)"),
        ("run", PUBLISHED["metnet1"], "expected a MetNet1, as model= describes, got a MetNet"),
    ],
)
def test_weights_of_nothing_or_of_another_network_are_refused(cube, run, tmp_path, weights, model, said):
    with pytest.raises(ValueError, match=said):
        trained_on(cube, tmp_path / "new", 1, model=model, weights=str(run) if weights == "run" else weights)
    assert not (tmp_path / "new").exists()


def test_several_cubes_are_learned_from_and_others_validated_on(cube, tmp_path):
    later = [made_cube(tmp_path / f"later{day}", drifting(12), START + timedelta(days=day)) for day in (1, 2)]
    result = trained_on([cube, cube], tmp_path, steps=2, validation_cubes=later)
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


def test_the_card_holds_a_calibration_and_every_score_by_lead_time(cube, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.train._calibrated", CALIBRATED)
    trained_on(cube, tmp_path, steps=3, importance=[[1, 2.0], [5, 3.0]])
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["importance"] == [1.0] * 6 + [2.0] * 5 + [3.0] * 9
    assert card["calibration"]["cost"]["before"] > 0
    assert card["loss"] == "cross_entropy"
    scores = card["scores"]
    assert scores["lead_times"] == [5.0, 10.0, 15.0]
    assert set(scores["forecasters"]) == {"forecast", "before training", "persistence", "extrapolation"}
    for row in scores["forecasters"].values():
        assert set(row) == {"crps", "brier_0.1", "brier_1", "csi_1", "reliability_1"}
        assert all(len(values) == 3 for values in row.values())
    assert trained(tmp_path).calibration is not None


def test_a_network_that_is_not_calibrated_is_named(caplog):
    assert CALIBRATED(torch.nn.Identity(), [None]) is None
    assert "not calibrated" in caplog.text and "Identity" in caplog.text


def test_what_a_training_says_of_itself_is_in_csv_tensorboard_pictures_and_one_file_of_scores(cube, tmp_path):
    trained_on(cube, tmp_path, steps=12, check_every=6, pictures=True, trainer={"log_every_n_steps": 1})
    [table] = (tmp_path / "logs").rglob("metrics.csv")
    columns = table.read_text().splitlines()[0].split(",")
    assert {"train_loss", "samples_per_second", "seconds_left", "val_crps", "crps/forecast"} <= set(columns)
    assert {"csi_1/persistence", "brier_1/extrapolation", "reliability_1/before training"} <= set(columns)
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == ["step-00000000.png", "step-00000006.png", "step-00000012.png"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(events.Images("validation sample")) == 3
    assert len(events.Scalars("train_loss")) == 12
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["forecaster"] == "forecast"] == [0, 6, 12]


def test_drop_out_is_for_training_samples_only(cube, tmp_path, monkeypatch):
    seen = {"training_step": [], "validation_step": []}
    for name, shares in seen.items():
        whole = getattr(Task, name)

        def step(self, batch, *place, whole=whole, shares=shares):
            shares.append(batch.radar.isnan().all(dim=(2, 3)).double().mean().item())
            return whole(self, batch, *place)

        monkeypatch.setattr(Task, name, step)
    trained_on(cube, tmp_path, steps=6, drop_out=DropOut(frames=0.5))
    assert sum(seen["training_step"]) > 0
    assert sum(seen["validation_step"]) == 0


def test_the_same_event_twice_is_not_validated_on(cube, tmp_path):
    with pytest.raises(ValueError, match="hold the same rain"):
        trained_on(cube, tmp_path, steps=1, validation_cubes=[cube])
