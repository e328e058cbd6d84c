"""The race of tiles sees a seam where there is one, and nothing where there is none."""

import numpy as np
import pytest

from benchmarks.tiles import HEADS, LEADS, THRESHOLDS, main, told
from pipelines.cf import RAINFALL_RATE
from pipelines.cube import Cube
from pipelines.ingest import ingest
from pipelines.sources.simulated import Simulated

TILE = 32
SHAPE = (len(LEADS), len(THRESHOLDS), 48, 80)


def test_a_step_at_the_border_is_told_and_costs_skill():
    generator = np.random.default_rng(0)
    whole = np.repeat(generator.random((*SHAPE[:3], 1), dtype=np.float32), SHAPE[3], axis=3)
    rain = np.where(generator.random((SHAPE[0], *SHAPE[2:])) < whole[:, 0], 9.0, 0.0).astype(np.float32)
    rain[:, :5] = np.nan
    tiles = whole.copy()
    tiles[..., TILE:] = np.clip(tiles[..., TILE:] + 0.2, 0, 1)
    for row, seam in ((told(whole, whole, rain, TILE), False), (told(tiles, whole, rain, TILE), True)):
        assert np.shape(row) == (len(LEADS) * len(THRESHOLDS), len(HEADS) - 1)
        mean, most, largest, across, beside, at_once, brier = np.transpose(row)
        np.testing.assert_allclose([beside, at_once], 0, atol=1e-6)
        if seam:
            assert (mean > 0.08).all() and (largest <= 0.2001).all() and (most <= largest).all()
            assert (across > 0.15).all() and (brier[0] > 1.01)
        else:
            np.testing.assert_array_equal([mean, most, largest, across], 0)
            np.testing.assert_array_equal(brier, 1)


@pytest.mark.slow
def test_it_runs_on_a_cube_and_refuses_one_that_no_tile_cuts(tmp_path, capsys):
    path = str(tmp_path / "cube")
    ingest(Simulated(size=96, frames=40), path)
    assert Cube.open(path).variable == RAINFALL_RATE
    main([path, "--inits", "1", "--side", "64"])
    said = capsys.readouterr().out
    assert "1 forecasts of 96 x 96 cells, tiles of 64" in said and "CPU s a forecast" in said
    assert said.count("| 60 min, ") == len(THRESHOLDS)
    with pytest.raises(ValueError, match="96 columns, which tiles of 512 do not cut"):
        main([path])
