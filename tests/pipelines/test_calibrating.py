"""What validation samples say of a network is told on its card, and done by the model that is opened from it."""

import json

import numpy as np
import pytest
import torch

from metnet.calibration import Calibration
from metnet.model import MetNet
from metnet.rain import RainBins
from pipelines.calibrating import calibrated
from pipelines.plain import rain_cube
from pipelines.samples import Samples, Span, split
from tests.pipelines.training import drifting, made_cube

BINS = RainBins((0.1, 1.0, 2.0, 5.0), 20.0)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Showers of 3 mm/h that drift, half of which die as they are seen."""
    random = np.random.default_rng(0)
    alive = random.random(60) < 0.5
    fields = [rain if alive[i // 5] else 0 * rain for i, rain in enumerate(drifting(60))]
    opened = rain_cube(made_cube(tmp_path_factory.mktemp("cube") / "cube", fields))
    span = Span.of(opened.cadence, 3, [5, 15, 30])
    return Samples(opened, split(opened.observed, span, 0.0).training, span, 24, 12, seed=1)


def network(sureness):
    """The widened extrapolation, made as sure as it is told by the last layer's weights on the prior."""
    torch.manual_seed(0)
    net = MetNet(frames=3, channels=8, fine_channels=4, depth=0, grid=(4, 4), bins=BINS)
    with torch.no_grad():
        net.head.classify.bias.copy_(torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]) * sureness)
    return net


def test_a_network_that_is_too_wet_is_dried_and_held_out_samples_say_so(samples):
    found = calibrated(network(3.0), [samples, samples])

    assert all(found.kept) and found.cost["after"] < 0.9 * found.cost["before"]
    assert all(row["after"]["error"] < row["before"]["error"] for row in found.reliability)
    assert [row["threshold"] for row in found.reliability] == [0.1, 1.0, 2.0, 5.0]
    assert "calibrated at 4 of 4 thresholds" in str(found)


def test_the_card_is_json_that_gives_the_calibration_back(samples):
    found = calibrated(network(3.0), [samples])
    card = json.loads(json.dumps(found.card(), allow_nan=False))

    assert Calibration.from_card(card, edges=4) == found.calibration
    assert card["fitted_on"]["cubes"] == [samples.cube.path] and card["fitted_on"]["pixels"] > 1000


def test_no_sample_is_judged_by_what_was_fitted_on_it(samples, monkeypatch):
    fitted, judged = [], []
    fit, of = Calibration.fitted.__func__, Calibration.of

    def fitting(cls, said):
        made = fit(cls, said)
        fitted.append((made, said))
        return made

    def judging(self, said):
        judged.append((self, said))
        return of(self, said)

    monkeypatch.setattr(Calibration, "fitted", classmethod(fitting))
    monkeypatch.setattr(Calibration, "of", judging)
    calibrated(network(1.0), [samples])
    (first, one), (second, other), (_, together) = fitted
    assert len(together.fell) == len(one.fell) + len(other.fell)
    assert [self for self, _ in judged[:2]] == [first, second]
    assert all(said.fell.equal(of.fell) for (_, said), of in zip(judged[:2], (other, one), strict=True))


def test_each_cube_is_judged_by_what_the_others_teach(samples, monkeypatch):
    """Else what holds on one radar network alone would be done on all."""
    fitted = []
    fit = Calibration.fitted.__func__

    def fitting(cls, said):
        fitted.append(len(said.fell))
        return fit(cls, said)

    monkeypatch.setattr(Calibration, "fitted", classmethod(fitting))
    fewer = Samples(samples.cube, samples.inits, samples.span, 24, 2, seed=1)
    calibrated(network(1.0), [samples, samples, fewer])
    one, other, third, together = fitted
    assert one + other + third == 2 * together and third > one


def test_the_halves_are_earlier_and_later_samples(samples):
    seen = []

    class Looking(MetNet):
        def forward(self, batch):
            seen.append(int(batch.init_time[0]))
            return super().forward(batch)

    net = network(1.0)
    net.__class__ = Looking
    calibrated(net, [samples])
    assert seen == sorted(seen) and len(seen) == 36


def test_what_calibrating_does_not_help_is_left_as_it_is(samples, monkeypatch):
    worse = Calibration((-1.0,) * 4, ((5.0, 0.0),) * 4, ((0.0, 0.0),) * 4, (5.0, 30.0))
    monkeypatch.setattr(Calibration, "fitted", classmethod(lambda cls, said: worse))
    found = calibrated(network(1.0), [samples])
    assert not any(found.kept) and "calibrated at 0 of 4 thresholds" in str(found)
    assert set(found.calibration.level) == {(0.0, 0.0)}
    assert found.cost["after"] == pytest.approx(found.cost["before"])


def test_one_sample_is_too_few_and_said_so(samples, monkeypatch):
    monkeypatch.setattr("pipelines.calibrating.MORE", 1)
    few = Samples(samples.cube, samples.inits, samples.span, 24, 1, seed=1)
    found = calibrated(network(3.0), [few])
    assert not any(found.kept) and "too few validation samples" in str(found)
    assert json.loads(json.dumps(found.card()))["reliability"] == []


def test_the_network_is_left_as_it_was(samples):
    net = network(1.0).train()
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    calibrated(net, [samples])
    assert net.training and all(
        torch.equal(weight, before[name]) for name, weight in net.state_dict().items()
    )
