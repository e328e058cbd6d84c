"""Advection: a field carried along its motion (semi-Lagrangian; Germann & Zawadzki 2002, section 2b).

Trajectories run backward: each cell of the forecast asks where its rain comes from. `advect` does so along a
steady field of motion, `carry_ahead` along one whose pattern goes with the rain.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

KEPT = 60.0  # minutes for which rain keeps its motion
CELLS_AT_ONCE = 2**16  # a band of rows of this size stays in a processor's cache: ten times as fast


def advect(
    field: Float[Tensor, "batch *frame y x"],
    motion: Float[Tensor, "batch 2 y x"],
    lead_time: Float[Tensor, "lead"],
    longest_step: float = 5.0,
) -> Float[Tensor, "batch *frame lead y x"]:
    """The field carried along a steady motion, for every lead time; differentiable in field and motion.

    Args:
        field: in any unit; NaN is "not observed". Several of a sample go the same way.
        motion: cells per minute, first along x (to the east), then along y (to the south); finite.
        lead_time: minutes; below 0 the field is carried back.
        longest_step: minutes of one midpoint step along a trajectory.

    Returns:
        NaN where the value would come from outside the grid or from unobserved cells: where the
        bilinear weights of observed cells do not exceed 1/2.
    """
    batch, *frames, y_size, x_size = field.shape
    fields = field.reshape(batch, -1, y_size, x_size)
    result = fields.new_empty(*fields.shape[:2], len(lead_time), y_size, x_size)
    framed = bordered(fields)
    for rows in _bands(y_size, batch * x_size):
        displacement = motion.new_zeros(batch, 2, len(rows), x_size)
        reached = 0.0
        for index, lead in enumerate(lead_time.tolist()):
            displacement = trace(motion, displacement, rows, lead - reached, longest_step)
            reached = lead
            result[:, :, index, rows.start : rows.stop] = sampled(framed, displacement, rows)
    return result.view(batch, *frames, *result.shape[2:])


def carry_ahead(
    fields: Float[Tensor, "batch frame y x"],
    motion: Float[Tensor, "batch 2 y x"],
    minutes: Float[Tensor, "time"],
    longest_step: float = 5.0,
) -> Float[Tensor, "batch frame time y x"]:
    """The fields carried ahead by some minutes each along a motion that they keep for an hour.

    That far the pattern of motion goes with the rain (`come_from`); later it stays where it is.

    Args:
        fields: as in `advect`; so is what is told.
        motion: cells per minute, as in `advect`.
        minutes: not below 0.
        longest_step: minutes of one step along a trajectory that leads beyond that hour.
    """
    batch, frame, y_size, x_size = fields.shape
    result = fields.new_empty(batch, frame, len(minutes), y_size, x_size)
    framed, later, reached = bordered(fields), None, 0.0
    for index, time in enumerate(minutes):
        kept, beyond = time.clamp(max=KEPT), max(0.0, time.item() - KEPT)
        if later is None and beyond:
            later = torch.zeros_like(motion)
        for rows in _bands(y_size, batch * x_size):
            band = slice(rows.start, rows.stop)
            start = None
            if later is not None:
                start = trace(motion, later[:, :, band], rows, beyond - reached, longest_step)
                later[:, :, band] = start
            place = come_from(motion, kept, rows, start)
            result[:, :, index, band] = sampled(framed, place, rows)
        reached = beyond
    return result


def come_from(
    motion: Float[Tensor, "batch 2 y x"],
    minutes: Float[Tensor, ""],
    rows: range,
    start: Float[Tensor, "batch 2 row x"] | None = None,
) -> Float[Tensor, "batch 2 row x"]:
    """Where that is now which will have come to some rows in some minutes, or to cells displaced from there.

    Rain keeps the motion v that it has, so what is at x was d = -minutes * v(x + d) away. That is solved in
    two steps from d = -minutes * v(x), the second from halfway between the two before it, which overshoots
    less; after much more than an hour it is not, and two places tell of the same rain.

    Returns:
        Displacements (cells) of the rows' cells.
    """
    if start is None:
        here = minutes * motion[:, :, rows.start : rows.stop]
        start = torch.zeros_like(here)
    else:
        here = minutes * smooth_at(motion, start, rows)
    there = minutes * smooth_at(motion, start - here, rows)
    return start - minutes * smooth_at(motion, start - (here + there) / 2, rows)


def _bands(y_size: int, row: int) -> Iterator[range]:
    """Bands of rows, each of so many cells, that a processor's cache holds."""
    height = max(1, CELLS_AT_ONCE // row)
    for first in range(0, y_size, height):
        yield range(first, min(first + height, y_size))


def bordered(fields: Float[Tensor, "batch frame y x"]) -> Float[Tensor, "batch frame framed_y framed_x"]:
    """The fields with NaN one cell wide around them: outside the grid nothing is observed."""
    return F.pad(fields, (1, 1, 1, 1), value=torch.nan)


def trace(
    motion: Float[Tensor, "batch 2 y x"],
    displacement: Float[Tensor, "batch 2 row x"],
    rows: range,
    minutes: float,
    longest_step: float,
) -> Float[Tensor, "batch 2 row x"]:
    """Displacements (cells) traced further back by `minutes` (midpoint rule)."""
    steps = math.ceil(abs(minutes) / longest_step)
    for _ in range(steps):
        halfway = displacement - smooth_at(motion, displacement, rows) * (minutes / steps / 2)
        displacement = displacement - smooth_at(motion, halfway, rows) * (minutes / steps)
    return displacement


def smooth_at(
    field: Float[Tensor, "batch channel y x"], displacement: Float[Tensor, "batch 2 row x"], rows: range
) -> Float[Tensor, "batch channel row x"]:
    """A smooth field at the displaced cells, bilinear; outside the grid that of its nearest cell."""
    y_size, x_size = field.shape[-2:]
    x = torch.arange(x_size, device=field.device) + displacement[:, 0]
    y = torch.arange(rows.start, rows.stop, device=field.device)[:, None] + displacement[:, 1]
    place = torch.stack([2 * x / max(x_size - 1, 1) - 1, 2 * y / max(y_size - 1, 1) - 1], dim=-1)
    return F.grid_sample(field, place, mode="bilinear", padding_mode="border", align_corners=True)


def sampled(
    framed: Float[Tensor, "batch frame framed_y framed_x"],
    displacement: Float[Tensor, "batch 2 row x"],
    rows: range,
) -> Float[Tensor, "batch frame row x"]:
    """The fields, in a frame of NaN one cell wide, at the displaced cells; bilinear between observed ones.

    Whole cells and the fraction of a cell are kept apart, so that a shift by whole cells is exact on
    any grid (`grid_sample` is not: a float32 place on a 7000-cell grid is off by up to 4e-4 cells, which
    gives every dry neighbour of rain some of it).
    """
    width = framed.shape[3]
    y_size, x_size = framed.shape[2] - 2, width - 2
    whole = displacement.detach().floor()
    x_share, y_share = (displacement - whole).unbind(dim=1)
    far = 2.0 * max(y_size, x_size)  # beyond the grid from anywhere; keeps the integers in range
    x_whole, y_whole = whole.clamp(-far, far).long().unbind(dim=1)
    x_first = torch.arange(x_size, device=framed.device) + x_whole + 1
    y_first = torch.arange(rows.start, rows.stop, device=framed.device)[:, None] + y_whole + 1
    columns = [(x_first + right).clamp(0, width - 1) for right in (0, 1)]
    lines = [(y_first + down).clamp(0, y_size + 1) * width for down in (0, 1)]
    values = framed.flatten(2)
    total = observed_share = torch.zeros_like(x_share)[:, None]
    for column, x_weight in zip(columns, (1 - x_share, x_share), strict=True):
        for line, y_weight in zip(lines, (1 - y_share, y_share), strict=True):
            place = (line + column).flatten(1)[:, None].expand(-1, values.shape[1], -1)
            corner = values.gather(2, place).view(*values.shape[:2], *x_share.shape[1:])
            weight = (x_weight * y_weight)[:, None] * ~corner.isnan()
            total = total + weight * corner.nan_to_num()
            observed_share = observed_share + weight
    mean = total / observed_share.clamp(min=0.5)
    return torch.where(observed_share > 0.5, mean, torch.nan)
