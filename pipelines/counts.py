"""Fields kept as counts of equal steps, without loss (packed data, CF-1.11, section 8.1).

What a file counts in tenths of mm/h is a count again in the cube: it takes less than two thirds of the room
of the same values as floats. (`pipelines.formats.packing` reads what others packed.)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPE = "i2"
NOT_OBSERVED = -(2**15)  # the count that stands for NaN
LARGEST = 2**15 - 1
ROWS = 64  # packed at once, in the processor's cache
DIGITS = 9  # after the point, of a valid range in its own units
RANGE = ("valid_min", "valid_max")
TOLD = {"scale_factor", "_FillValue", *RANGE}


def packed(values: NDArray[np.float32], scale_factor: float) -> NDArray[np.int16]:
    """The counts (y, x) that `unpacked` makes these values again; -0 is 0.

    Raises:
        ValueError: if there are none.
    """
    counts = np.empty(values.shape, DTYPE)
    for first in range(0, len(values), ROWS):
        some = values[first : first + ROWS]
        unseen = np.isnan(some)
        with np.errstate(over="ignore"):  # what grows beyond all floats is clipped, and then refused
            steps = np.where(unseen, NOT_OBSERVED, some / np.float32(scale_factor))
        counts[first : first + ROWS] = np.rint(steps).clip(NOT_OBSERVED, LARGEST)
        others = (unpacked(counts[first : first + ROWS], scale_factor) != some) & ~unseen
        if others.any():
            raise ValueError(
                f"its value {some[others][0]:.9g} is no whole multiple of {scale_factor:g} "
                f"within {LARGEST * scale_factor:g} of 0"
            )
    return counts


def unpacked(
    counts: NDArray[np.int16], scale_factor: float, into: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The products of the counts with `scale_factor`, rounded to float32; NaN where not observed."""
    values = np.empty(counts.shape, np.float32) if into is None else into
    np.multiply(counts, scale_factor, out=values, dtype=np.float64, casting="same_kind")
    values[counts == NOT_OBSERVED] = np.nan
    return values


def packed_attributes(scale_factor: float, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Of an array of counts, from those of one of the values: every reader of CF unpacks it by them.

    Its valid range is told in counts, as CF asks, and under names that software from before there were
    counts does not take for a field of its own.

    Raises:
        ValueError: if the ends of the valid range cannot be packed.
    """
    told = dict(attributes)
    ends = packed(np.array([told.pop("valid_range")], np.float32), scale_factor)[0].tolist()
    told |= {"scale_factor": scale_factor, "_FillValue": NOT_OBSERVED} | dict(zip(RANGE, ends, strict=True))
    if plain_attributes(told) != dict(attributes):
        raise ValueError(f"valid_range={attributes['valid_range']}: no whole multiples of {scale_factor:g}")
    return told


def plain_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Of an array of the values, from those of one that may hold counts."""
    told = dict(attributes)
    if told.keys() >= TOLD:
        scale_factor, _, *ends = (told.pop(name) for name in ("scale_factor", "_FillValue", *RANGE))
        told["valid_range"] = [round(count * scale_factor, DIGITS) for count in ends]
    return told
