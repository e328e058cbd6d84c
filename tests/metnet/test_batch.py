import pytest
import torch

from metnet.batch import Batch


def test_a_batch_moves_as_one_thing():
    batch = Batch(
        radar=torch.rand(2, 3, 4, 5),
        age=torch.tensor([[10.0, 5.0, 0.0]] * 2),
        init_time=torch.tensor([0, 300]),
        lead_time=torch.tensor([5.0, 10.0]),
        cell_size=torch.tensor([1000.0, 1000.0]),
    )

    moved = batch.to("meta")

    assert {moved.radar.device.type, moved.init_time.device.type} == {"meta"}
    assert moved.target is None
    with pytest.raises(AttributeError):
        batch.radar = torch.zeros(2, 3, 4, 5)
