"""Fields kept as whole numbers of equal steps, without loss (CF-1.11, section 8.1, packed data).

What a file counts in tenths of mm/h is a count again in the cube: it takes less than two thirds of the room
of the same values as floats.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPE = "i2"
NOT_OBSERVED = -(2**15)  # the number that stands for NaN
LARGEST = 2**15 - 1
ROWS = 64  # packed at once, in the processor's cache


def attributes(scale_factor: float, valid_range: tuple[float, float]) -> dict[str, Any]:
    """What tells every reader of CF how to unpack an array; the range is told packed.

    Raises:
        ValueError: if not all valid values can be packed.
    """
    numbers = packed(np.array([valid_range], np.float32), scale_factor)[0]
    return {"scale_factor": scale_factor, "_FillValue": NOT_OBSERVED, "valid_range": numbers.tolist()}


def plain_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of an array of the values themselves, from those of one that may hold them packed."""
    plain = dict(attributes)
    if "scale_factor" in plain:
        numbers = np.array(plain["valid_range"], DTYPE)
        plain["valid_range"] = unpacked(numbers, plain.pop("scale_factor")).tolist()
        del plain["_FillValue"]
    return plain


def packed(values: NDArray[np.float32], scale_factor: float) -> NDArray[np.int16]:
    """The numbers (y, x) that `unpacked` makes exactly these values again.

    Raises:
        ValueError: if there are none.
    """
    numbers = np.empty(values.shape, DTYPE)
    for first in range(0, len(values), ROWS):
        some = values[first : first + ROWS]
        unseen = np.isnan(some)
        with np.errstate(over="ignore"):  # what grows beyond all floats is clipped, and then refused
            counts = np.where(unseen, NOT_OBSERVED, some / np.float32(scale_factor))
        numbers[first : first + ROWS] = np.rint(counts).clip(NOT_OBSERVED, LARGEST)
        others = (unpacked(numbers[first : first + ROWS], scale_factor) != some) & ~unseen
        if others.any():
            raise ValueError(
                f"{int(others.sum())} of {others.size} values, such as {some[others][0]:.9g}, are not whole "
                f"multiples of {scale_factor:g}, at most {LARGEST} times as large"
            )
    return numbers


def unpacked(numbers: NDArray[np.int16], scale_factor: float) -> NDArray[np.float32]:
    """The products of the numbers with `scale_factor`, rounded to float32; NaN where not observed."""
    values = np.empty(numbers.shape, np.float32)
    np.multiply(numbers, scale_factor, out=values, dtype=np.float64, casting="same_kind")
    values[numbers == NOT_OBSERVED] = np.nan
    return values
