"""The benchmark of motions tells which one brings rain where it falls."""

import pytest
import torch

from benchmarks.drills import Case
from benchmarks.motion import scores
from metnet.batch import Batch
from pipelines.trained import trained
from tests.pipelines.test_baselines import drifting


def test_both_motions_beat_none_on_rain_that_drifts():
    pytest.importorskip("pysteps")
    frames = 2 * drifting(3, -2, 8, size=96)
    past = Batch(
        radar=frames[None, :4],
        age=torch.tensor([[15.0, 10.0, 5.0, 0.0]]),
        init_time=torch.zeros(1, dtype=torch.int64),
        lead_time=torch.tensor([5.0, 20.0]),
        cell_size=torch.tensor([1000.0]),
    )

    found, seconds = scores(Case(past, {}, frames[None, [4, 7]]), trained("pretrained"))

    assert set(seconds) == set(found) == {"none", "pysteps Lucas-Kanade", "ours"}
    for name in ("pysteps Lucas-Kanade", "ours"):
        error, crps = (found[name] / found["none"]).numpy()
        assert (error < 0.5).all() and (crps < 0.8).all(), (name, error, crps)
    assert torch.stack(list(found.values())).isfinite().all()
