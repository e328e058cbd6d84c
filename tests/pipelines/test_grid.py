"""What is no part of a grid, and no grid, is said in the words that it was asked for."""

import pytest

from pipelines.grid import Grid, from_path

GRID = Grid("EPSG:3035", 4.2e6, 1000.0, 64, 3.2e6, -1000.0, 48)


@pytest.mark.parametrize(
    ("window", "told"),
    [
        ((0, 0, 0, 0), "holds no cells: expected at least 1 x 1"),
        ((3, 3, 5, -1), "holds no cells"),
        ((-1, 0, 2, 2), "reaches outside the grid of 48 x 64 cells"),
        ((40, 0, 9, 2), "reaches outside"),
        ((0, 63, 2, 2), "reaches outside"),
    ],
)
def test_a_window_is_a_part_of_the_grid(window, told):
    with pytest.raises(ValueError, match=rf"^window=\[.*\] .* {told}"):
        GRID.window(*window)
    assert GRID.window(0, 0, 48, 64) == GRID


def test_of_an_unknown_grid_the_nearest_is_named_and_all_there_are():
    with pytest.raises(
        ValueError, match=r"^grid=conus: .*; did you mean 'conus_1km'\?; .* conus_1km, native,"
    ):
        from_path("conus")
    with pytest.raises(ValueError, match=r"^grid=nowhere: [^?]*; expected one of conus_1km, native,"):
        from_path("nowhere")
