"""A run folder as a forecaster."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save

from metnet.batch import Batch
from metnet.calibration import Calibration
from metnet.decision import Cuts
from pipelines.construct import construct
from pipelines.motion import motion
from pipelines.trained import TrainedModel, trained
from tests.pipelines.training import MODEL, drifting

LEADS = torch.tensor([5.0, 10.0])


@pytest.fixture
def run(tmp_path):
    """A run folder of a network that was never trained."""
    torch.manual_seed(0)
    network = construct({**MODEL, "frames": 5, "_partial_": False}, ("metnet.",))
    edges = network.bins.edges
    level = ((-1.0, 0.3),) * len(edges)
    calibration = Calibration((-2.0,) * len(edges), level, ((0.0, 0.0),) * len(edges), (5.0, 10.0))
    cuts = Cuts(edges, (5.0, 10.0), ((0.3, 0.2),) * len(edges))
    weights = save(network.state_dict())
    card = {
        "config": {"model": {**MODEL, "frames": 5}},
        "bins": {"edges": edges, "top": network.bins.top},
        "cadence_minutes": [5.0],
        "lead_times": [5.0, 10.0],
        "calibration": {**calibration.card(), "cuts": cuts.card()},
        "sha256": hashlib.sha256(weights).hexdigest(),
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
    assert model.cuts.at(1.0, (5.0, 10.0)) == (0.3, 0.2)
    assert model.uncalibrated().cuts is None


def test_a_run_without_a_calibration_forecasts_as_its_network_does(run):
    raw = trained(run).uncalibrated()(a_batch())
    card = json.loads((run / "model.json").read_text())
    del card["calibration"]
    (run / "model.json").write_text(json.dumps(card))
    assert torch.equal(trained(run)(a_batch()).probability, raw.probability)
    rewritten(run, calibration=None)
    assert torch.equal(trained(run)(a_batch()).probability, raw.probability)


@pytest.mark.parametrize("damage", [{"level": []}, {"cuts": {}}, {"drift": "x"}])
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
    np.testing.assert_array_equal(seen[0][0].numpy(), motion(rain[:4], age[:4].tolist()))
    assert np.abs(seen[0].numpy()).max() > 0.1
