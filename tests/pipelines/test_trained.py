"""A run folder as a forecaster."""

import hashlib
import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from metnet.batch import Batch
from metnet.calibration import Calibration
from metnet.forward import FORWARD
from metnet.scores.crps import Crps
from pipelines.baselines.persistence import Persistence
from pipelines.beside import Beside, Sides
from pipelines.construct import construct
from pipelines.forecast import forecast
from pipelines.motion import motion_and_doubt
from pipelines.past import cut
from pipelines.plain import rain_cube
from pipelines.trained import TrainedModel, trained, untrained
from pipelines.verify import verify
from pipelines.version import version
from tests.pipelines.training import (
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

LEADS = torch.tensor([5.0, 10.0])


@pytest.fixture
def run(tmp_path):
    """A run folder of a network that was never trained."""
    torch.manual_seed(0)
    network = construct({**MODEL, "frames": 5, "_partial_": False}, ("metnet.",))
    edges = network.bins.edges
    level = ((-1.0, 0.3),) * len(edges)
    calibration = Calibration((-2.0,) * len(edges), level, ((0.0, 0.0),) * len(edges), (5.0, 10.0))
    weights = save(network.state_dict())
    card = {
        "config": {"model": {**MODEL, "frames": 5}},
        "bins": {"edges": edges, "top": network.bins.top},
        "cadence_minutes": [5.0],
        "lead_times": [5.0, 10.0],
        "calibration": calibration.card(),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "forward": FORWARD,
    }
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "model.json").write_text(json.dumps(card))
    return tmp_path


def a_batch() -> Batch:
    rain = torch.from_numpy(np.stack(list(drifting(5))))[None]
    age = torch.arange(4, -1, -1.0)[None] * 5
    return Batch(rain, age, torch.tensor([0]), LEADS, torch.tensor([1000.0]))


def rewritten(run, **changes):
    card = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps({**card, **changes}))


def test_probabilities_are_calibrated_unless_they_are_not_to_be(run):
    model, batch = trained(run), a_batch()
    raw = model.uncalibrated()(batch)
    torch.testing.assert_close(model(batch).probability, model.calibration(raw, LEADS).probability)
    assert (model(batch).probability - raw.probability).abs().max() > 0.05


def test_a_run_without_a_calibration_forecasts_as_its_network_does(run):
    raw = trained(run).uncalibrated()(a_batch())
    card = json.loads((run / "model.json").read_text())
    del card["calibration"]
    (run / "model.json").write_text(json.dumps(card))
    assert torch.equal(trained(run)(a_batch()).probability, raw.probability)
    rewritten(run, calibration=None)
    assert torch.equal(trained(run)(a_batch()).probability, raw.probability)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": {"model": {**MODEL, "frames": "four"}}}, "(not supported|frames)"),
        ({"config": {"model": {**MODEL, "bogus": 3}}}, "unexpected keyword argument 'bogus'"),
        ({"config": {"model": {**MODEL, "_target_": "os.system"}}}, "os.system"),
        ({"lead_times": []}, r"lead_times=\[\]: expected"),
        ({"lead_times": [5.0, -1.0]}, "minutes above 0"),
        ({"cadence_minutes": [math.nan]}, "minutes above 0"),
        ({"lead_times": None}, "lead_times=None: expected one or more minutes above 0"),
        ({"cadence_minutes": "x"}, "could not convert string to float"),
        ({"bins": {"edges": [1.0]}}, "incomplete: no 'top'"),
    ],
)
def test_a_card_that_was_changed_is_named_with_what_to_do(run, changes, said):
    rewritten(run, **changes)
    with pytest.raises(
        ValueError, match=rf"(?s)model\.json: .*{said}.*; it was changed, or is of .*train the model again"
    ):
        trained(run)


