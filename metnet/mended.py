"""`mended`: the motion that rain goes on along, put right by what frames show that were carried along it.

Optical flow from frame to frame is slowed by what stands still (echoes of the ground, rain that forms over
the same hills), and such frames lie too close together to tell it from noise. Carried along it to one time,
older frames lie a little beside the newest one; by how much, in wide surroundings, is what it lacks (Lucas &
Kanade 1981, IJCAI, 674-679, by least squares over all older frames). The frames themselves are best brought
together along the flow as it was (docs/experiments.md, "A motion put right").
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metnet.cascade import decibel_blocks
from metnet.prior import BLOCK, box_mean, risen

SURROUNDINGS = 17  # blocks along a side, of means of means: what tells the motion of a place
EVEN = 1.0  # (dB a block) squared: of rain as even as this, half of what it shows is believed
ENOUGH = 100.0  # minutes squared: of a frame older by their root, seen all over, so much is; of less, less
FARTHEST = 2.0  # blocks that flow may lack from the newest frame to the next: more shows something else
LEAST = 1e-12  # determinant of what tells nothing


@torch.no_grad()
def mended(
    motion: Float[Tensor, "batch 2 Y X"],
    frames: Float[Tensor, "batch frame Y X"],
    age: Float[Tensor, "batch frame"],
) -> Float[Tensor, "batch 2 Y X"]:
    """The motion (cells a minute) from the time on that all frames were carried to along `motion`.

    It is `motion` where there is but one frame, or nothing to see in them.

    Args:
        motion: along x to the east, along y to the south.
        frames: mm/h, the newest first; NaN = not observed. The sides of the grid must be multiples of 4.
        age: minutes, of each as it was seen.
    """
    newest, *others = (decibel_blocks(frame) for frame in frames.unbind(dim=1))
    gaps = (age - age[:, :1]).clamp(min=0)  # 0: the same frame again tells nothing
    sums = newest.new_zeros(len(newest), 6, *newest.shape[1:])
    for older, gap in zip(others, gaps[:, 1:].unbind(dim=1), strict=True):
        sums = sums + _seen(newest, older) * _slopes(newest, older, gap[:, None, None])
    xx, xy, yy, x, y, weight = box_mean(box_mean(sums, SURROUNDINGS), SURROUNDINGS).unbind(dim=1)
    ridge = EVEN * weight.clamp(min=ENOUGH)
    xx, yy = xx + ridge, yy + ridge
    determinant = (xx * yy - xy**2).clamp(min=LEAST)
    lacking = torch.stack([xy * y - yy * x, xy * x - xx * y], dim=1) / determinant[:, None]
    unknown = (gaps == 0) | frames.isnan().flatten(2).all(dim=2)
    farthest = (FARTHEST / gaps.masked_fill(unknown, torch.inf).amin(dim=1))[:, None, None, None]
    return motion + BLOCK * risen(lacking.clamp(-farthest, farthest))


def _seen(one: Float[Tensor, "batch y x"], other: Float[Tensor, "batch y x"]) -> Float[Tensor, "batch 1 y x"]:
    """1 where a block and all around it were observed in both, 0 elsewhere and along the grid's sides."""
    lacking = (one.isnan() | other.isnan()).to(one.dtype)[:, None]
    return 1 - F.max_pool2d(F.pad(lacking, (1, 1, 1, 1), value=1.0), 3, stride=1)


def _slopes(
    newest: Float[Tensor, "batch y x"], older: Float[Tensor, "batch y x"], gap: Float[Tensor, "batch 1 1"]
) -> Float[Tensor, "batch 6 y x"]:
    """Products of the slopes of two frames over their gap along x and y, and of these with what changed.

    The last is the gap squared. All are finite, and true where `_seen` says so.
    """
    around = F.pad(((newest + older) / 2).nan_to_num(), (1, 1, 1, 1), mode="replicate")
    along_x = gap * (around[:, 1:-1, 2:] - around[:, 1:-1, :-2]) / 2
    along_y = gap * (around[:, 2:, 1:-1] - around[:, :-2, 1:-1]) / 2
    change = (newest - older).nan_to_num()
    squares = along_x**2, along_x * along_y, along_y**2
    return torch.stack([*squares, along_x * change, along_y * change, (gap**2).expand_as(change)], dim=1)
