"""What a run's attributes say is what was written."""

from datetime import UTC, datetime, timedelta

import pytest

from pipelines.grid import Grid
from pipelines.run_facts import RunFacts
from pipelines.runs import RunHeader

FACTS = RunFacts({0.1: ((0.5, 1.5), (0.0, 1.0))}, timedelta(minutes=10), True)


def header(attributes):
    grid = Grid("EPSG:3035", 4e6, 1000.0, 5, 3e6, -1000.0, 4)
    init = datetime(2020, 6, 1, tzinfo=UTC)
    return RunHeader(init, grid, (5.0, 10.0), (0.1, 1.0), (0.5,), attributes)


def test_the_attributes_give_the_facts_back():
    assert RunFacts.of(header({**FACTS.attributes(), "input_age_minutes": "10"})) == FACTS


def test_a_run_that_says_nothing_was_made_from_new_frames_and_left_alone():
    assert RunFacts.of(header({})) == RunFacts() == RunFacts.of(header(RunFacts().attributes()))


def test_the_cuts_that_older_runs_tell_are_not_looked_at():
    assert RunFacts.of(header({"probability_cuts": '{"1": "none"}'})) == RunFacts()


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"calibration": "[1"}, "cannot be read"),
        ({"calibration": "[1]"}, "cannot be read"),
        ({"input_age_minutes": "late"}, "cannot be read"),
        ({"input_age_minutes": "1e99"}, "cannot be read"),
        ({"calibration": '{"1": [[0, 1]]}'}, "another number of lead times than its 2"),
    ],
)
def test_attributes_that_cannot_be_are_refused_by_the_name_of_the_run(attributes, said):
    with pytest.raises(ValueError, match=f"run 20200601T000000Z: .*{said}"):
        RunFacts.of(header(attributes))
