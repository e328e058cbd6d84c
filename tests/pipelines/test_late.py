"""The past of a source that is late."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from pipelines import cf
from pipelines.cube import Cube
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.late import newest_past, past_at
from pipelines.past import past

START, MINUTE = datetime(2020, 6, 1, tzinfo=UTC), timedelta(minutes=1)
GRID = Grid("EPSG:3035", 4e6, 1000.0, 5, 3e6, -1000.0, 4)


@pytest.fixture
def cube(tmp_path):
    """Frames at 0, 5 and 10 minutes; that at 10 is empty."""
    opened = Cube.open_or_create(str(tmp_path / "cube"), GRID, cf.RAINFALL_RATE, START, 5 * MINUTE)
    frames = []
    for step in range(3):
        rate = np.full(GRID.shape, np.nan if step == 2 else step, np.float32)
        time = START + 5 * step * MINUTE
        frames.append(Frame(cf.RAINFALL_RATE, time, 5 * MINUTE, GRID, rate, "test", f"{step + 1:064x}"))
    opened.write(frames)
    return opened


def test_a_source_in_time_gives_the_past(cube):
    there = newest_past(cube, START + 5 * MINUTE, 2, [5.0], stalest=30)
    expected = past(cube, START + 5 * MINUTE, 2, [5.0])
    assert (there.radar == expected.radar).all() and (there.age == expected.age).all()
    assert there.init_time == expected.init_time


@pytest.mark.parametrize("late", [5, 15, 30])
def test_the_newest_frame_that_holds_anything_has_the_age_it_is_late_by(cube, late):
    there = newest_past(cube, START + (5 + late) * MINUTE, 2, [5.0], stalest=30)
    assert there.age.tolist() == [[5.0 + late, late]]
    assert there.radar[0, :, 0, 0].tolist() == [0, 1]
    assert there.init_time.tolist() == [round((START + (5 + late) * MINUTE).timestamp())]
    assert there.lead_time.tolist() == [5.0]


def test_what_is_too_old_is_nothing(cube):
    assert newest_past(cube, START + 40 * MINUTE, 2, [5.0], stalest=30) is None
    assert newest_past(cube, START + 10 * MINUTE, 2, [5.0], stalest=0) is None


def test_the_past_at_no_age_is_the_past(cube):
    fresh, expected = past_at(cube, START, 1, [5.0], timedelta(0)), past(cube, START, 1, [5.0])
    assert (fresh.age == expected.age).all() and (fresh.radar == expected.radar).all()
