"""Motion of rain by dense optical flow (DIS; Kroeger et al. 2016, arXiv:1603.03590) on log-rain."""

import math
from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

SMALLEST_IMAGE = 16  # cells a side; DIS fails on less, and on strips
FRAMES = 4  # newest frames that tell the motion, and of those that are
LATELY = 20.0  # minutes older than the newest at most, where
ENOUGH = 3  # are as new
LARGEST_IMAGE = 1500  # cells a side; larger fields are averaged down first, which costs no visible skill
FINEST_MOTION = 512  # cells a side of the grid on which motion is smoothed: it varies slowly
SMOOTHING = 15.0  # cells: how far rain tells the motion of its surroundings
WIDELY = 100.0  # cells: how far it tells that motion is in doubt
NOISE = 0.25  # cells between two frames by which optical flow errs where nothing is in doubt
FINEST_BLUR = 12.0  # cells: wider blurs are done on coarser cells, about as many to a standard deviation
EDGE = 5  # cells beside unobserved ones, where a radar's edge looks like rain that stands still
WET = 0.1  # mm/h

Image = NDArray[np.uint8]
Field = NDArray[np.float32]


def motion(rain: Field, age: Sequence[float]) -> Field:
    """The motion (cells per minute; along x to the east, along y to the south) of shape (2, y, x).

    The flow between each two successive frames that hold anything, and are new enough to tell how rain moves
    now, counts with their time apart, and with how much rain both show; it is smoothed, and spread over dry
    and unobserved cells. 0 where all is dry, or fewer than two frames hold anything.

    Args:
        rain: mm/h (time, y, x), oldest first; NaN is "not observed", a frame of nothing else is missing.
        age: minutes before now of each frame, falling.
    """
    return motion_and_doubt(rain, age)[:2]


def motion_and_doubt(rain: Field, age: Sequence[float]) -> Field:
    """The motion, and behind it how much it is in doubt (cells per minute): of shape (3, y, x).

    The doubt is how the two newest frames move otherwise than the two before them, each as smooth as the
    motion: the root mean square in wide surroundings, less what optical flow errs by anyway (`NOISE`). 0
    where fewer than three frames hold anything.
    """
    y_size, x_size = rain.shape[1:]
    factor = math.ceil(max(y_size, x_size) / LARGEST_IMAGE)
    seen = [i for i in range(len(rain)) if not np.isnan(rain[i]).all()]
    seen = [i for i in seen if i in seen[-ENOUGH:] or age[i] <= age[seen[-1]] + LATELY]
    frames = {i: _coarse(rain[i], factor) for i in seen}
    optical_flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pairs = []
    for older, newer in pairwise(seen):
        weight = np.sqrt(_weight(frames[older]) * _weight(frames[newer]))
        flow = optical_flow.calc(_framed(frames[older]), _framed(frames[newer]), None)
        far = flow[: weight.shape[0], : weight.shape[1]] * weight[..., None]
        pairs.append((far, weight * np.float32(age[older] - age[newer])))
    told = np.zeros((3, y_size, x_size), np.float32)
    if not any(weight.any() for _, weight in pairs):
        return told
    far, weight = (np.stack(part).astype(np.float64).sum(axis=0) for part in zip(*pairs, strict=True))
    told[:2] = _enlarged(
        _spread(far.astype(np.float32), weight.astype(np.float32), factor) * factor, told.shape
    )
    if len(pairs) > 1:
        noise = NOISE / min(age[older] - age[newer] for older, newer in pairwise(seen[-ENOUGH:]))
        doubt = _doubt(pairs[-2:], factor) - np.float32(noise)
        told[2] = _enlarged(np.maximum(doubt * factor, 0), told.shape)
    return told


def _doubt(pairs: Sequence[tuple[Field, Field]], factor: int) -> Field:
    """By how much two smooth flows differ, in wide surroundings (y, x)."""
    weights = [weight for _, weight in pairs]
    if not all(weight.any() for weight in weights):
        return np.zeros((1, 1), np.float32)
    one, other = (_spread(*pair, factor) for pair in pairs)
    size = one.shape[1::-1]
    weight = cv2.resize(np.minimum(*weights), size, interpolation=cv2.INTER_AREA)
    squares = np.stack([((one - other) ** 2).sum(axis=2) * weight, weight], axis=2)
    deviation = WIDELY * max(size) / max(weights[0].shape) / factor
    wide = _blurred(squares, deviation) + squares.mean(axis=(0, 1)) * np.float32(1e-4)
    return np.sqrt(wide[..., 0] / np.maximum(wide[..., 1], np.float32(1e-12)))


