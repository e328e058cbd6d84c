from dataclasses import replace

import pytest
import torch

from metnet.lead_time import FiLM, LeadTimeEmbedding, LeadTimePlanes
from tests.metnet.test_inputs import everything, tiny


def test_film_starts_as_the_identity():
    x = torch.randn(3, 5, 4, 4)
    assert torch.equal(FiLM(features=8, channels=5)(x, torch.randn(3, 8)), x)


def test_film_scales_and_shifts_each_channel_of_each_sample_by_its_own_numbers():
    film = FiLM(features=2, channels=3)
    torch.nn.init.normal_(film.dense.weight)
    x, told = torch.randn(2, 3, 4, 4), torch.randn(2, 2)
    out = film(x, told)
    for sample in range(2):
        for channel in range(3):
            numbers = film.dense(told[sample])
            expected = x[sample, channel] * (1 + numbers[channel]) + numbers[3 + channel]
            torch.testing.assert_close(out[sample, channel], expected)


def test_every_lead_time_has_features_of_its_own_even_those_never_trained():
    torch.manual_seed(0)
    minutes = torch.tensor([1.0, 2.0, 5.0, 7.5, 10.0, 60.0, 61.0, 480.0, 720.0])
    features = LeadTimeEmbedding(16)(minutes)
    apart = torch.cdist(features, features) + torch.eye(len(minutes)) * 9
    assert apart.min() > 1e-3


def test_near_lead_times_have_near_features():
    torch.manual_seed(0)
    embed = LeadTimeEmbedding(16)
    base, near, far = embed(torch.tensor([30.0, 30.1, 40.0]))
    assert torch.dist(base, near) < 0.1 * torch.dist(base, far)


def test_the_features_of_a_lead_time_do_not_depend_on_its_company():
    embed = LeadTimeEmbedding(16)
    together = embed(torch.tensor([5.0, 10.0, 60.0]))
    alone = embed(torch.tensor([10.0]))
    torch.testing.assert_close(together[1], alone[0])


def test_the_waves_are_stored_with_the_weights():
    with pytest.raises(RuntimeError, match="periods"):
        LeadTimeEmbedding(16, waves=3).load_state_dict(LeadTimeEmbedding(16, waves=4).state_dict())


def planes_of(*minutes, step=5.0, count=4):
    frames = torch.randn(2, 3, 2, 4, 4)
    beside = LeadTimePlanes(step, count).beside(frames, torch.tensor(minutes))
    assert torch.equal(beside[:, :, :2], frames.repeat_interleave(len(minutes), 0))
    return beside[: len(minutes), 0, 2:, 0, 0]


def test_each_lead_time_is_one_plane_of_ones():
    assert torch.equal(planes_of(5.0, 10.0, 15.0, 20.0), torch.eye(4))


def test_between_two_planes_a_lead_time_has_a_share_of_both():
    torch.testing.assert_close(planes_of(12.0), torch.tensor([[0.0, 0.6, 0.4, 0.0]]))


@pytest.mark.parametrize(("step", "count"), [(0.7, 5), (3.3, 7), (0.1, 3)])
def test_the_first_and_the_last_plane_are_reached_in_float32_too(step, count):
    told = LeadTimePlanes(step, count).beside(torch.zeros(1, 1, 1, 1, 1), torch.tensor([step, step * count]))
    torch.testing.assert_close(told[:, 0, 1:, 0, 0], torch.eye(count)[[0, -1]])


@pytest.mark.parametrize("minutes", [0.0, 4.9, 20.1, float("nan")])
def test_a_lead_time_without_a_plane_is_refused(minutes):
    with pytest.raises(ValueError, match="stand for 5 to 20 min"):
        planes_of(10.0, minutes)


@pytest.mark.parametrize(("step", "count"), [(0.0, 3), (-1.0, 3), (5.0, 0)])
def test_planes_that_cannot_be_are_refused(step, count):
    with pytest.raises(ValueError, match="at least 1 plane"):
        LeadTimePlanes(step, count)


@pytest.mark.parametrize("lead_time", [None, LeadTimePlanes(5.0, 12)], ids=["film", "input"])
@pytest.mark.parametrize("advection", [True, False])
def test_both_ways_give_each_lead_time_its_own_answer(lead_time, advection):
    net, batch = tiny(lead_time=lead_time, advection=advection), everything()
    together = net.logits(batch)
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3
    alone = net.logits(replace(batch, lead_time=batch.lead_time[1:]))
    torch.testing.assert_close(together[:, 1:], alone, rtol=1e-4, atol=1e-4)
    assert [key for key in net.state_dict() if "planes" in key] == []


@pytest.mark.parametrize(
    ("lead_time", "each"), [(None, 1), (LeadTimePlanes(5.0, 12), 12)], ids=["film", "input"]
)
def test_told_by_film_the_past_is_encoded_once_and_at_the_input_once_for_each_lead_time(lead_time, each):
    net, batch = tiny(lead_time=lead_time), everything()
    encoded = []
    net.memory.register_forward_hook(lambda memory, x, out: encoded.append(len(out)))
    net(replace(batch, lead_time=torch.arange(1, 13) * 5.0))
    assert sum(encoded) == len(batch.radar) * each


def test_told_at_the_input_every_weight_learns():
    batch = replace(everything(), cell_size=torch.full((2,), 2000.0))
    net = tiny(lead_time=LeadTimePlanes(5.0, 12))
    net.logits(replace(batch, lead_time=torch.arange(1, 13) * 5.0)).square().mean().backward()
    silent = [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert silent == []
