import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metnet.advection import carry_ahead
from metnet.head import Categorical, Ordinal, climatology, spelt
from metnet.loss import cross_entropy, crps, ordinal
from metnet.model import MetNet
from metnet.rain import BinnedForecast, RainBins, log_tails
from tests.metnet.test_inputs import everything

BINS = RainBins.preferred()
SMALL = {"frames": 3, "channels": 16, "fine_channels": 8, "depth": 1, "grid": (8, 8)}
LINKS = (Categorical(), Ordinal())
every_link = pytest.mark.parametrize("link", LINKS, ids=lambda link: type(link).__name__)


@every_link
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 10.0])
def test_numbers_and_logits_undo_each_other(link, sharpness):
    torch.manual_seed(0)
    log_probability = (sharpness * torch.randn(2, 3, 20, 4, 4)).log_softmax(dim=2)
    again = link.logits(link.numbers(log_probability)).log_softmax(dim=2)
    torch.testing.assert_close(again, log_probability, rtol=1e-4, atol=1e-4)


@every_link
def test_every_distribution_keeps_its_smallest_shares(link):
    """A share of 1e-12 in the middle, where the exceedances on both of its sides are the same float32."""
    shares = torch.tensor([0.5, 1e-12, 0.25, 1e-9, 0.25], dtype=torch.float64)
    log_probability = (shares / shares.sum()).log().float().reshape(1, 1, 5, 1, 1)
    again = link.logits(link.numbers(log_probability)).log_softmax(dim=2)
    torch.testing.assert_close(again, log_probability, rtol=1e-5, atol=1e-5)


@every_link
def test_it_says_how_many_numbers_it_wants(link):
    usual = spelt(link, climatology(BINS))
    assert len(usual) == link.count(len(BINS))
    said = link.logits(torch.tensor(usual).reshape(1, 1, -1, 1, 1)).softmax(dim=2).flatten()
    torch.testing.assert_close(said, torch.tensor(climatology(BINS)))


@settings(max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12))
def test_ordinal_exceedances_fall_and_probabilities_sum_to_one_whatever_the_numbers_are(numbers):
    logits = Ordinal().logits(torch.tensor(numbers).reshape(1, 1, -1, 1, 1))
    assert logits.logsumexp(dim=2).abs().item() < 1e-4, "they are log-probabilities as they stand"
    above, below = log_tails(logits)
    assert above.isfinite().all() and below.isfinite().all()
    assert (above.diff(dim=2) <= 1e-6).all()
    edges = tuple(float(edge) for edge in range(1, len(numbers) + 1))
    forecast = BinnedForecast(logits.softmax(dim=2), RainBins(edges, 99.0))
    falling = torch.stack([forecast.probability_above(edge) for edge in edges])
    assert (falling.diff(dim=0) <= 1e-6).all()


def test_ordinal_logits_are_the_logistic_differences_written_another_way():
    torch.manual_seed(0)
    numbers = torch.randn(1, 1, 6, 1, 3, dtype=torch.float64) * 2
    first, steps = numbers[0, 0, :1, 0], numbers[0, 0, 1:, 0]
    cumulative = torch.cat([first, first - torch.log1p(steps.exp()).cumsum(dim=0)])
    exceedance = torch.cat([torch.ones(1, 3), 1 / (1 + (-cumulative).exp()), torch.zeros(1, 3)])
    expected = exceedance[:-1] - exceedance[1:]
    torch.testing.assert_close(Ordinal().logits(numbers)[0, 0, :, 0].exp(), expected)


def test_the_first_ordinal_number_makes_all_rain_likelier():
    numbers = torch.zeros(1, 1, 5, 1, 1)
    more = numbers.clone()
    more[:, :, 0] = 1.0
    less_above, more_above = (log_tails(Ordinal().logits(x))[0] for x in (numbers, more))
    assert (more_above > less_above).all()


def test_ordinal_gradients_are_those_of_finite_differences():
    numbers = torch.randn(1, 1, 4, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Ordinal().logits, numbers)
    shares = torch.randn(1, 1, 4, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Ordinal().numbers(x.log_softmax(dim=2)), shares)


@every_link
def test_in_front_of_the_prior_the_forecast_is_the_prior_at_the_start(link):
    net, batch = MetNet(**SMALL, head=link), everything()
    with torch.no_grad():
        said = net(batch).probability
        past = net.encode(batch)
        newest = carry_ahead(batch.radar[:, -1:], past.rain.mended, batch.lead_time)[:, 0]
        assert torch.equal(past.rain.carried(batch.lead_time)[:, 0].nan_to_num(), newest.nan_to_num())
        carried = past.rain.carried(batch.lead_time)
        seen = carried[:, 0]
        for older in carried[:, 1:].unbind(dim=1):
            seen = torch.where(seen.isnan(), older, seen)
        expected = net.prior(seen, past.rain.ahead(batch.lead_time), batch.cell_size).exp()
    assert (said - expected).abs().max() < 1e-3
    torch.testing.assert_close(said.sum(dim=2), torch.ones(2, 2, 24, 20))


@every_link
def test_without_a_prior_the_forecast_is_about_climatology_at_the_start(link):
    net, batch = MetNet(**SMALL, head=link, advection=False), everything()
    with torch.no_grad():
        said = net(batch).probability
    expected = torch.tensor(climatology(BINS)).reshape(1, 1, -1, 1, 1)
    assert (said - expected).abs().max() < 0.1


@every_link
@pytest.mark.parametrize("loss", [cross_entropy, ordinal, crps], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("advection", [True, False])
def test_every_loss_goes_down_with_every_head(link, loss, advection):
    torch.manual_seed(0)
    net, batch = MetNet(**SMALL, head=link, advection=advection), everything()
    target = batch.radar[:, -2:].roll(3, dims=3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    first = loss(net.logits(batch), target, net.bins).item()
    for _ in range(12):
        cost = loss(net.logits(batch), target, net.bins)
        optimizer.zero_grad()
        cost.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert all(weight.isfinite().all() for weight in net.parameters())
    assert cost.item() < 0.99 * first