def _enlarged(field: Field, shape: Sequence[int]) -> Field:
    """A smooth field (y, x) or (y, x, 2) on the whole grid, the latter as (2, y, x)."""
    whole = cv2.resize(field, (shape[2], shape[1]), interpolation=cv2.INTER_LINEAR).astype(np.float32)
    return whole if whole.ndim == 2 else np.moveaxis(whole, 2, 0)


def _coarse(rain: Field, factor: int) -> Field:
    """The mean of the observed cells in blocks of `factor` x `factor`; NaN where none is."""
    if factor == 1:
        return rain
    y_size, x_size = (math.ceil(size / factor) for size in rain.shape)
    padded = np.full((y_size * factor, x_size * factor), np.nan, np.float32)
    padded[: rain.shape[0], : rain.shape[1]] = rain
    observed = ~np.isnan(padded)
    shape = (y_size, factor, x_size, factor)
    count = observed.reshape(shape).sum(axis=(1, 3), dtype=np.float32)
    total = np.where(observed, padded, 0).reshape(shape).sum(axis=(1, 3))
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _image(rain: Field) -> Image:
    """Log-rain as grey levels: 0.1 mm/h and less is black, 100 mm/h and more white; unobserved is black."""
    decibel = 10 * np.log10(np.maximum(np.nan_to_num(rain), WET) / WET)
    return np.minimum(decibel * (255 / 30), 255).astype(np.uint8)


def _framed(rain: Field) -> Image:
    """The grey levels, with black below and to the right of a small or narrow field."""
    side = max(SMALLEST_IMAGE, max(rain.shape) // 2)
    more = [max(0, side - size) for size in rain.shape]
    return cv2.copyMakeBorder(_image(rain), 0, more[0], 0, more[1], cv2.BORDER_CONSTANT).astype(np.uint8)


def _weight(rain: Field) -> Field:
    """How much the flow at each cell tells: the grey level near wet cells, away from unobserved ones."""
    size = 2 * EDGE + 1
    near_missing = cv2.dilate(np.isnan(rain).astype(np.uint8), np.ones((size, size), np.uint8))
    return cv2.GaussianBlur(_image(rain).astype(np.float32), (0, 0), 2) * (near_missing == 0)


def _spread(flow_sum: Field, weight_sum: Field, factor: int) -> Field:
    """The weighted mean flow (y, x, 2) over the surroundings; wider ones where the near hold no rain."""
    share = min(1.0, FINEST_MOTION / max(weight_sum.shape))
    size = (math.ceil(weight_sum.shape[1] * share), math.ceil(weight_sum.shape[0] * share))
    flow_sum = cv2.resize(flow_sum, size, interpolation=cv2.INTER_AREA)
    weight_sum = cv2.resize(weight_sum, size, interpolation=cv2.INTER_AREA)
    total = flow_sum.mean(axis=(0, 1)) * 1e-4
    weight = weight_sum.mean() * np.float32(1e-4)
    for wider, trust in ((1, 1.0), (6, 1e-2)):
        deviation = SMOOTHING * wider * share / factor
        total = total + trust * _blurred(flow_sum, deviation)
        weight = weight + trust * _blurred(weight_sum, deviation)
    return total / weight[..., None]


def _blurred(field: Field, deviation: float) -> Field:
    """A Gaussian mean over so many cells; a wide one on coarser cells, where it costs little."""
    factor = max(1, int(deviation / FINEST_BLUR))
    if factor == 1:
        return cv2.GaussianBlur(field, (0, 0), deviation).astype(np.float32)
    y_size, x_size = field.shape[:2]
    coarse = (math.ceil(x_size / factor), math.ceil(y_size / factor))
    small = cv2.resize(field, coarse, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(
        small, (0, 0), sigmaX=deviation * coarse[0] / x_size, sigmaY=deviation * coarse[1] / y_size
    )
    return cv2.resize(small, (x_size, y_size), interpolation=cv2.INTER_LINEAR).astype(np.float32)