@pytest.mark.parametrize("key", ["lead_times", "cadence_minutes", "bins", "sha256"])
def test_a_card_that_lacks_something_is_named_with_what_it_lacks(run, key):
    card = json.loads((run / "model.json").read_text())
    del card[key]
    (run / "model.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=rf"model\.json: incomplete: .*{key}"):
        trained(run)


@pytest.mark.parametrize("number", [None, FORWARD - 1, FORWARD + 1])
def test_weights_that_were_learned_by_another_computation_are_refused_though_they_fit(run, number):
    rewritten(run, forward=number, software="metnet-nowcast 0.0.7")
    (run / "prior.safetensors").write_bytes(b"")
    for opened in (trained, untrained):
        with pytest.raises(
            ValueError, match=rf"model\.json: expected forward={FORWARD}, got {number}"
        ) as told:
            opened(run)
        assert "train it again, into another folder, or open it with" in str(told.value)
        assert "metnet-nowcast 0.0.7" in str(told.value)


@pytest.mark.parametrize("change", ["another size", "another name"])
def test_weights_of_another_state_of_the_software_are_refused_with_what_to_do(run, change):
    weights = load((run / "model.safetensors").read_bytes())
    name = next(iter(weights))
    old = weights.pop(name)
    weights[name if change == "another size" else "formerly.called"] = torch.cat([old, old])
    (run / "model.safetensors").write_bytes(save(weights))
    sha256 = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    told = {"software": "metnet-nowcast 0.0.7", "created": "2025-01-02T03:04:05+00:00"}
    rewritten(run, sha256=sha256, **told)
    with pytest.raises(ValueError, match="another state of the software trained it") as refused:
        trained(run)
    for part in (version(), *told.values(), "train it again", name):
        assert part in str(refused.value)


def test_a_prior_of_another_state_of_the_software_is_refused_likewise(run):
    prior = trained(run).network.prior
    fitted = prior.state_dict()
    (run / "prior.safetensors").write_bytes(save(fitted))
    assert torch.equal(untrained(run).network.prior.level, prior.level)
    (run / "prior.safetensors").write_bytes(save({**fitted, "level": fitted["level"].repeat(2, 1)}))
    with pytest.raises(ValueError, match=r"prior\.safetensors: .*train it again.*level"):
        untrained(run)


@pytest.mark.parametrize("damage", [{"level": []}, {"drift": "x"}])
def test_a_damaged_calibration_is_refused_by_the_name_of_its_file(run, damage):
    card = json.loads((run / "model.json").read_text())
    rewritten(run, calibration={**card["calibration"], **damage})
    with pytest.raises(ValueError, match=r"model\.json: .*expected"):
        trained(run)


def test_motion_is_that_of_the_newest_frames_that_hold_anything():
    seen = []

    class Network:
        frames = 7

        def __call__(self, batch):
            seen.append(batch.motion)

    rain = np.stack(list(drifting(7)))
    rain[-3:] = np.nan
    age = np.arange(6, -1, -1.0) * 5
    batch = replace(a_batch(), radar=torch.from_numpy(rain)[None], age=torch.from_numpy(age).float()[None])
    TrainedModel(Network(), {}, "")(batch)
    np.testing.assert_array_equal(seen[0][0].numpy(), motion_and_doubt(rain[:4], age[:4].tolist()))
    assert np.abs(seen[0].numpy()).max() > 0.1


# ---- published networks, which forecast the middle of what they see ---------------------------------


@pytest.fixture(scope="module")
def wide_cube(tmp_path_factory):
    """Eight cells wider than what the networks see."""
    return made_wide_cube(tmp_path_factory.mktemp("wide") / "cube", 72)


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, wide_cube, tmp_path_factory):
    """The run folder of one of them, trained for a step."""
    folder = tmp_path_factory.mktemp(request.param)
    trained_on(wide_cube, folder, 1, model=PUBLISHED[request.param], validation=0.0, **WIDE)
    return folder


def seen_by(model, cube, place=None):
    """What a network sees of a cube, or of a window of it, a good hour after its start."""
    opened = rain_cube(cube)
    sides = Sides(opened, Beside.of(model.network, WIDE["satellite"], WIDE["static"]))
    window = (0, 0, *opened.grid.shape) if place is None else (*place, 64, 64)
    return cut(sides, START + 14 * FIVE, model.frames, (5.0, 10.0), window)


