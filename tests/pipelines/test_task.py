import json
import logging
from functools import partial
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from metnet.loss import cross_entropy, crps, ordinal
from metnet.model import MetNet
from metnet.rain import RainBins
from pipelines.task import Habits, Importance, Numbers, Task
from tests.pipelines.training import (
    MODEL,
    PUBLISHED,
    WIDE,
    elsewhere,
    made_cube,
    made_wide_cube,
    patchy,
    trained_on,
)

pytestmark = pytest.mark.usefixtures("one_thread", "uncalibrated")
STEPS = 4
BINS = RainBins((1.0, 5.0, 20.0), 60.0)


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    """Samples of it differ much in how many pixels were observed."""
    return made_cube(tmp_path_factory.mktemp("cube") / "cube", patchy(40))


def weights_of(run):
    return load_file(run / "model.safetensors")


def losses_of(run):
    """The loss of each step, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [event.value for event in events.Scalars("train_loss")]


def farthest(some, others):
    """The largest difference of two sets of weights."""
    return max((some[name] - others[name]).abs().max().item() for name in some)


@pytest.fixture(scope="module")
def joined(cube, tmp_path_factory):
    """One process, four samples a step; every step is logged."""
    run = tmp_path_factory.mktemp("joined")
    trained_on(cube, run, STEPS, trainer={"log_every_n_steps": 1}, batch_size=4, validation=0.0)
    return run


@pytest.fixture(scope="module")
def processes_elsewhere():
    with elsewhere() as trainings:
        yield trainings


def test_gradients_added_up_over_micro_batches_are_those_of_one_large_batch(cube, joined, tmp_path):
    trained_on(
        cube, tmp_path, STEPS, trainer={"accumulate_grad_batches": 2, "log_every_n_steps": 1}, validation=0.0
    )
    assert losses_of(tmp_path) == pytest.approx(losses_of(joined), rel=1e-5)
    assert farthest(weights_of(tmp_path), weights_of(joined)) < 1e-5


def test_what_is_kept_holds_the_statistics_of_a_batch_norm_too(cube, tmp_path):
    attention = {"_target_": "metnet.attention.external.ExternalAttention", "_partial_": True}
    model = {**MODEL, "depth": 1, "attention": attention}
    trained_on(cube, tmp_path, STEPS, model=model, validation=0.0)
    kept = weights_of(tmp_path)
    statistics = {name.rpartition(".")[2]: value for name, value in kept.items() if "running_" in name}
    assert (statistics["running_mean"] != 0).all() and (statistics["running_var"] != 1).all()
    assert {int(value) for name, value in kept.items() if "num_batches" in name} == {STEPS}


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_the_joined_batch(
    cube, joined, tmp_path, processes_elsewhere
):
    logged = {"log_every_n_steps": 1}
    codes = processes_elsewhere.together(cube, tmp_path, STEPS, 2, trainer=logged, validation=0.0)
    assert codes == [0, 0]
    assert losses_of(tmp_path) == pytest.approx(losses_of(joined), rel=1e-5)
    assert farthest(weights_of(tmp_path), weights_of(joined)) < 1e-5


@pytest.mark.slow
def test_two_processes_that_share_the_weights_of_a_reversible_network_learn_the_same(
    cube, tmp_path, processes_elsewhere
):
    trunk = "metnet.attention.image_transformer.AxialImageTransformer"
    model = {
        **MODEL,
        "trunk": {"_target_": trunk, "_partial_": True, "depth": 2, "heads": 2},
        "head": {"_target_": "metnet.head.Ordinal"},
    }
    few = {"validation_samples": 1}  # of which the second process would have none, and the first wait for it
    trained_on(cube, tmp_path / "one", STEPS, model=model, batch_size=4, **few)
    codes = processes_elsewhere.together(cube, tmp_path / "two", STEPS, 2, copies=False, model=model, **few)
    assert codes == [0, 0]
    assert farthest(weights_of(tmp_path / "one"), weights_of(tmp_path / "two")) < 1e-4
    one, two = (json.loads((tmp_path / name / "model.json").read_text()) for name in ("one", "two"))
    assert two["validation"] == pytest.approx(one["validation"], rel=1e-4)


def test_processes_share_out_the_samples_of_every_step():
    alone = Numbers(24, 6)
    two = [Numbers(24, 3, process, 2) for process in (0, 1)]
    assert [alone[place] for place in range(12)] == list(range(24, 36))
    for step in range(3):
        parts = [set(each[3 * step : 3 * step + 3]) for each in two]
        assert not parts[0] & parts[1]
        assert parts[0] | parts[1] == set(alone[6 * step : 6 * step + 6])
    assert len(alone) > 2**60


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")  # of torch about itself
def test_a_compiled_network_learns_the_same(cube, joined, tmp_path, monkeypatch):
    compiled, compile_it = [], MetNet.compile

    def without_kernels(network, **given):
        compiled.append(network)
        return compile_it(network, backend="aot_eager", **given)

    monkeypatch.setattr("pipelines.task.MetNet.compile", without_kernels)
    trained_on(cube, tmp_path, STEPS, compile=True, batch_size=4, validation=0.0)
    assert len(compiled) == 1
    assert farthest(weights_of(tmp_path), weights_of(joined)) < 1e-5


def test_the_loss_goes_with_the_head(cube, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("pipelines.train.Habits", lambda *given: seen.append(given[2]) or Habits(*given))
    head = {"_target_": "metnet.head.Ordinal"}
    trained_on(cube, tmp_path / "a", 1, validation=0.0)
    trained_on(cube, tmp_path / "b", 1, validation=0.0, model={**MODEL, "head": head})
    trained_on(cube, tmp_path / "c", 1, validation=0.0, loss=crps)
    assert seen == [cross_entropy, ordinal, crps]


def test_importance_counts_pixels_as_often_as_it_says():
    importance = Importance(BINS, ((5.0, 2.0), (20.0, 4.0)))
    assert importance.of_classes() == [1, 1, 2, 4]
    target = torch.tensor([0.0, 4.9, 5.0, 30.0, torch.nan]).reshape(1, 1, 1, 5)
    assert importance.of(target).flatten().tolist() == [1, 1, 2, 4, 0]


@pytest.mark.parametrize("loss", [cross_entropy, ordinal, crps])
def test_a_network_that_learns_from_weighted_pixels_says_the_true_shares(loss):
    importance = Importance(BINS, ((5.0, 2.0), (20.0, 4.0)))
    share = torch.tensor([0.7, 0.2, 0.07, 0.03])
    knots = (1.0, 5.0, 20.0, 60.0)
    wet = [
        low + (high - low) * (torch.arange(count) + 0.5) / count
        for low, high, count in zip(knots, knots[1:], (200, 70, 30), strict=False)
    ]
    target = torch.cat([torch.zeros(700), *wet]).reshape(1, 1, 1, 1000)  # within a class, evenly
    logits = share.log().reshape(1, 1, 4, 1, 1).clone().requires_grad_()

    def cost(said):
        shown = importance.among_weighted(said).expand(1, 1, 4, 1, 1000)
        return loss(shown, target, BINS, importance.of(target))

    slope = torch.autograd.grad(cost(logits), logits)[0].abs().max()
    plain = torch.autograd.grad(
        loss(logits.expand(1, 1, 4, 1, 1000), target, BINS, importance.of(target)), logits
    )
    assert slope < 1e-3 * plain[0].abs().max()


@pytest.mark.parametrize("wrong", [((4.0, 2.0),), ((5.0, 0.0),), ((5.0, float("nan")),)])
def test_importance_within_a_class_is_refused(wrong):
    with pytest.raises(ValueError, match="one of"):
        Importance(BINS, wrong)


def broken_at(number, monkeypatch):
    """The network says NaN in one step; its weights before each."""
    before = []

    def sick(self, batch, batch_idx):
        before.append(torch.cat([weight.detach().flatten() for weight in self.network.parameters()]))
        said = partial(MetNet.logits, self.network)
        self._logits = (lambda batch: said(batch) * torch.nan) if self.global_step == number else said
        return step(self, batch, batch_idx)

    step = Task.training_step
    monkeypatch.setattr(Task, "training_step", sick)
    return before


def test_a_step_whose_loss_is_not_finite_can_be_skipped_and_changes_nothing(
    cube, tmp_path, monkeypatch, caplog
):
    before = broken_at(2, monkeypatch)
    with caplog.at_level(logging.WARNING):
        done = trained_on(cube, tmp_path, 5, on_nonfinite="skip")
    assert done.steps == 5
    assert [torch.equal(*pair) for pair in pairwise(before)] == [False, False, True, False]
    assert "step 2: the loss is nan" in caplog.text
    assert f"cube {cube}, init time 2024-06-01T" in caplog.text and "rows" in caplog.text
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path).values())


def test_a_network_that_never_says_a_number_is_given_up_even_if_steps_may_be_skipped(
    cube, tmp_path, monkeypatch
):
    whole = MetNet.logits
    monkeypatch.setattr(MetNet, "logits", lambda self, batch: whole(self, batch) * torch.nan)
    monkeypatch.setattr("pipelines.task.MOST_SKIPPED", 3)
    with pytest.raises(ValueError, match="3 steps in a row"):
        trained_on(cube, tmp_path, 9, on_nonfinite="skip", validation=0.0)
    assert not (tmp_path / "model.json").exists()


def test_what_is_random_in_a_network_follows_from_the_number_of_the_step(cube, tmp_path, monkeypatch):
    drawn = []
    step = Task.training_step

    def noted(self, batch, batch_idx):
        drawn.append((self.global_step, torch.rand(()).item()))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Task, "training_step", noted)
    trained_on(cube, tmp_path / "a", 4, validation=0.0)
    torch.rand(7)
    trained_on(cube, tmp_path / "b", 4, validation=0.0)
    assert drawn[:4] == drawn[4:]
    assert len({number for _, number in drawn}) == 4


@pytest.fixture(scope="module")
def wide_cube(tmp_path_factory):
    return made_wide_cube(tmp_path_factory.mktemp("wide") / "cube", 64)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_are_trained_by_the_same_call_on_the_middle_they_forecast(
    wide_cube, tmp_path, name
):
    done = trained_on(
        wide_cube,
        tmp_path,
        3,
        model=PUBLISHED[name],
        validation=0.3,
        augment=False,
        **WIDE,
    )
    assert done.steps == 3
    assert done.validation["val_loss"] > 0
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["parameters"] == done.parameters
    assert set(card["scores"]["forecasters"]) >= {"forecast", "persistence", "extrapolation"}
