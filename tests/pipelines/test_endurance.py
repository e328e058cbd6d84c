"""Writers that are killed: a few of the kills of `python -m benchmarks.endurance`."""

import pytest

from benchmarks.endurance import kills


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_killed_writer_loses_nothing_that_it_acknowledged_and_leaves_nothing_half(kind, tmp_path, s3):
    place = str(tmp_path) if kind == "folder" else f"{s3}/killed"
    found = kills(f"{place}/cube", 2)
    assert found.at_work > 0 and found.acknowledged > 0
    assert (found.lost, found.failed) == (0, 0)
    assert found.visible >= found.acknowledged