def test_a_published_network_forecasts_every_cell_that_has_enough_around_it_and_no_other(
    published, wide_cube
):
    model = trained(published)
    size, target = 72, model.network.target
    batch = seen_by(model, wide_cube)
    forecast = model(batch)
    edge = (64 - target) // 2
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[edge : size - edge, edge : size - edge] = True
    observed = torch.ones(1, 2, size, size)
    for field in (
        forecast.probability_above(1.0), forecast.quantile(0.5), forecast.mean(), forecast.crps(observed)
    ):  # fmt: skip
        assert field.shape == observed.shape
        assert torch.equal(field.isnan(), ~inside.expand_as(field))
    for start, count in ((0, min(target, 8)), (8, target)):  # of a tile of 16 cells the next one takes half
        with torch.no_grad():
            there = model.network(seen_by(model, wide_cube, (start, start)))
        cells = slice(start + edge, start + edge + count)
        expected = (
            there.mean()[..., :count, :count],
            there.crps(observed[..., :target, :target])[..., :count, :count],
        )
        torch.testing.assert_close(forecast.mean()[..., cells, cells], expected[0])
        torch.testing.assert_close(forecast.crps(observed)[..., cells, cells], expected[1])


def test_a_published_network_counts_its_lead_times_from_the_newest_frame_however_late_that_is(
    published, wide_cube
):
    model = trained(published)
    new = seen_by(model, wide_cube)
    late = replace(
        new,
        age=new.age + 5,
        init_time=new.init_time + 300,
        satellite_age=new.satellite_age + 5,
        lead_time=torch.tensor([5.0]),
    )
    mean = model(replace(new, lead_time=torch.tensor([10.0]))).mean()
    torch.testing.assert_close(model(late).mean(), mean, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(model(late).mean().nan_to_num(), model(new).mean()[:, :1].nan_to_num())
    held = {field.name: getattr(late, field.name) for field in fields(late)}
    twice = {name: torch.cat([value, value]) for name, value in held.items() if value is not None}
    two = Batch(**{**twice, "age": torch.cat([new.age, late.age]), "lead_time": late.lead_time})
    with pytest.raises(ValueError, match=r"\[0\.0, 5\.0\] minutes old: .* one age"):
        model(two)


def test_a_run_of_a_published_network_is_forecast_with_and_verified(published, wide_cube, tmp_path):
    model = trained(published)
    done = forecast(wide_cube, model, str(tmp_path / "forecasts"), init_time="2024-06-01T01:10Z")
    share = (8 + model.network.target) ** 2 / 72**2
    assert done.covered == pytest.approx(share)
    assert f"by {type(model.network).__name__}" in str(done) and f"{share:.0%} of the cells" in str(done)
    baselines = {"persistence": Persistence()}
    result = verify(
        wide_cube, str(tmp_path / "forecasts"), str(tmp_path / "report"), [Crps()], baselines, "persistence",
        resamples=10,
    )  # fmt: skip
    assert result.report.skill.pixels.sum() == 3 * (8 + model.network.target) ** 2


def test_it_says_what_a_published_network_cannot_do(published, wide_cube, tmp_path):
    model = trained(published)
    small = made_cube(tmp_path / "small", drifting(20))
    with pytest.raises(
        ValueError, match=r"24 x 32 cells: a MetNet\d that sees 64 x 64 .*wants at least as many"
    ):
        forecast(small, model, str(tmp_path / "forecasts"))
    with pytest.raises(ValueError, match=r"lead times? 20 min: .* to 15 min"):
        model(replace(seen_by(model, wide_cube), lead_time=torch.tensor([20.0])))
    with pytest.raises(ValueError, match="of a network with advection"):
        untrained(published)
    (published / "prior.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="has no prior"):
        untrained(published)
    (published / "prior.safetensors").unlink()


def test_a_model_of_another_kind_is_refused_by_what_it_is(run):
    rewritten(run, config={"model": {"_target_": "metnet.rain.RainBins.preferred", "_partial_": True}})
    with pytest.raises(
        ValueError, match="its model is a RainBins; expected a MetNet, MetNet1, MetNet2 or Coherent"
    ):
        trained(run)
