"""Axial attention against axial_attention 0.6.1, with the same weights."""

from collections.abc import Callable, Sequence

import torch
from axial_attention import AxialAttention as Published

from benchmarks.harness import Row, Work, forward, forward_backward
from metnet.attention.axial import AxialAttention

HEADS = 8


def race(shape: Sequence[int], dim_index: int, training: bool) -> Callable[[], tuple[Work, Work]]:
    """Both arms on the same map, with gradients or without."""

    def make() -> tuple[Work, Work]:
        torch.manual_seed(0)
        x = torch.randn(*shape)
        arguments = {"num_dimensions": len(shape) - 2, "heads": HEADS, "dim_index": dim_index}
        published = Published(shape[dim_index], **arguments)
        ours = AxialAttention(shape[dim_index], **arguments)
        ours.load_state_dict(published.state_dict(), strict=True)
        arm = forward_backward if training else forward
        return arm(ours, x), arm(published, x)

    return make


def rows(
    name: str,
    shape: Sequence[int],
    dim_index: int,
    goals: tuple[float, float],
    rounds: int,
    memory: tuple[float, float] = (1 / 6, 1 / 5),
) -> list[Row]:
    """One race forward and one forward + backward, each with its goals of time and memory."""
    work = f"{' x '.join(map(str, shape))}, {HEADS} heads"
    peer = "axial_attention 0.6.1"
    using, training = race(shape, dim_index, False), race(shape, dim_index, True)
    return [
        Row(f"{name}_forward", f"{work}, f", peer, using, goals[0], memory[0], rounds=rounds),
        Row(f"{name}_train", f"{work}, f+b", peer, training, goals[1], memory[1], rounds=rounds),
    ]


ROWS = (
    *rows("axial_128", (1, 128, 128, 128), 1, (3.0, 2.0), 7),
    *rows("axial_256", (1, 128, 256, 256), 1, (3.0, 2.0), 2),
    *rows("axial_last_128", (1, 128, 128, 128), -1, (3.0, 2.0), 7),
    *rows("axial_video", (1, 5, 64, 64, 64), 2, (2.0, 1.3), 5, (1 / 3, 1 / 3)),
)
