"""Members hang together as the data do, where draws from the same distributions pixel by pixel do not."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from metnet.attention.axial import AxialAttention
from metnet.axial_head import AxialHead, Coherent, window_mean
from metnet.calibration import identity
from metnet.loss import cross_entropy
from metnet.model import MetNet
from metnet.rain import RainBins
from tests.metnet.test_inputs import everything

BINS = RainBins((0.5, 1.0, 4.0), 8.0)
SIDE = 6


def small(bins=BINS, grid=(6, 5), leads=2, **arguments):
    torch.manual_seed(0)
    return AxialHead(bins, grid, leads, dim=16, heads=2, **arguments).eval()


def said(bins=BINS, batch=3, leads=2, rows=6, columns=5, seed=0):
    """What a network may say: another distribution at every pixel."""
    random = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(batch, leads, len(bins), rows, columns, generator=random)


def rain(batch=3, leads=2, rows=6, columns=5, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, leads, rows, columns, generator=random).exp()


def log_likelihood(head, logits, target, index):
    """The mean of log P over the observed pixels of lead time number `index` of each sample (nats)."""
    fell = target[torch.arange(len(target)), index]
    return -cross_entropy(head.given_before(logits, target, index)[:, None], fell[:, None], head.bins)


@pytest.mark.parametrize("lead", [0, 1])
def test_at_the_start_its_likelihood_is_the_networks(lead):
    logits, target = said(), rain()
    target[:, :, :2] = torch.nan
    index = torch.full((3,), lead)
    expected = -cross_entropy(logits[:, lead : lead + 1], target[:, lead : lead + 1], BINS)
    torch.testing.assert_close(log_likelihood(small(), logits, target, index), expected, atol=1e-3, rtol=0)


def test_at_the_start_members_are_drawn_from_the_networks_distributions():
    logits = said(batch=1)
    members = small().members(logits, 1500, torch.Generator().manual_seed(0))[0]
    classes = BINS.classify(members)
    for number in range(len(BINS)):
        share = (classes == number).float().mean(dim=0)
        chance = logits.softmax(dim=2)[0, :, number]
        assert (share - chance).abs().max() < 5 * 0.5 / 1500**0.5


def test_a_rate_lies_anywhere_in_its_class_and_dry_is_dry():
    members = small().members(said(batch=1), 500, torch.Generator().manual_seed(0))
    assert members.min() == 0.0
    assert not ((members > 0) & (members < BINS.edges[0])).any()
    strongest = members[members >= 4.0]
    assert strongest.max() < 8.0
    assert strongest.mean() == pytest.approx(6.0, abs=0.2)


def test_the_same_generator_draws_the_same_members_and_no_member_is_another():
    head, logits = small(), said()
    first, again = (head.members(logits, 4, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert len(first[0].flatten(1).unique(dim=0)) == 4


def lively():
    """A head whose decoder says something."""
    head = small()
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return head


def test_what_is_not_observed_costs_nothing_and_is_known_to_be_unseen():
    head, logits, target = lively(), said(), rain()
    index = torch.zeros(3, dtype=torch.long)
    target[:, 0, 3:] = torch.nan
    target[1] = torch.nan
    alone = log_likelihood(head, logits[:1], target[:1], index[:1])
    both = log_likelihood(head, logits[:2], target[:2], index[:2])
    torch.testing.assert_close(alone, both)
    dry = target.clone()
    dry[0, 0, 0, 0], target[0, 0, 0, 0] = 0.0, torch.nan
    later = [log_likelihood(head, logits[:1], field[:1], index[:1]) for field in (dry, target)]
    assert (later[0] - later[1]).abs() > 1e-4


def test_a_target_of_nothing_gives_no_loss_and_no_gradient():
    head = lively()
    loss = -log_likelihood(head, said(), torch.full((3, 2, 6, 5), torch.nan), torch.tensor([0, 1, 0]))
    loss.backward()
    assert loss.item() == 0.0
    assert all(weight.grad is None or not weight.grad.any() for weight in head.parameters())


def test_a_lead_time_knows_of_those_before_it_and_not_of_those_after():
    head, logits, target = lively(), said(), rain()
    other = target.clone()
    for lead, is_told in ((0, False), (1, True)):
        index = torch.full((3,), lead)
        other[:, 1 - lead] = 0.0
        change = log_likelihood(head, logits, target, index) - log_likelihood(head, logits, other, index)
        assert (change.abs() > 1e-5).item() is is_told
        other = target.clone()


def test_it_says_what_does_not_fit():
    with pytest.raises(ValueError, match="3 lead times: expected the 2"):
        small().members(said(leads=3), 1)
    with pytest.raises(ValueError, match="9 x 5 cells: this head draws maps of 6 x 5"):
        small().members(said(batch=1, rows=9), 1)
    with pytest.raises(ValueError, match="9 x 5 cells: this head draws maps of 6 x 5"):
        log_likelihood(small(), said(rows=9), rain(rows=9), torch.tensor([0, 1, 0]))


# ---- on a field whose pixels hang together ----------------------------------------------------------

ONE_EDGE = RainBins((1.0,), 2.0)


def showers(count, generator):
    """Rain of 1.5 mm/h where smoothed noise is high, which drifts by one pixel to the east in a lead time."""
    noise = torch.randn(count, 1, SIDE + 2, SIDE + 3, generator=generator)
    wet = torch.nn.functional.avg_pool2d(noise, 3, stride=1)[:, 0] > 0.1
    return 1.5 * torch.stack([wet[..., 1:], wet[..., :-1]], dim=1)


def correlation(fields, down=0, right=0):
    """Of rain at pixels that lie so far apart."""
    wet = (fields > 0).float()
    here = wet[..., : SIDE - down, : SIDE - right]
    there = wet[..., down:, right:]
    return torch.corrcoef(torch.stack([here.flatten(), there.flatten()]))[0, 1].item()


def drift(fields):
    """The correlation of the first lead time with the second one pixel further east."""
    wet = (fields > 0).float()
    return torch.corrcoef(torch.stack([wet[:, 0, :, :-1].flatten(), wet[:, 1, :, 1:].flatten()]))[0, 1].item()


def learned(steps=110, batch=32):
    """A head that has seen showers, beside a network that knows how often it rains and no more."""
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head = AxialHead(ONE_EDGE, (SIDE, SIDE), 2, dim=24, heads=2)
    share = (showers(500, random) > 0).float().mean()
    logits = torch.stack([1 - share, share]).log().reshape(1, 1, 2, 1, 1).expand(batch, 2, 2, SIDE, SIDE)
    optimizer = torch.optim.Adam(head.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.008 * min(1, step / 10) * (1 - step / steps) + 1e-5
        index = torch.randint(2, (batch,), generator=random)
        loss = -log_likelihood(head, logits, showers(batch, random), index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval(), logits


def test_members_hang_together_as_the_data_do_and_independent_draws_do_not():
    head, logits = learned()
    random = torch.Generator().manual_seed(1)
    true = showers(600, random)
    drawn = head.members(logits[:1], 300, random)[0]
    chance = logits[0].softmax(dim=1)[:, 1]
    alone = 1.5 * (torch.rand(300, 2, SIDE, SIDE, generator=random) < chance).float()
    assert (drawn > 0).float().mean() == pytest.approx((true > 0).float().mean().item(), abs=0.06)
    for apart in ({"right": 1}, {"down": 1}):
        wanted = correlation(true, **apart)
        assert wanted > 0.4
        assert correlation(drawn, **apart) == pytest.approx(wanted, abs=0.12)
        assert correlation(alone, **apart) < 0.1
    assert drift(true) == pytest.approx(1.0)
    assert drift(drawn) > 0.8
    assert drift(alone) < 0.1
    spread = [(fields > 0).float().mean(dim=(1, 2, 3)).std().item() for fields in (true, drawn, alone)]
    assert spread[1] == pytest.approx(spread[0], rel=0.25), "of the area that is wet"
    assert spread[2] < 0.5 * spread[0]
    hours = [window_mean(fields[None], torch.tensor([5.0, 10.0])) for fields in (true, drawn, alone)]
    dry = [1 - hour.probability_above(0.1).mean().item() for hour in hours]
    assert dry[1] == pytest.approx(dry[0], abs=0.05), "of windows, in which it may rain at either end"
    assert dry[2] < dry[0] - 0.05
    index = torch.arange(len(logits)) % 2
    fields = showers(len(logits), random)
    gain = log_likelihood(head, logits, fields, index) + cross_entropy(logits, fields, ONE_EDGE)
    assert gain > 0.15, "nats a pixel that are won by knowing the pixels before"


def test_the_mean_over_a_window_is_that_of_each_member():
    members = torch.tensor([[0.0, 2.0, 4.0], [6.0, 6.0, 0.0]]).reshape(1, 2, 3, 1, 1)
    window = window_mean(members, torch.tensor([5.0, 10.0, 30.0]))
    assert window.members.flatten().tolist() == pytest.approx([(1 * 5 + 3 * 20) / 25, (6 * 5 + 3 * 20) / 25])
    with pytest.raises(ValueError, match="the two ends of a window"):
        window_mean(members[:, :, :1], torch.tensor([5.0]))


# ---- beside a network -------------------------------------------------------------------------------


def beside_a_network(rows=12, columns=8, **arguments):
    torch.manual_seed(0)
    attention = partial(AxialAttention, heads=2, dim_index=1)
    network = MetNet(3, channels=8, fine_channels=4, depth=1, grid=(4, 4), attention=attention)
    head = AxialHead(network.bins, (rows, columns), 2, dim=16, heads=2)
    return Coherent(network, head, count=3, **arguments).eval()


def with_a_target():
    batch = everything(rows=12, columns=8)
    return replace(batch, target=batch.radar[:, :2])


def test_a_network_with_a_head_is_a_forecaster_of_members():
    forecaster = beside_a_network()
    batch = everything(rows=12, columns=8)
    forecast = forecaster(batch)
    assert forecaster.frames == 3
    assert forecast.members.shape == (2, 3, 2, 12, 8)
    assert forecast.members.isfinite().all()
    assert torch.equal(forecast.members, forecaster(batch).members)


def test_the_loss_of_its_logits_is_that_of_the_maps_which_fell():
    forecaster, batch = beside_a_network(), with_a_target()
    forecaster.head.decoder.decoder.final.weight.data.normal_(std=0.5)
    alone = forecaster.network.logits(batch)
    each = [log_likelihood(forecaster.head, alone, batch.target, torch.full((2,), lead)) for lead in (0, 1)]
    seen = [(~batch.target[:, lead].isnan()).sum() for lead in (0, 1)]
    expected = -(each[0] * seen[0] + each[1] * seen[1]) / sum(seen)
    torch.testing.assert_close(
        cross_entropy(forecaster.logits(batch), batch.target, forecaster.bins), expected
    )
    assert (expected - cross_entropy(alone, batch.target, forecaster.bins)).abs() > 0.05


def test_learning_from_its_logits_teaches_the_head_and_leaves_the_network():
    forecaster, batch = beside_a_network().train(), with_a_target()
    with pytest.raises(ValueError, match="no target"):
        forecaster.logits(replace(batch, target=None))
    cross_entropy(forecaster.logits(batch), batch.target, forecaster.bins).backward()
    assert all(weight.grad is None and not weight.requires_grad for weight in forecaster.network.parameters())
    assert forecaster.head.decoder.decoder.final.weight.grad.abs().sum() > 0
    assert [part.training for part in (forecaster.head, forecaster.network)] == [True, False]


def test_some_of_its_lead_times_are_forecast_as_among_all_and_others_refused():
    forecaster = beside_a_network(lead_times=(5.0, 10.0))
    batch = replace(everything(rows=12, columns=8), lead_time=torch.tensor([5.0, 10.0]))
    both = forecaster(batch).members
    later = forecaster(replace(batch, lead_time=torch.tensor([10.0]))).members
    assert torch.equal(later, both[:, :, 1:])
    with pytest.raises(ValueError, match=r"lead_times=\[7.0\]: this head draws maps at 5, 10 min"):
        forecaster(replace(batch, lead_time=torch.tensor([5.0, 7.0])))


def test_members_are_drawn_around_calibrated_probabilities():
    wetter = identity(RainBins.preferred())
    wetter = replace(wetter, level=((2.0, 0.0),) * len(wetter.level))
    plain, calibrated = beside_a_network(), beside_a_network(calibration=wetter)
    batch = everything(rows=12, columns=8)
    expected = wetter(plain.network(batch), batch.lead_time)
    torch.testing.assert_close(
        calibrated.alone(batch).softmax(dim=2), expected.probability, atol=1e-4, rtol=0
    )
    wet = [(each.members(batch, 20).mean()) for each in (plain, calibrated)]
    assert wet[1] > 1.5 * wet[0]


def test_it_refuses_a_head_for_other_classes_or_lead_times_and_no_members():
    forecaster = beside_a_network()
    with pytest.raises(ValueError, match="expected the network's"):
        Coherent(forecaster.network, small())
    with pytest.raises(ValueError, match="at least 1 member"):
        Coherent(forecaster.network, forecaster.head, count=0)
    with pytest.raises(ValueError, match=r"lead_times=\[5\]: expected the 2 that the head draws"):
        Coherent(forecaster.network, forecaster.head, lead_times=[5])
