"""`quality`: what looks wrong in a frame, told by flags (CF-1.11 section 3.5). Values are never changed.

The thresholds were chosen on frames of OPERA, MRMS, FMI, KNMI, MeteoSwiss, BoM and DWD: real rain is hardly
ever flagged, and what is missed is left to who reads the data.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from math import log10

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.cf import RAINFALL_RATE, REFLECTIVITY, Variable
from pipelines.frame import Frame

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]
Image = NDArray[np.uint8]
Places = NDArray[np.int64]  # (place, 2): row and column
Series = NDArray[np.float64]  # (time,)

WET = 0.1  # mm/h
Z_R = 200.0, 1.6  # Z = 200 R^1.6 (Marshall and Palmer 1948), to judge reflectivity as rain

IMPOSSIBLE_RAIN = 300.0  # mm/h; even with hail radar products end at about 150
IMPOSSIBLE_REFLECTIVITY = 75.0  # dBZ; giant hail stays below
HIGH = 40.0  # mm/h; what is below is no spike, however steep
STEEP = 8.0  # times the mean of the neighbours; up to three cells side by side reach it
SPIKE_REACH = 2  # cells to each side

SPECKLES = 3  # wet cells, at most, ...
SPECKLE_REACH = 5  # ... within this many cells to each side of a speckle, ...
SPECKLE_SEEN = 0.75  # ... of which this share was observed: beside the edge of what is seen rain may go on

SPOKE_WIDTH = 5  # cells; a beam is narrower
SPOKE_LENGTH = 30  # cells, at least
SPOKE_SPREAD = 1.2  # cells: root mean square distance from the axis; of an even beam of 4 cells 1.15
SPOKE_FILL = 0.8  # wet cells for a cell of length

COVERAGE = 0.03  # of the observed share; networks at rest change by less than 0.01 from frame to frame
WINDOWS_AT_ONCE = 2**16


class CellFlag(IntFlag):
    """What is suspect about a cell."""

    SPIKE = 1  # beyond what rain can be, or far above all around it
    SPECKLE = 2  # one of very few wet cells with nothing around
    SPOKE = 4  # of a long, thin, straight line: a beam with interference


class FrameFlag(IntFlag):
    """What is suspect about a whole frame."""

    EMPTY = 1  # nothing was observed
    ALL_EQUAL = 2  # one value everywhere, and it is not that of dry
    FROZEN = 4  # every value as in the frame before, and not dry
    COVERAGE_CHANGE = 8  # much more or less was observed than in the frame before


@dataclass(frozen=True)
class Statistics:
    """A frame in few numbers, from which `frame_flags` tells what is suspect."""

    observed_share: float  # of all cells
    wet_share: float  # of the observed cells; NaN where the quantity is not rain
    minimum: float  # of the observed values, in the variable's units; NaN without any
    maximum: float
    fingerprint: int  # 64 bits, signed; the same for equal values


def flag_attributes(flags: type[IntFlag]) -> dict[str, object]:
    """The CF attributes of an array (uint8) of these flags."""
    return {
        "flag_masks": [flag.value for flag in flags],
        "flag_meanings": " ".join(str(flag.name).lower() for flag in flags),
    }


def cell_flags(frame: Frame) -> Image:
    """The `CellFlag`s of every cell (y, x); of other quantities than rain rate and reflectivity none."""
    flags = np.zeros(frame.grid.shape, np.uint8)
    if _is_rain(frame.variable):
        wet = (frame.values >= _of_rain(frame.variable, WET)).astype(np.uint8)
        for places, flag in (
            (_spikes(frame.variable, frame.values), CellFlag.SPIKE),
            (_speckles(frame.values, wet), CellFlag.SPECKLE),
            (_spokes(wet), CellFlag.SPOKE),
        ):
            flags[tuple(places.T)] |= np.uint8(flag)
    return flags


def statistics(frame: Frame) -> Statistics:
    """The statistics of one frame."""
    values = frame.values.ravel()
    observed = int(np.count_nonzero(~np.isnan(values)))
    wet_share = np.nan
    if observed and _is_rain(frame.variable):
        wet_share = int(np.count_nonzero(values >= _of_rain(frame.variable, WET))) / observed
    return Statistics(
        observed / values.size,
        wet_share,
        float(np.fmin.reduce(values)),
        float(np.fmax.reduce(values)),
        _fingerprint(values),
    )


def frame_flags(
    observed_share: Series,
    wet_share: Series,
    minimum: Series,
    maximum: Series,
    fingerprint: NDArray[np.int64],
) -> Image:
    """The `FrameFlag`s of every step (time), each compared with the last one before that has a frame.

    Told from the statistics of the steps alone, they do not depend on the order in which frames came.

    Args:
        observed_share: as in `Statistics`, like the others; NaN where a step has no frame.
        wet_share: of the observed cells.
        minimum: of the observed values.
        maximum: of the observed values.
        fingerprint: of all values.
    """
    there = np.flatnonzero(~np.isnan(observed_share))
    share, mark = observed_share[there], fingerprint[there]
    dry = (wet_share[there] == 0) & (maximum[there] <= 0)  # also of reflectivity, whose "no echo" is below 0
    told = np.zeros(there.size, np.uint8)
    told[share == 0] |= np.uint8(FrameFlag.EMPTY)
    told[(minimum[there] == maximum[there]) & ~dry] |= np.uint8(FrameFlag.ALL_EQUAL)
    told[1:][(mark[1:] == mark[:-1]) & ~dry[1:] & (share[1:] > 0)] |= np.uint8(FrameFlag.FROZEN)
    larger = np.maximum(share[1:], share[:-1])
    told[1:][np.abs(np.diff(share)) > COVERAGE * larger] |= np.uint8(FrameFlag.COVERAGE_CHANGE)
    flags = np.zeros(observed_share.shape, np.uint8)
    flags[there] = told
    return flags


def _is_rain(variable: Variable) -> bool:
    return variable.name in (RAINFALL_RATE.name, REFLECTIVITY.name)


def _of_rain(variable: Variable, rate: float) -> float:
    """A rain rate (mm/h) in the variable's units."""
    return rate if variable.name == RAINFALL_RATE.name else 10 * log10(Z_R[0] * rate ** Z_R[1])


