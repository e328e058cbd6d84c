"""Criss-cross, position-sensitive and external attention over a map, against their published formulations."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, Work, forward, forward_backward
from benchmarks.published.axial_deeplab import PositionSensitive
from benchmarks.published.ccnet import CrissCross
from benchmarks.published.eanet import External
from metnet.attention.criss_cross import CrissCrossAttention
from metnet.attention.external import ExternalAttention
from metnet.attention.position_sensitive import PositionSensitiveAxialAttention

CHANNELS = 128
Pair = Callable[[int], tuple[nn.Module, nn.Module]]


def criss_cross(side: int) -> tuple[nn.Module, nn.Module]:
    """One round of each, with a gamma that lets the attention through."""
    published, ours = CrissCross(CHANNELS), CrissCrossAttention(CHANNELS)
    nn.init.constant_(published.gamma, 0.7)
    return same_weights(ours, published)


def position_sensitive(side: int) -> tuple[nn.Module, nn.Module]:
    """A pair of each: along y, then along x, 8 groups."""
    published = nn.Sequential(
        PositionSensitive(CHANNELS, CHANNELS, 8, side),
        PositionSensitive(CHANNELS, CHANNELS, 8, side, width=True),
    )
    ours = nn.Sequential(
        PositionSensitiveAxialAttention(CHANNELS, CHANNELS, 8, side),
        PositionSensitiveAxialAttention(CHANNELS, CHANNELS, 8, side, width=True),
    )
    return same_weights(ours, published)


def external(side: int) -> tuple[nn.Module, nn.Module]:
    """64 slots."""
    return same_weights(ExternalAttention(CHANNELS), External(CHANNELS))


def same_weights(ours: nn.Module, published: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both with the published module's weights."""
    ours.load_state_dict(published.state_dict(), strict=True)
    return ours, published


def training(pair: Pair, side: int) -> Callable[[], tuple[Work, Work]]:
    """Both arms forward and backward, normalising by the batch."""

    def make() -> tuple[Work, Work]:
        x = a_map(side)
        ours, published = pair(side)
        return forward_backward(ours, x), forward_backward(published, x)

    return make


def using(pair: Pair, side: int) -> Callable[[], tuple[Work, Work]]:
    """Both arms as a forecast runs them: trained, no gradients."""

    def make() -> tuple[Work, Work]:
        x = a_map(side)
        ours, published = pair(side)
        return forward(ours.eval(), x), forward(published.eval(), x)

    return make


def a_map(side: int) -> Tensor:
    """The same map for every arm."""
    torch.manual_seed(0)
    return torch.randn(1, CHANNELS, side, side)


def row(
    name: str, pair: Pair, side: int, peer: str, goal: float, memory: float | None, backward: bool
) -> Row:
    """One race; `backward` for training."""
    work = f"1 x {CHANNELS} x {side} x {side}, float32, {'forward + backward' if backward else 'forward'}"
    make = training(pair, side) if backward else using(pair, side)
    return Row(name, work, peer, make, goal, memory, tolerance=1e-3, rounds=3 if backward else 5)


ROWS = (
    row("criss_cross_forward", criss_cross, 128, "CCNet", 1.3, None, False),
    row("criss_cross_train", criss_cross, 128, "CCNet", 1.3, None, True),
    row("criss_cross_train_64", criss_cross, 64, "CCNet", 1.1, None, True),
    row("position_sensitive_forward", position_sensitive, 128, "Axial-DeepLab", 3.0, 1 / 3, False),
    row("position_sensitive_train", position_sensitive, 128, "Axial-DeepLab", 2.2, 1 / 3, True),
    row("position_sensitive_train_64", position_sensitive, 64, "Axial-DeepLab", 1.1, 1 / 2, True),
    row("external_forward", external, 128, "EANet", 1.9, None, False),
    row("external_train", external, 128, "EANet", 1.9, None, True),
    row("external_train_64", external, 64, "EANet", 1.9, None, True),
)
