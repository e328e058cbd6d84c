import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from metnet.loss import cross_entropy, crps, ordinal
from metnet.rain import RainBins

BINS = RainBins(edges=(1.0, 2.0), top=4.0)
LOSSES = (cross_entropy, ordinal, crps)
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def test_it_is_the_mean_surprise_of_the_observed_classes():
    probability = torch.tensor([[0.5, 0.2], [0.3, 0.2], [0.2, 0.6]])  # class, pixel
    logits = probability.log().reshape(1, 1, 3, 1, 2)
    target = torch.tensor([0.4, 3.0]).reshape(1, 1, 1, 2)
    loss = cross_entropy(logits, target, BINS)
    assert loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.6)) / 2)


@every_loss
def test_a_pixel_that_was_not_observed_changes_nothing(loss):
    logits = torch.randn(2, 3, 3, 4, 4)
    target = torch.rand(2, 3, 4, 4) * 4
    target[:, :, :2] = torch.nan
    seen = loss(logits[:, :, :, 2:], target[:, :, 2:], BINS)
    torch.testing.assert_close(loss(logits, target, BINS), seen)


@every_loss
def test_a_pixel_that_was_not_observed_gets_no_gradient(loss):
    logits = torch.randn(1, 1, 3, 2, 2, requires_grad=True)
    target = torch.tensor([[[[0.0, torch.nan], [1.5, 3.0]]]])
    loss(logits, target, BINS).backward()
    assert logits.grad.isfinite().all()
    touched = logits.grad[0, 0].abs().sum(dim=0) > 0
    assert touched.tolist() == [[True, False], [True, True]]


@every_loss
@pytest.mark.parametrize("weights", [None, torch.ones(1, 2, 2, 2)])
def test_nothing_observed_at_all_gives_zero_and_a_zero_gradient(loss, weights):
    logits = torch.randn(1, 2, 3, 2, 2, requires_grad=True)
    nothing = loss(logits, torch.full((1, 2, 2, 2), torch.nan), BINS, weights)
    nothing.backward()
    assert nothing.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@every_loss
def test_a_weight_of_two_counts_as_two_pixels(loss):
    logits, target = torch.randn(1, 1, 3, 1, 3), torch.tensor([[[[0.0, 1.5, 3.0]]]])
    weights = torch.tensor([[[[1.0, 2.0, 0.0]]]])
    twice = torch.tensor([0, 1, 1])
    expected = loss(logits[..., twice], target[..., twice], BINS)
    torch.testing.assert_close(loss(logits, target, BINS, weights), expected)


@every_loss
def test_parts_weighted_by_what_they_observed_add_up_to_the_whole(loss):
    logits, target = torch.randn(2, 2, 3, 4, 4), torch.rand(2, 2, 4, 4) * 5
    target[torch.rand(target.shape) < 0.4] = torch.nan
    counts = (~target.isnan()).flatten(1).sum(dim=1)
    parts = [loss(logits[n : n + 1], target[n : n + 1], BINS) * counts[n] for n in (0, 1)]
    torch.testing.assert_close(sum(parts) / counts.sum(), loss(logits, target, BINS))


@every_loss
def test_gradients_are_those_of_finite_differences(loss):
    logits = torch.randn(1, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[[[0.0, 1.3], [1.5, 3.0]], [[torch.nan, 9.0], [0.3, 2.0]]]], dtype=torch.float64)
    weights = torch.rand(target.shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logits: loss(logits, target, BINS, weights), logits)


def distributions(count=40, seed=0):
    """Logits of pixels over many classes, and rates of all kinds, some of them exactly at an edge."""
    random = np.random.default_rng(seed)
    bins = RainBins.preferred()
    rate = random.gamma(0.3, 8.0, count) * (random.random(count) < 0.6)
    rate[:4] = 0.1, 100.0, 149.0, 300.0
    return bins, random.normal(0, 3, (len(bins), count)), rate


