import pytest
import torch

from metnet.lead_time import FiLM, LeadTimeEmbedding


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