def _rain(variable: Variable, values: Field) -> NDArray[np.floating]:
    """Values in the variable's units as rain rates (mm/h)."""
    if variable.name == RAINFALL_RATE.name:
        return values
    return (10 ** (values / 10) / Z_R[0]) ** (1 / Z_R[1])


def _spikes(variable: Variable, values: Field) -> Places:
    """Cells beyond what is possible, and high ones far above the mean of the cells around them."""
    impossible = IMPOSSIBLE_RAIN if variable.name == RAINFALL_RATE.name else IMPOSSIBLE_REFLECTIVITY
    high = np.argwhere(values >= _of_rain(variable, HIGH))
    steep = []
    for window in _windows(values, high, SPIKE_REACH):
        middle = window.shape[1] // 2
        rain = _rain(variable, np.delete(window, middle, axis=1))
        observed = ~np.isnan(rain)
        total, count = np.where(observed, rain, 0).sum(axis=1), observed.sum(axis=1)
        far_above = _rain(variable, window[:, middle]) * count > STEEP * total
        steep.append((2 * count >= rain.shape[1]) & far_above | (window[:, middle] > impossible))
    return high[np.concatenate(steep)] if steep else high


def _speckles(values: Field, wet: Image) -> Places:
    """Wet cells in all but dry surroundings."""
    side = 2 * SPECKLE_REACH + 1
    near = cv2.boxFilter(wet, -1, (side, side), normalize=False, borderType=cv2.BORDER_CONSTANT)
    lonely = np.argwhere((wet > 0) & (near <= SPECKLES))
    seen = [
        (~np.isnan(window)).mean(axis=1) >= SPECKLE_SEEN for window in _windows(values, lonely, SPECKLE_REACH)
    ]
    return lonely[np.concatenate(seen)] if seen else lonely


def _windows(values: Field, places: Places, reach: int) -> Iterator[Field]:
    """The values up to `reach` cells around places (place, neighbour), some places at a time; NaN outside."""
    offsets = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, 1, -1)
    for first in range(0, len(places), WINDOWS_AT_ONCE):
        row, column = places[first : first + WINDOWS_AT_ONCE].T[..., None] + offsets
        inside = (row >= 0) & (row < values.shape[0]) & (column >= 0) & (column < values.shape[1])
        window = np.full(row.shape, np.nan, np.float32)
        window[inside] = values[row[inside], column[inside]]
        yield window


def _spokes(wet: Image) -> Places:
    """The cells of long, straight lines that are nowhere as wide as a beam cannot be."""
    square = np.ones((SPOKE_WIDTH, SPOKE_WIDTH), np.uint8)
    thin = wet & ~cv2.morphologyEx(wet, cv2.MORPH_OPEN, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(thin, connectivity=8)
    long = np.maximum(boxes[:, cv2.CC_STAT_WIDTH], boxes[:, cv2.CC_STAT_HEIGHT]) >= SPOKE_LENGTH / 2**0.5
    long[0] = False  # the background
    found = [np.empty((0, 2), np.int64)]
    for label in np.flatnonzero(long):
        x0, y0, x_size, y_size, _ = boxes[label]
        cells = np.argwhere(labels[y0 : y0 + y_size, x0 : x0 + x_size] == label)
        if _is_line(cells):
            found.append(cells + np.array([y0, x0]))
    return np.concatenate(found)


def _is_line(cells: Places) -> bool:
    """Whether cells lie close together along one straight line."""
    from_middle = cells - cells.mean(axis=0)
    spread, axes = np.linalg.eigh(from_middle.T @ from_middle / len(cells))  # across, along
    length = np.ptp(from_middle @ axes[:, 1]) + 1
    straight = spread[0] <= SPOKE_SPREAD**2
    return bool(length >= SPOKE_LENGTH and straight and len(cells) >= SPOKE_FILL * length)


def _fingerprint(values: Field) -> int:
    """64 bits of a hash of the values; one for all NaN, and for both zeros."""
    plain = values + np.float32(0)
    plain[np.isnan(plain)] = np.nan
    digest = hashlib.sha256(plain.astype("<f4", copy=False).data).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
