import math

import pytest
import torch

from metnet.loss import cross_entropy
from metnet.rain import RainBins

BINS = RainBins(edges=(1.0, 2.0), top=4.0)


def test_it_is_the_mean_surprise_of_the_observed_classes():
    probability = torch.tensor([[0.5, 0.2], [0.3, 0.2], [0.2, 0.6]])  # class, pixel
    logits = probability.log().reshape(1, 1, 3, 1, 2)
    target = torch.tensor([0.4, 3.0]).reshape(1, 1, 1, 2)
    loss = cross_entropy(logits, target, BINS)
    assert loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.6)) / 2)


def test_a_pixel_that_was_not_observed_changes_nothing():
    logits = torch.randn(2, 3, 3, 4, 4)
    target = torch.rand(2, 3, 4, 4) * 4
    target[:, :, :2] = torch.nan
    seen = cross_entropy(logits[:, :, :, 2:], target[:, :, 2:], BINS)
    torch.testing.assert_close(cross_entropy(logits, target, BINS), seen)


def test_a_pixel_that_was_not_observed_gets_no_gradient():
    logits = torch.randn(1, 1, 3, 2, 2, requires_grad=True)
    target = torch.tensor([[[[0.0, torch.nan], [1.5, 3.0]]]])
    cross_entropy(logits, target, BINS).backward()
    touched = logits.grad[0, 0].abs().sum(dim=0) > 0
    assert touched.tolist() == [[True, False], [True, True]]


def test_nothing_observed_at_all_gives_zero_and_a_zero_gradient():
    logits = torch.randn(1, 2, 3, 2, 2, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 2, 2, 2), torch.nan), BINS)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_truth_cannot_be_beaten():
    torch.manual_seed(0)
    share = torch.tensor([0.7, 0.2, 0.1])
    middle = torch.tensor([0.0, 1.5, 3.0])
    target = middle[torch.multinomial(share, 4096, replacement=True)].reshape(1, 1, 64, 64)
    frequency = torch.stack([(target == rate).float().mean() for rate in middle])

    def loss(probability):
        return cross_entropy(probability.log().reshape(1, 1, 3, 1, 1).expand(1, 1, 3, 64, 64), target, BINS)

    for other in ([0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [1 / 3] * 3):
        assert loss(frequency) < loss(torch.tensor(other))
