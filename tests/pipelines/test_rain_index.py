"""Samples are drawn where it rains, each window as often as its weight says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.rain_index import DRY_WEIGHT, RainIndex, Windows


def drawn(index, count, seed=0):
    random = np.random.default_rng(seed)
    return [index.draw(random) for _ in range(count)]


@given(whole=st.tuples(st.integers(1, 90), st.integers(1, 90)), crop=st.integers(1, 60))
def test_windows_cover_the_grid_and_none_reaches_outside(whole, crop):
    windows = Windows.of(whole, crop)
    covered = np.zeros(whole, bool)
    for row in windows.rows:
        for column in windows.columns:
            part = covered[row : row + windows.size[0], column : column + windows.size[1]]
            assert part.shape == windows.size
            part[...] = True
    assert covered.all()


def test_the_weight_of_a_window_is_the_sum_over_its_cells_done_by_hand():
    noise = np.random.default_rng(3)
    rain = noise.gamma(0.3, 5.0, (20, 26)).astype(np.float32)
    rain[noise.random(rain.shape) < 0.2] = np.nan
    rain[:8, :8] = np.nan
    windows = Windows.of(rain.shape, 8)
    weights = windows.weights(rain)
    for i, row in enumerate(windows.rows):
        for j, column in enumerate(windows.columns):
            part = rain[row : row + 8, column : column + 8]
            expected = DRY_WEIGHT + np.nansum(1 - np.exp(-part)) / 64
            assert weights[i, j] == pytest.approx(0 if np.isnan(part).all() else expected, rel=1e-5)
    assert weights[0, 0] == 0


def test_a_frame_and_a_window_are_drawn_as_often_as_they_weigh():
    weights = np.array([[[1, 0, 3]], [[0, 0, 0]], [[4, 8, 0]]], np.float32)
    index = RainIndex(Windows(np.array([0]), np.array([0, 16, 32]), (8, 16)), weights, np.arange(3))
    near = [(frame, round(column / 16)) for frame, _, column in drawn(index, 8000)]
    assert {frame for frame, _ in near} == {0, 2}
    shares = [sum(frame == 0 for frame, _ in near) / 8000, sum(place == (2, 0) for place in near) / 8000]
    assert shares[0] == pytest.approx(4 / 16, abs=0.02)
    assert shares[1] == pytest.approx(4 / 16, abs=0.08)  # places lie halfway to their neighbours at most


def test_only_the_frames_that_are_asked_for_are_drawn_and_are_counted_from_0():
    weights = np.ones((6, 1, 1), np.float32)
    index = RainIndex(Windows.of((9, 9), 9), weights, np.array([1, 4]))
    assert {frame for frame, _, _ in drawn(index, 50)} == {0, 1}


def test_a_window_without_weight_is_not_drawn_even_by_the_last_chance():
    class Last:
        def random(self):
            return np.nextafter(1.0, 0.0)

        def integers(self, low, high, endpoint):
            return low

    weights = np.array([[[1.0, 1e-3, 0.0]], [[0, 0, 0]]], np.float32)
    index = RainIndex(Windows(np.array([0]), np.array([0, 16, 32]), (8, 16)), weights, np.arange(2))
    assert index.draw(Last()) == (0, 0, 8)  # halfway between the first window and the second


def test_frames_that_nobody_observed_are_refused():
    index = RainIndex(Windows.of((9, 9), 9), np.zeros((2, 1, 1), np.float32), np.arange(2))
    with pytest.raises(ValueError, match="there is nothing to learn from"):
        index.draw(np.random.default_rng(0))
