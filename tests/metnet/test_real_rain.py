"""On real radar: four samples are learned by heart, and every pixel, frame and lead time matters."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from metnet.attention.axial import AxialAttention
from metnet.batch import Batch
from metnet.model import MetNet
from pipelines.motion import motion_and_doubt
from pipelines.sources.fmi import Fmi
from tests.metnet.learning import learn

AGES = [10.0, 5.0, 0.0]
LEADS = [5.0, 15.0, 30.0]
ATTENTION = partial(AxialAttention, heads=2, dim_index=1)


def cut(data, side):
    """The four rainiest squares of Finland on 2017-05-09: three frames, then the targets."""
    source = Fmi(str(data / "fmi" / "pgm"))
    files = sorted(source.files(None, None), key=lambda file: file.url)[:9]
    rain = np.stack([source.read(file).values for file in files])
    rows, columns = (size // side * side for size in rain.shape[1:])
    wet = np.nan_to_num(rain).clip(0, 20).sum(axis=0)[:rows, :columns]
    blocks = wet.reshape(rows // side, side, columns // side, side).sum(axis=(1, 3))
    chosen = np.argsort(blocks, axis=None)[-4:]
    corners = [(y * side, x * side) for y, x in zip(*np.unravel_index(chosen, blocks.shape), strict=True)]
    squares = np.stack([rain[:, y : y + side, x : x + side] for y, x in corners])
    radar = torch.from_numpy(squares[:, :3])
    return Batch(
        radar=radar,
        age=torch.tensor([AGES] * 4),
        init_time=torch.zeros(4, dtype=torch.int64),
        lead_time=torch.tensor(LEADS),
        cell_size=torch.full((4,), 1000.0),
        motion=torch.from_numpy(np.stack([motion_and_doubt(sample.numpy(), AGES) for sample in radar])),
        target=torch.from_numpy(squares[:, [3, 5, 8]]),
    )


def network(**arguments):
    torch.manual_seed(0)
    return MetNet(
        frames=3, channels=64, fine_channels=32, depth=1, attention=ATTENTION, grid=(8, 8), **arguments
    )


@pytest.mark.data
@pytest.mark.slow
def test_four_real_samples_are_learned_by_heart(data):
    batch = cut(data, 16)
    assert (batch.target > 0.1).float().mean() > 0.5
    costs = learn(network(), batch, 210, rate=1e-2)
    assert costs[-1] < 0.05 * costs[0]


@pytest.mark.data
def test_one_pixel_of_the_forecast_depends_on_every_frame_lead_time_and_pixel(data):
    """Of the radar, of the surroundings far beyond it, and of the lead time itself."""
    batch = cut(data, 32)
    torch.manual_seed(0)
    around = torch.rand(4, 3, 32, 32) * 3
    net = network(advection=False, surroundings=4)
    for name, weight in net.named_parameters():
        if "tell" in name:  # FiLM starts as the identity
            torch.nn.init.normal_(weight, std=0.2)
    radar = batch.radar.nan_to_num().requires_grad_()
    surroundings, lead_time = around.requires_grad_(), batch.lead_time.clone().requires_grad_()
    seen = replace(batch, radar=radar, surroundings=surroundings, lead_time=lead_time, target=None)

    for place in ((0, 0), (16, 16), (31, 5)):
        grads = torch.autograd.grad(
            net.logits(seen)[0, :, :, *place].square().sum(), (radar, surroundings, lead_time)
        )
        for field in grads[:2]:
            assert (field[0].abs().sum(dim=(1, 2)) > 0).all(), "a frame does not count"
            assert (field[0].abs().sum(dim=0) > 0).float().mean() > 0.99, "a part of the context does not"
            assert not field[1:].any(), "another sample counts"
        assert (grads[2] != 0).all()