def as_fields(logits, rate):
    return torch.from_numpy(logits)[None, None, :, None], torch.from_numpy(rate)[None, None, None]


def test_ordinal_is_the_sum_of_the_surprises_of_all_exceedances():
    bins, logits, rate = distributions()
    probability = np.exp(logits) / np.exp(logits).sum(axis=0)
    expected = 0.0
    for n, edge in enumerate(bins.edges, start=1):
        above = probability[n:].sum(axis=0)
        expected -= np.where(rate >= edge, np.log(above), np.log(1 - above))
    assert ordinal(*as_fields(logits, rate), bins).item() == pytest.approx(expected.mean(), rel=1e-9)


def test_ordinal_gradient_is_that_of_the_exceedances_worked_out_by_hand():
    """d(-log P(above)) and d(-log P(below)) along logit j, class by class."""
    bins, logits, rate = distributions()
    p = np.exp(logits) / np.exp(logits).sum(axis=0)
    expected = np.zeros_like(p)
    for n, edge in enumerate(bins.edges, start=1):
        member = (np.arange(len(p)) >= n)[:, None] == (rate >= edge)
        side = (p * member).sum(axis=0)
        expected += p - p * member / side
    fields, target = as_fields(logits, rate)
    fields.requires_grad_()
    ordinal(fields, target, bins).backward()
    np.testing.assert_allclose(fields.grad[0, 0, :, 0].numpy() * len(rate), expected, rtol=1e-6, atol=1e-9)


def test_ordinal_is_finite_for_the_most_certain_of_wrong_answers():
    logits = torch.tensor([200.0, 0.0, -200.0]).reshape(1, 1, 3, 1, 1).requires_grad_()
    loss = ordinal(logits, torch.full((1, 1, 1, 1), 3.0), BINS)
    loss.backward()
    assert loss.item() == pytest.approx(200 + 400)
    assert logits.grad.isfinite().all()


def test_a_class_next_to_the_true_one_costs_less_unless_the_loss_knows_no_order():
    bins = RainBins.preferred()
    near, far = torch.full((2, 1, 1, len(bins), 1, 1), -5.0)
    near[:, :, 9], far[:, :, 18] = 5.0, 5.0
    target = torch.full((1, 1, 1, 1), 2.5)  # class 8
    assert ordinal(near, target, bins) < ordinal(far, target, bins)
    assert crps(near, target, bins) < crps(far, target, bins)
    torch.testing.assert_close(cross_entropy(near, target, bins), cross_entropy(far, target, bins))


def test_crps_is_the_integral_of_its_definition():
    bins, logits, rate = distributions(count=12)
    p = np.exp(logits) / np.exp(logits).sum(axis=0)
    knots = np.array([0.0, *bins.edges, bins.top])
    total = 0.0
    for n, observed in enumerate(rate):
        at_knots = np.array([p[0, n], *np.cumsum(p[:, n])])

        def squared(r, at_knots=at_knots, observed=observed):
            return (np.interp(r, knots, at_knots) - (observed <= r)) ** 2

        pieces = np.unique([*knots, observed])
        total += sum(quad(squared, a, b)[0] for a, b in pairwise(pieces))
    loss = crps(*as_fields(logits, rate), bins).item()
    assert loss == pytest.approx(total / len(rate), rel=1e-6)


@every_loss
def test_the_truth_cannot_be_beaten(loss):
    torch.manual_seed(0)
    share = torch.tensor([0.7, 0.2, 0.1])
    middle = torch.tensor([0.0, 1.5, 3.0])
    target = middle[torch.multinomial(share, 4096, replacement=True)].reshape(1, 1, 64, 64)
    frequency = torch.stack([(target == rate).float().mean() for rate in middle])

    def cost(probability):
        return loss(probability.log().reshape(1, 1, 3, 1, 1).expand(1, 1, 3, 64, 64), target, BINS)

    for other in ([0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [1 / 3] * 3):
        assert cost(frequency) < cost(torch.tensor(other))
