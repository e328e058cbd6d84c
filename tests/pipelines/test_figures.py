"""The picture of `bench_skill`: what it shows, read back from what was drawn."""

import io
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from pipelines.figures import COLOURS, _ratios, event_ratios
from pipelines.skill import Estimate

EVENTS = ["one", "two", "three"]
BETTER = Estimate(0.9, 0.85, 0.95)
UNSURE = Estimate(0.97, 0.9, 1.1)
UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def drawn(told, less):
    panel = Figure().subplots()
    _ratios(panel, "CRPS", told, EVENTS, less)
    return panel


def test_each_event_has_its_ratio_to_each_baseline_and_its_interval_on_its_line():
    panel = drawn({"STEPS": {"one": BETTER, "three": UNSURE}, "the other": {"two": BETTER}}, less=True)
    lines, steps, _, other = (part for part in panel.collections if part.get_zorder() > 0)
    np.testing.assert_allclose(steps.get_offsets(), [(0.9, -0.15), (0.97, 1.85)])
    np.testing.assert_allclose(other.get_offsets(), [(0.9, 1.15)])
    np.testing.assert_allclose(
        lines.get_segments(), [[(0.85, -0.15), (0.95, -0.15)], [(0.9, 1.85), (1.1, 1.85)]]
    )


def test_a_mark_is_filled_where_the_interval_lies_on_one_side_of_one():
    sure_and_worse, unknown = Estimate(1.2, 1.1, 1.3), Estimate(0.5, math.nan, math.nan)
    told = {"STEPS": {"one": BETTER, "two": UNSURE, "three": sure_and_worse, "four": unknown}}
    panel = Figure().subplots()
    _ratios(panel, "CRPS", told, [*EVENTS, "four"], less=True)
    faces = panel.collections[1].get_facecolors()
    filled, hollow = to_rgba(COLOURS[0]), to_rgba("white")
    np.testing.assert_allclose(faces, [filled, hollow, filled, hollow])


@pytest.mark.parametrize(("less", "words"), [(True, "below 1"), (False, "above 1")])
def test_the_better_side_is_told_and_shaded(less, words):
    panel = drawn({"STEPS": {"one": BETTER, "two": Estimate(1.3, 1.2, 1.4)}}, less)
    assert words in panel.get_xlabel()
    left, right = panel.get_xlim()
    assert left < 0.85 < 1.4 < right
    [shade] = panel.patches
    assert shade.get_x() == pytest.approx(left if less else 1.0)
    assert shade.get_width() == pytest.approx(1.0 - left if less else right - 1.0)


@pytest.mark.parametrize("ratio", [BETTER, UNKNOWN, Estimate(math.inf, math.nan, math.inf)])
def test_a_panel_for_each_score_and_none_is_spoiled_by_what_is_not_known(ratio):
    told = {f"score {n}": {"STEPS": {"one": ratio}, "the other": {}} for n in range(4)}
    picture = plt.imread(io.BytesIO(event_ratios(told, dict.fromkeys(told, 0.0))))
    rows, columns, _ = picture.shape
    assert columns > rows
    one = plt.imread(io.BytesIO(event_ratios({"score": told["score 0"]}, {"score": 1.0})))
    assert one.shape[1] < columns / 2
    assert (picture[:, :, :3] < 0.5).any(axis=(1, 2)).sum() > 100  # something is drawn, from top to bottom
