from dataclasses import fields, replace

import pytest
import torch

from metnet.batch import Batch
from pipelines.samples import collate
from tests.metnet.test_inputs import everything


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


def test_every_source_moves_with_it():
    moved = everything().to("meta")
    assert {getattr(moved, field.name).device.type for field in fields(moved) if field.name != "target"} == {
        "meta"
    }


def test_filled_up_it_has_cells_that_are_not_observed_in_the_south_and_east():
    batch = replace(everything(rows=22, columns=21), target=torch.zeros(2, 2, 22, 21))
    filled = batch.filled_up(4)
    for name in ("radar", "static", "satellite", "place"):
        field, whole = getattr(batch, name), getattr(filled, name)
        assert whole.shape[-2:] == (24, 24)
        assert torch.equal(whole[..., :22, :21], field)
        assert whole[..., 22:, :].isnan().all() and whole[..., 21:].isnan().all()
    assert filled.motion.isfinite().all()
    assert filled.target is None
    assert torch.equal(filled.surroundings, batch.surroundings)


def test_samples_of_all_sources_are_collated():
    parts = [everything(batch=1, seed=seed) for seed in (0, 1)]
    joined = collate(parts)
    assert torch.equal(joined.satellite, torch.cat([part.satellite for part in parts]))
    assert torch.equal(joined.surroundings[1:], parts[1].surroundings)
    assert torch.equal(joined.lead_time, parts[0].lead_time)
